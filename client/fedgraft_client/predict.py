"""Predictions at home: backbone, federated adapter, the site's own sealed head.

Needs what a federation left behind and nothing else: the adapter in PEFT's format, the head, and
the backbone's directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedgraft_client.store import load_sealed
from fedgraft_common.adapted import pool, quiet_peft
from fedgraft_common.backbone import Backbone, load_backbone
from fedgraft_common.errors import AdapterError
from fedgraft_common.plan import Backbone as BackboneConfig


@dataclass(frozen=True, slots=True)
class Prediction:
    """Class and probability of each record.

    Attributes:
        classes: names, K of them.
        probabilities: (N, K) float32.
    """

    classes: tuple[str, ...]
    probabilities: torch.Tensor

    @property
    def labels(self) -> list[str]:
        """The most probable class of each record."""
        return [self.classes[i] for i in self.probabilities.argmax(dim=1).tolist()]


def load_adapted(config: BackboneConfig, adapter: Path) -> tuple[Backbone, nn.Module]:
    """A backbone with a saved adapter, loaded by PEFT itself.

    Raises:
        BackboneError: the backbone cannot be loaded.
        AdapterError: the adapter is missing, or is for another backbone.
    """
    from peft import PeftModel

    backbone = load_backbone(config)
    try:
        with quiet_peft():
            model: Any = PeftModel.from_pretrained(backbone.model, str(adapter))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise AdapterError(
            str(adapter), str(error).splitlines()[0],
            "a directory with adapter_config.json and adapter_model.safetensors for this backbone",
            "Name the adapter directory of the run, and the backbone of its plan.",
        ) from None  # fmt: skip
    return backbone, model.eval()


def predict(config: BackboneConfig, adapter: Path, head: Path, images: torch.Tensor) -> Prediction:
    """Predicts new records.

    Args:
        config: which backbone, as in the plan.
        adapter: directory in PEFT's format.
        head: a sealed head.
        images: (N, C, H, W) float32 in [0, 1].

    Raises:
        BackboneError, AdapterError, CheckpointError: one of the three cannot be loaded.
    """
    backbone, model = load_adapted(config, adapter)
    output, classes = load_sealed(head)
    parts = []
    with torch.no_grad():
        for chunk in images.split(256):
            pooled = pool(model(backbone.manifest.preprocessing(chunk)), backbone.pooling)
            parts.append(output(backbone.standardise(pooled)).softmax(dim=1))
    return Prediction(classes, torch.cat(parts))
