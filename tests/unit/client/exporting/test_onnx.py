"""ONNX files against the model they were written from."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedgraft_client.exporting import onnx as exporting
from fedgraft_client.exporting.deployed import Parts
from fedgraft_client.exporting.onnx import export_onnx, quantise, run_onnx
from fedgraft_common.errors import ExportError

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")


def test_a_text_model_for_any_number_of_records(left: Callable[..., Parts], tmp_path: Path) -> None:
    """Backbone, adapter, mask, pooling and head, with 32 and with 8 bits."""
    parts = left("BERT")
    path = tmp_path / "m.onnx"
    assert export_onnx(parts.model, parts.model.backbone, path, {"fedgraft.plan": "x"}) < 1e-4
    inputs = parts.model.backbone.example(17, torch.Generator().manual_seed(9))
    with torch.no_grad():
        expected = parts.model(*inputs)
    torch.testing.assert_close(run_onnx(path, inputs), expected, rtol=1e-4, atol=1e-4)
    facts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert facts["fedgraft.plan"] == "x"
    assert json.loads(facts["fedgraft.preparation"])["length"] == 8
    quantise(path, tmp_path / "q.onnx")
    found = run_onnx(tmp_path / "q.onnx", inputs)
    assert 1e-6 < float((found - expected).abs().max()) < 0.1
    assert sorted(p.name for p in tmp_path.glob("*.onnx*")) == ["m.onnx", "q.onnx"]


def test_a_sites_own_affine_part_goes_with_its_head(
    left: Callable[..., Parts], tmp_path: Path
) -> None:
    parts = left("PatchTST", affine=True)
    assert parts.model.head.affine is not None
    path = tmp_path / "m.onnx"
    assert export_onnx(parts.model, parts.model.backbone, path, {}) < 1e-4
    inputs = parts.model.backbone.example(5, torch.Generator().manual_seed(9))
    with torch.no_grad():
        expected = parts.model(*inputs)
        parts.model.head.affine = None
        without = parts.model(*inputs)
    assert not torch.allclose(expected, without, atol=1e-2)
    torch.testing.assert_close(run_onnx(path, inputs), expected, rtol=1e-4, atol=1e-4)


class Clock(nn.Module):
    """Gives something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return pixels.mean(dim=(2, 3)) + self.calls


class Stubborn(nn.Module):
    """Does one thing or another as its input says, which a traced graph cannot."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean(dim=(2, 3)) if pixels.sum() > 0 else pixels.amax(dim=(2, 3))


@pytest.mark.parametrize(
    ("model", "text"), [(Clock(), "outputs that differ by"), (Stubborn(), "torch.onnx.export")]
)
def test_what_computes_something_else_is_not_kept(
    left: Callable[..., Parts], tmp_path: Path, model: nn.Module, text: str
) -> None:
    backbone = left("ResNet (transformers)").model.backbone
    (tmp_path / "m.onnx").write_bytes(b"the last good one")
    with pytest.raises(ExportError, match=text) as caught:
        export_onnx(model, backbone, tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "m.onnx").read_bytes() == b"the last good one"
    assert not list(tmp_path.glob(".m.onnx*"))


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    own = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "onnxruntime":
            raise ModuleNotFoundError("no onnxruntime", name="onnxruntime")
        return own(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ExportError, match=r"onnxruntime.*pip install 'fedgraft\[onnx\]'"):
        exporting.require_onnx()
