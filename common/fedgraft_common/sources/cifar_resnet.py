"""`cifar-resnet:DEPTH`: residual networks pre-trained on CIFAR-10, from a local weights file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fedgraft_common import plan as plans
from fedgraft_common.architectures.cifar_resnet import CifarResNet
from fedgraft_common.description import read_manifest
from fedgraft_common.errors import BackboneError
from fedgraft_common.preparations import build
from fedgraft_common.sources import weights
from fedgraft_common.sources.source import Loaded, Output

DEPTHS = (20, 32, 44, 56, 110)
CONSTANTS = {
    "channels": 3, "size": 32, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)
}  # fmt: skip
"""What the published weights were trained with."""


def load(depth: str, config: plans.Backbone) -> Loaded:
    """Builds the network of a depth and fills it from `backbone.weights`.

    Raises:
        BackboneError: another depth, no weights, or weights that do not fit or are not pinned.
    """
    if depth not in map(str, DEPTHS):
        raise BackboneError(
            "backbone.source", f"cifar-resnet:{depth}",
            ", ".join(f"cifar-resnet:{known}" for known in DEPTHS), "Correct the plan.",
        )  # fmt: skip
    if config.weights is None:
        raise BackboneError(
            "backbone.weights", "none", "a safetensors file with the published weights",
            "Name the file.",
        )  # fmt: skip
    file = weights.file_of(Path(config.weights))
    digest = weights.check_hash((file,), config.sha256)
    model = CifarResNet(int(depth))
    weights.fill(model, weights.read(file), file)
    manifest = read_manifest(file.parent, f"cifar-resnet:{depth}")
    settings = manifest.preprocessing or CONSTANTS
    preparation = build(settings, "image", file.parent, str(file), config.preprocessing)
    blocks = manifest.blocks or tuple(
        f"{stage}.{index}"
        for stage in ("layer1", "layer2", "layer3")
        for index in range((int(depth) - 2) // 6)
    )
    frozen = model.requires_grad_(False).eval()
    return Loaded(frozen, manifest, preparation, _read, blocks, digest, file.parent)


def _read(model: nn.Module, named: dict[str, torch.Tensor]) -> Output:
    return Output(model(named["pixel_values"]))
