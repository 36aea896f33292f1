from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from fedgraft_common.errors import CheckpointError
from fedgraft_common.files import load_tensors, save_tensors, write_atomically

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2.5), "c": torch.ones(0, 4)}
FACTS = {"round": "3", "plan": "f" * 64}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("files") / "whole.safetensors"
    save_tensors(path, TENSORS, FACTS, durable=False)
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "scratch.safetensors"


@pytest.mark.parametrize("durable", [True, False])
def test_round_trip(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "new" / "directory" / "x.safetensors"
    save_tensors(path, TENSORS, FACTS, durable)
    tensors, metadata = load_tensors(path)
    assert metadata == FACTS
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]


shapes = st.lists(st.integers(0, 4), max_size=3)


@given(
    st.dictionaries(st.text(min_size=1, max_size=8), shapes, max_size=4),
    st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=4),
)
def test_round_trip_of_anything(
    scratch: Path, sizes: dict[str, list[int]], facts: dict[str, str]
) -> None:
    sizes.pop("__metadata__", None)
    facts.pop("sha256", None)
    tensors = {name: torch.randn(shape) for name, shape in sizes.items()}
    save_tensors(scratch, tensors, facts, durable=False)
    again, metadata = load_tensors(scratch)
    assert metadata == facts
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], value) for name, value in tensors.items())


@given(data=st.data(), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_refused(
    whole: bytes, scratch: Path, data: st.DataObject, bit: int
) -> None:
    position = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[position] ^= 1 << bit
    scratch.write_bytes(damaged)
    with pytest.raises(CheckpointError) as caught:
        load_tensors(scratch)
    assert caught.value.field == str(scratch)
    assert "delete it" in caught.value.action


@given(data=st.data())
def test_truncated(whole: bytes, scratch: Path, data: st.DataObject) -> None:
    scratch.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError):
        load_tensors(scratch)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_tensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "tampering", [{"round": "4"}, {"more": "x"}, {"plan": ""}, {"sha256": "0" * 64}]
)
def test_changed_metadata(whole: bytes, scratch: Path, tampering: dict[str, str]) -> None:
    scratch.write_bytes(whole)
    with safe_open(scratch, framework="pt") as file:
        facts = dict(file.metadata() or {})
    save_file(TENSORS, scratch, metadata=facts | tampering)
    with pytest.raises(CheckpointError, match="does not match its SHA-256"):
        load_tensors(scratch)


def test_changed_name_or_type(whole: bytes, scratch: Path) -> None:
    scratch.write_bytes(whole)
    with safe_open(scratch, framework="pt") as file:
        facts = dict(file.metadata() or {})
    for tensors in (
        {"z" if name == "a" else name: value for name, value in TENSORS.items()},
        TENSORS | {"a": TENSORS["a"].view(torch.int32)},
        TENSORS | {"a": TENSORS["a"].reshape(3, 2)},
    ):
        save_file(tensors, scratch, metadata=facts)
        with pytest.raises(CheckpointError, match="does not match its SHA-256"):
            load_tensors(scratch)


def test_file_without_a_digest(scratch: Path) -> None:
    save_file(TENSORS, scratch)
    with pytest.raises(CheckpointError):
        load_tensors(scratch)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "x"
    write_atomically(path, b"old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if broken == "fsync" else Path, broken, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == [
        "x"
    ]  # no rubbish beside it on a full disk
