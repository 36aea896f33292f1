"""Mask streams: ChaCha20 key streams read as integers, added to a vector modulo 2^32 or 2^64.

Guarantee: to whoever does not know the key, a stream is indistinguishable from uniform (ChaCha20,
RFC 8439, as a pseudo-random generator), and so is any vector it was added to. A key must serve
one vector only: the nonce is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

Vector = NDArray[np.unsignedinteger[Any]]
"""(length,) uint32 or uint64, contiguous."""

_CHUNK: Final = 1 << 17
"""Bytes done for all keys before the next; three such buffers stay in a processor's L2 cache."""
_ZEROS: Final = bytes(_CHUNK)  # its encryption is the key stream


def add_masks(vector: Vector, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Adds the streams of some keys and subtracts those of others, in place, wrapping around.

    Args:
        vector: (length,) uint32 or uint64, contiguous; value i takes bytes i * itemsize onwards of
            each stream, least significant first.
        plus: keys of 32 bytes.
        minus: keys of 32 bytes.
    """
    size = vector.dtype.itemsize
    buffer = bytearray(_CHUNK)
    stream = np.frombuffer(buffer, f"<u{size}")
    ways: list[tuple[np.ufunc, Any]] = [(np.add, _stream(key)) for key in plus]
    ways += [(np.subtract, _stream(key)) for key in minus]
    step = _CHUNK // size
    for start in range(0, len(vector), step):
        part = vector[start : start + step]
        zeros = memoryview(_ZEROS)[: part.nbytes]
        for operation, cipher in ways:
            cipher.update_into(zeros, buffer)
            operation(part, stream[: len(part)], out=part)


def key_stream(key: bytes, size: int) -> bytes:
    """The first bytes of a key's stream, as pseudo-random bytes for other uses of their own key."""
    stream: bytes = _stream(key).update(bytes(size))
    return stream


def _stream(key: bytes) -> Any:
    return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
