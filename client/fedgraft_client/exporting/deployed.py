"""Backbone, federated adapter and a site's own head as one model.

Shapes: N records, K outputs at a place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedgraft_client.head import LinearHead
from fedgraft_client.predict import load_adapted
from fedgraft_client.store import load_sealed
from fedgraft_common.backbone import Backbone


class Deployed(nn.Module):
    """Prepared inputs to the head's outputs.

    Args:
        backbone: says how the model is run.
        model: the backbone's model with the adapter.
        head: sealed.
    """

    def __init__(self, backbone: Backbone, model: nn.Module, head: LinearHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = model
        self.head = head
        self.requires_grad_(False).eval()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """(N, K), (N, T, K) or (N, K, H, W) float32, as the task says."""
        kind = self.head.task.features
        outputs: torch.Tensor = self.head(self.backbone.features(self.model, inputs, kind))
        return outputs


@dataclass(frozen=True, slots=True)
class Parts:
    """What is exported.

    Attributes:
        model: all of it, one after the other.
        adapter: directory in PEFT's format.
        plan: hash of the run that sealed the head.
    """

    model: Deployed
    adapter: Path
    plan: str


def assemble(adapter: Path, head: Path, source: str | None = None) -> Parts:
    """Loads the three parts.

    Args:
        adapter: directory in PEFT's format.
        head: a sealed head; it says which backbone it belongs to.
        source: where the backbone is, if not where the plan said.

    Raises:
        BackboneError, AdapterError, CheckpointError: one of the three cannot be loaded.
    """
    from fedgraft_common.files import load_tensors

    sealed = load_sealed(head)
    config = sealed.backbone if source is None else sealed.backbone.model_copy(
        update={"source": source}
    )  # fmt: skip
    backbone, model = load_adapted(config, adapter)
    plan = load_tensors(head)[1].get("plan", "unknown")
    return Parts(Deployed(backbone, model, sealed.head), adapter, plan)
