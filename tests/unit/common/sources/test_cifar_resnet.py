"""The small residual network with its published weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedgraft_common.architectures.cifar_resnet import CifarResNet
from fedgraft_common.backbone import load_backbone
from fedgraft_common.errors import BackboneError
from fedgraft_common.plan import Backbone as Config


def test_published_weights_fit(shared_data: Path) -> None:
    for depth, name in ((20, "resnet20-12fca82f"), (32, "resnet32-d509ac18")):
        path = shared_data / "weights_resnet_cifar10" / f"{name}.safetensors"
        backbone = load_backbone(Config(source=f"cifar-resnet:{depth}", weights=str(path)))
        assert len(backbone.blocks) == 3 * (depth - 2) // 6
        inputs = backbone.prepare(torch.rand(2, 1, 28, 28))
        with torch.no_grad():
            features = backbone.features(backbone.model, inputs)
            cells = backbone.features(backbone.model, inputs, "map")
        assert features.shape == (2, 64)
        assert cells.shape == (2, 64, 8, 8)
        tensors = load_file(path)
        assert sum(p.numel() for p in backbone.model.parameters()) == sum(
            t.numel() for n, t in tensors.items()
            if "running" not in n and not n.startswith("linear")
        )  # fmt: skip


def test_a_shortcut_has_no_parameters_and_keeps_values() -> None:
    """Option A: where a block's convolutions give nothing, its input goes through, thinned out."""
    model = CifarResNet(20).eval()
    block: Any = model.layer2[0]
    with torch.no_grad():
        block.bn2.weight.zero_()
        block.bn2.bias.zero_()
        x = torch.rand(1, 16, 4, 4)
        out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


@pytest.mark.parametrize(
    ("source", "weights", "text"),
    [
        ("cifar-resnet:21", None, "cifar-resnet:20, cifar-resnet:32"),
        ("cifar-resnet:20", None, "published weights"),
        ("cifar-resnet:32", "small", "no weights for"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, source: str, weights: str | None, text: str) -> None:
    if weights:
        weights = str(tmp_path / "small.safetensors")
        save_file(CifarResNet(20).state_dict(), weights)
    with pytest.raises(BackboneError, match=text):
        load_backbone(Config(source=source, weights=weights))
