"""Predictions at home: backbone, federated adapter, the site's own sealed head.

Needs what a federation left behind and nothing else: the adapter in PEFT's format, the head, and
the backbone's directory.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedgraft_client.data import Records
from fedgraft_client.store import load_sealed
from fedgraft_client.tasks import Answer, Task
from fedgraft_client.tasks.alignment import aligned
from fedgraft_common.adapted import quiet_peft
from fedgraft_common.backbone import Backbone, load_backbone
from fedgraft_common.errors import AdapterError
from fedgraft_common.modality import Raw, count, take
from fedgraft_common.plan import Backbone as BackboneConfig

CHUNK = 256  # records predicted at once


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a task's head says of each record.

    Attributes:
        task: what was predicted.
        outputs: N records first; see the task's module for their form.
        backbone: with which.
    """

    task: Task
    outputs: torch.Tensor
    backbone: Backbone

    @property
    def answers(self) -> list[Answer]:
        """One row for each record, for people."""
        return self.task.answers(self.outputs)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the task's classes."""
        return self.task.spec.classes

    @property
    def probabilities(self) -> torch.Tensor:
        """(N, K) float32, of a task with one class for each record."""
        return self.outputs.softmax(dim=1)

    @property
    def labels(self) -> list[str]:
        """The most probable class of each record, of such a task."""
        return [self.classes[i] for i in self.outputs.argmax(dim=1).tolist()]


def align(found: Prediction, records: Records) -> torch.Tensor:
    """The labels of predicted records, one for each place that the backbone has."""
    return aligned(found.task, records, found.backbone)


def load_adapted(config: BackboneConfig, adapter: Path) -> tuple[Backbone, nn.Module]:
    """A backbone with a saved adapter, loaded by PEFT itself.

    Raises:
        BackboneError: the backbone cannot be loaded.
        AdapterError: the adapter is missing, or is for another backbone.
    """
    from peft import PeftModel

    backbone = load_backbone(config)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():  # else PEFT asks the network, or opens a pickle
            raise AdapterError(
                str(adapter), f"no {name}", "a directory with both of PEFT's files",
                "Name the adapter directory of the run.",
            )  # fmt: skip
    try:
        with quiet_peft():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model: Any = PeftModel.from_pretrained(backbone.model, str(adapter))
    except (OSError, ValueError, RuntimeError, KeyError, UserWarning) as error:
        raise AdapterError(
            str(adapter), str(error).splitlines()[0],
            "a directory with adapter_config.json and adapter_model.safetensors for this backbone",
            "Name the adapter directory of the run, and the backbone of its plan.",
        ) from None  # fmt: skip
    return backbone, model.eval()


def predict(adapter: Path, head: Path, raw: Raw, source: str | None = None) -> Prediction:
    """Predicts new records.

    Args:
        adapter: directory in PEFT's format.
        head: a sealed head; it says which backbone it belongs to.
        raw: N records in the form of the backbone's modality; images are (N, C, H, W) float32 in
            [0, 1].
        source: where the backbone is, if not where the plan said.

    Raises:
        BackboneError, AdapterError, CheckpointError: one of the three cannot be loaded.
        DataError: the records have another form.
    """
    sealed = load_sealed(head)
    config = sealed.backbone if source is None else sealed.backbone.model_copy(
        update={"source": source}
    )  # fmt: skip
    backbone, model = load_adapted(config, adapter)
    kind = sealed.task.features
    parts = []
    with torch.no_grad():
        for start in range(0, count(raw), CHUNK):
            inputs = backbone.prepare(take(raw, slice(start, start + CHUNK)))
            parts.append(sealed.head(backbone.features(model, inputs, kind)))
    return Prediction(sealed.task, torch.cat(parts), backbone)
