"""Shamir's secret sharing against interpolation by hand and its own definition of secrecy."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft_common import shamir
from fedgraft_common.errors import MessageError, PrivacyError

SECRETS = st.binary(min_size=32, max_size=32)


def deal(secrets: list[bytes], threshold: int, holders: int, seed: int) -> list[bytes]:
    size = shamir.randomness_size(len(secrets), threshold)
    return shamir.split(secrets, threshold, holders, random.Random(seed).randbytes(size))  # noqa: S311


def share(blob: bytes, index: int) -> bytes:
    return blob[index * shamir.SHARE : (index + 1) * shamir.SHARE]


@given(st.lists(SECRETS, min_size=1, max_size=3), st.integers(1, 9), st.data())
def test_any_threshold_of_shares_gives_the_secret(
    secrets: list[bytes], n: int, data: st.DataObject
) -> None:
    t = data.draw(st.integers(1, n))
    dealt = deal(secrets, t, n, data.draw(st.integers(0, 99)))
    chosen = data.draw(st.permutations(range(n)))[:t]
    for index, secret in enumerate(secrets):
        own = [share(dealt[holder], index) for holder in chosen]
        assert shamir.combine(chosen, own) == secret
        for other in set(range(n)) - set(chosen):
            assert shamir.predict(chosen, own, other) == share(dealt[other], index)


@given(SECRETS, SECRETS, st.integers(2, 6), st.integers(0, 99))
def test_fewer_shares_fit_every_other_secret_as_well(
    secret: bytes, other: bytes, t: int, seed: int
) -> None:
    """For any t - 1 shares and any other secret there is randomness that gives those shares: they
    are equally likely under every secret, so they say nothing.
    """
    n = t + 2
    dealt = deal([secret], t, n, seed)
    for known in combinations(range(n), t - 1):
        xs = [0, *(holder + 1 for holder in known)]
        ys = [int.from_bytes(other), *(int.from_bytes(dealt[holder]) for holder in known)]
        coefficients = interpolate(xs, ys)  # lowest power first
        assert coefficients[0] == int.from_bytes(other)
        randomness = b"".join(a.to_bytes(48) for a in reversed(coefficients[1:]))
        again = shamir.split([other], t, n, randomness)
        assert [again[holder] for holder in known] == [dealt[holder] for holder in known]


def interpolate(xs: list[int], ys: list[int]) -> list[int]:
    """Coefficients by Gaussian elimination: slow and obvious."""
    p, n = shamir.PRIME, len(xs)
    rows = [[pow(x, j, p) for j in range(n)] + [y] for x, y in zip(xs, ys, strict=True)]
    for i in range(n):
        pivot = next(r for r in range(i, n) if rows[r][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        inverse = pow(rows[i][i], -1, p)
        rows[i] = [value * inverse % p for value in rows[i]]
        for r in range(n):
            if r != i:
                factor = rows[r][i]
                rows[r] = [(a - factor * b) % p for a, b in zip(rows[r], rows[i], strict=True)]
    return [row[n] for row in rows]


def test_the_field_is_one() -> None:
    """Miller-Rabin with 40 bases, and no smaller prime above 2^256."""

    def is_prime(n: int) -> bool:
        s, d = 0, n - 1
        while d % 2 == 0:
            s, d = s + 1, d // 2
        for base in range(2, 42):
            x = pow(base, d, n)
            if x not in (1, n - 1) and all((x := x * x % n) != n - 1 for _ in range(s - 1)):
                return False
        return True

    assert is_prime(shamir.PRIME)
    assert not any(is_prime(n) for n in range(2**256 + 1, shamir.PRIME))


def test_a_wrong_share_gives_another_secret_or_none() -> None:
    secret = bytes(range(32))
    dealt = deal([secret], 3, 4, 1)
    wrong = (int.from_bytes(dealt[1]) ^ 1).to_bytes(shamir.SHARE)
    assert shamir.combine([0, 1, 2], [dealt[0], wrong, dealt[2]]) != secret
    assert shamir.combine([0], [(2**256).to_bytes(shamir.SHARE)]) is None


@pytest.mark.parametrize(
    "share", [b"", bytes(32), bytes(34), shamir.PRIME.to_bytes(33), b"\xff" * 33]
)
def test_malformed_shares_are_refused(share: bytes) -> None:
    with pytest.raises(MessageError, match="share of a secret"):
        shamir.combine([0], [share])


@pytest.mark.parametrize(
    ("secrets", "threshold", "holders", "size"),
    [
        ([bytes(32)], 0, 3, 0),
        ([bytes(32)], 4, 3, 144),
        ([bytes(32)], 2, 3, 47),
        ([bytes(31)], 2, 3, 48),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    secrets: list[bytes], threshold: int, holders: int, size: int
) -> None:
    with pytest.raises(PrivacyError, match="secret sharing"):
        shamir.split(secrets, threshold, holders, bytes(size))
