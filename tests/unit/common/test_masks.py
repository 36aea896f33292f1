"""Mask streams against one long ChaCha20 encryption and plain sums."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgraft_common.masks import add_masks, key_stream


def stream(key: bytes, length: int, bits: int) -> list[int]:
    """One encryption of zeros, read as integers one by one."""
    cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    size = bits // 8
    content = cipher.update(bytes(length * size))
    return [int.from_bytes(content[i : i + size], "little") for i in range(0, len(content), size)]


def key(number: int) -> bytes:
    return bytes([number]) * 32


@given(
    st.integers(0, 70), st.sampled_from([32, 64]), st.lists(st.integers(0, 9), max_size=4),
    st.lists(st.integers(10, 19), max_size=4),
)  # fmt: skip
def test_against_sums_of_python_integers(
    length: int, bits: int, plus: list[int], minus: list[int]
) -> None:
    start = np.arange(length).astype(f"uint{bits}") * 2**27
    expected = [int(value) for value in start]
    for keys, sign in ((plus, 1), (minus, -1)):
        for number in keys:
            expected = [
                (value + sign * mask) % 2**bits
                for value, mask in zip(expected, stream(key(number), length, bits), strict=True)
            ]
    vector = start.copy()
    add_masks(vector, [key(i) for i in plus], [key(i) for i in minus])
    assert vector.tolist() == expected


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("length", [16383, 16384, 16385, 32768, 32769, 100_001])
def test_a_stream_goes_on_across_chunks(length: int, bits: int) -> None:
    vector = np.zeros(length, f"uint{bits}")
    add_masks(vector, [key(1)], [])
    assert vector.tobytes() == key_stream(key(1), length * bits // 8)


@settings(max_examples=20)
@given(st.integers(1, 40_000))
def test_what_is_added_can_be_subtracted(length: int) -> None:
    vector = np.full(length, 7, np.uint32)
    add_masks(vector, [key(1), key(2)], [key(3)])
    assert (vector != 7).any()
    add_masks(vector, [key(3)], [key(2), key(1)])
    assert (vector == 7).all()
