from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgraft_common.errors import MessageError
from fedgraft_common.messages import to_record
from fedgraft_common.packing import PACKAGE, STYPE, is_packed, pack, unpack

SHAPES = st.lists(st.integers(0, 4), max_size=3)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), SHAPES, min_size=1))
def test_what_was_packed_comes_out_in_the_same_bytes(shapes: dict[str, list[int]]) -> None:
    record = to_record({name: torch.randn(shape) for name, shape in shapes.items()})
    packed = pack(record)
    assert list(packed) == [PACKAGE]
    assert is_packed(packed)
    found = unpack(packed)
    assert list(found) == list(record)
    for name, array in record.items():
        assert found[name].data == array.data
        assert tuple(found[name].shape) == tuple(array.shape)
        assert (found[name].dtype, found[name].stype) == (array.dtype, array.stype)


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint8"])
def test_other_dtypes_survive(dtype: str) -> None:
    record = ArrayRecord({"sum": Array(np.arange(6, dtype=dtype).reshape(2, 3))})
    found = unpack(pack(record))["sum"]
    assert found.dtype == dtype
    assert np.array_equal(found.numpy(), record["sum"].numpy())


def test_an_empty_record_stays_empty() -> None:
    assert not pack(ArrayRecord())
    assert not is_packed(ArrayRecord())


def test_a_plain_record_is_not_taken_for_a_package() -> None:
    assert not is_packed(to_record({PACKAGE: torch.zeros(3)}))
    assert not is_packed(to_record({"a": torch.zeros(3)}))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_damage_is_one_error(content: bytes) -> None:
    record = ArrayRecord()
    record[PACKAGE] = Array("uint8", (len(content),), STYPE, content)
    with pytest.raises(MessageError, match="packed adapter"):
        unpack(record)


def test_a_cut_package_is_refused() -> None:
    packed = pack(to_record({"a": torch.ones(100)}))[PACKAGE].data
    record = ArrayRecord()
    record[PACKAGE] = Array("uint8", (10,), STYPE, packed[:-1])
    with pytest.raises(MessageError, match="allowed: tensors in safetensors' format"):
        unpack(record)
