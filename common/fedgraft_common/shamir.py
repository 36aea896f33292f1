"""Shamir's secret sharing of 32-byte secrets over a prime field.

Guarantee: any `threshold` shares give the secret; fewer say nothing about it, whatever else their
holders know (information-theoretic), if the randomness is uniform and never used again. Shares
carry no proof of themselves: who combines them must be able to recognise the secret.

Source: Shamir, "How to share a secret", 1979. Holder number i (from 0) has the value at x = i + 1
of a polynomial of degree threshold - 1 whose value at 0 is the secret.

The maintained libraries share 16 bytes, or are not for Python; hence these few lines. Python's
integers do not take constant time: whoever measures a site from inside is outside the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from fedgraft_common.errors import MessageError, PrivacyError

PRIME: Final = 2**256 + 297
"""The smallest prime above 2^256, so that every 32-byte secret is an element of the field."""
SECRET: Final = 32  # bytes
SHARE: Final = 33
"""Bytes of a share, most significant first."""
_DRAW: Final = 48  # random bytes for a coefficient; 384 bits mod a 257-bit prime: bias below 2^-126


def randomness_size(secrets: int, threshold: int) -> int:
    """Bytes of uniform randomness that `split` consumes."""
    return secrets * (threshold - 1) * _DRAW


def split(secrets: Sequence[bytes], threshold: int, holders: int, randomness: bytes) -> list[bytes]:
    """Shares several secrets among the same holders.

    Args:
        secrets: 32 bytes each.
        threshold: shares that are needed, 1 to `holders`.
        holders: how many get a share.
        randomness: `randomness_size(len(secrets), threshold)` uniform bytes, never used elsewhere.

    Returns:
        For each holder, his shares of all secrets one after the other, 33 bytes each.

    Raises:
        PrivacyError: an argument does not fit.
    """
    size = randomness_size(len(secrets), threshold)
    if not 1 <= threshold <= holders or len(randomness) != size:
        raise PrivacyError(
            "secret sharing", f"threshold {threshold} of {holders}, {len(randomness)} random bytes",
            f"a threshold from 1 to the number of holders, and {size} bytes",
            "This is a fault of the program.",
        )  # fmt: skip
    if any(len(secret) != SECRET for secret in secrets):
        raise PrivacyError(
            "secret sharing", sorted({len(s) for s in secrets}), f"secrets of {SECRET} bytes",
            "This is a fault of the program.",
        )  # fmt: skip
    shares: list[list[bytes]] = [[] for _ in range(holders)]
    position = 0
    for secret in secrets:
        polynomial = []  # highest power first
        for _ in range(threshold - 1):
            draw = randomness[position : position + _DRAW]
            polynomial.append(int.from_bytes(draw) % PRIME)
            position += _DRAW
        polynomial.append(int.from_bytes(secret))
        for holder, own in enumerate(shares):
            x, value = holder + 1, 0
            for coefficient in polynomial:  # reduced once, at the end: x is small
                value = value * x + coefficient
            own.append((value % PRIME).to_bytes(SHARE))
    return [b"".join(own) for own in shares]


def combine(holders: Sequence[int], shares: Sequence[bytes]) -> bytes | None:
    """The secret at 0 of the polynomial through exactly these shares.

    Args:
        holders: different numbers from 0, as many as the threshold.
        shares: of one secret, in the same order.

    Returns:
        32 bytes; None if the value is no 32-byte secret, so that some share is wrong.

    Raises:
        MessageError: a share is no element of the field.
    """
    value = evaluate(holders, shares, 0)
    return value.to_bytes(SECRET) if value < 1 << (8 * SECRET) else None


def predict(holders: Sequence[int], shares: Sequence[bytes], other: int) -> bytes:
    """The share of another holder, from as many shares as the threshold.

    Raises:
        MessageError: a share is no element of the field.
    """
    return evaluate(holders, shares, other + 1).to_bytes(SHARE)


def evaluate(holders: Sequence[int], shares: Sequence[bytes], x: int) -> int:
    """Lagrange interpolation at x.

    Raises:
        MessageError: a share is no element of the field.
    """
    weights = _weights(tuple(holder + 1 for holder in holders), x)
    total = 0
    for weight, share in zip(weights, shares, strict=True):
        total += weight * parse(share)
    return total % PRIME


def parse(share: bytes) -> int:
    """A share as an element of the field.

    Raises:
        MessageError: wrong length, or not below the prime.
    """
    value = int.from_bytes(share)
    if len(share) != SHARE or value >= PRIME:
        raise MessageError(
            "share of a secret", f"{len(share)} bytes", f"{SHARE} bytes, a number below the prime",
            "The message is malformed and was ignored.",
        )  # fmt: skip
    return value


@lru_cache(maxsize=64)
def _weights(points: tuple[int, ...], x: int) -> tuple[int, ...]:
    """Lagrange's basis polynomials of these points, at x."""
    weights = []
    for i, point in enumerate(points):
        above, below = 1, 1
        for other in points[:i] + points[i + 1 :]:
            above = above * (x - other) % PRIME
            below = below * (point - other) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
