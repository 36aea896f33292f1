"""Weights come from safetensors, whole, and are the pinned ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedgraft_common.errors import BackboneError
from fedgraft_common.sources import weights


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save_file(
        {"weight": torch.ones(2, 3).half(), "bias": torch.zeros(2), "more": torch.ones(1)}, path
    )
    return path


def test_a_model_is_filled_in_float32(file: Path) -> None:
    model = nn.Linear(3, 2)
    weights.fill(model, weights.read(file), file)
    assert torch.equal(model.weight, torch.ones(2, 3))
    assert model.weight.dtype is torch.float32


def test_what_is_missing_is_named(file: Path) -> None:
    linear = nn.Linear(3, 2)
    model, before = nn.Sequential(linear), linear.weight.clone()
    with pytest.raises(BackboneError, match=r"no weights for 0\.bias, 0\.weight"):
        weights.fill(model, weights.read(file), file)
    assert torch.equal(linear.weight, before)


def test_another_shape_is_refused(file: Path) -> None:
    with pytest.raises(BackboneError, match="size mismatch for weight"):
        weights.fill(nn.Linear(4, 2), weights.read(file), file)


@pytest.mark.parametrize("name", ["w.bin", "w.pt", "w.pth", "w.th", "w.ckpt", "w.npz"])
def test_a_pickle_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BackboneError, match="run code when it is opened"):
        weights.file_of(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"), [("w.onnx", "ends in .safetensors"), ("gone", "existing")]
)
def test_other_files_are_refused(tmp_path: Path, name: str, text: str) -> None:
    if name != "gone":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BackboneError, match=text):
        weights.file_of(tmp_path / name)


def test_a_pickle_with_another_name_is_no_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    torch.save({"weight": torch.ones(1)}, path)
    with pytest.raises(BackboneError, match="a safetensors file"):
        weights.read(path)


def test_the_hash_is_the_file_s(file: Path) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert weights.check_hash((file,), None) == weights.check_hash((file,), digest) == digest
    with pytest.raises(BackboneError, match="pinned by the plan"):
        weights.check_hash((file,), "0" * 64)


def shards(directory: Path, *names: str) -> Path:
    for name in names:
        save_file({name: torch.ones(1)}, directory / name)
    index = {"weight_map": {name: name for name in names}}
    (directory / weights.INDEX).write_text(json.dumps(index))
    return directory


def test_shards_have_one_hash_that_covers_all(tmp_path: Path) -> None:
    files = weights.in_directory(shards(tmp_path, "b.safetensors", "a.safetensors"))
    assert [path.name for path in files] == ["a.safetensors", "b.safetensors"]
    digest = weights.check_hash(files, None)
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    assert weights.check_hash(files, None) != digest


@pytest.mark.parametrize("listed", ["gone.safetensors", "../out.safetensors", "a.bin"])
def test_an_index_lists_files_of_its_directory_only(tmp_path: Path, listed: str) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    for path in (tmp_path / "out.safetensors", inside / "a.bin"):
        path.write_bytes(b"x")
    (inside / weights.INDEX).write_text(json.dumps({"weight_map": {"w": listed}}))
    with pytest.raises(BackboneError, match="missing, or no safetensors file"):
        weights.in_directory(inside)
