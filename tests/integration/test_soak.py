"""Two thousand rounds of a real federation: nothing grows but what is kept on purpose."""

from __future__ import annotations

import pytest

from fedgraft_simulations.benchmarks.soak import MIB, PURPOSE, growth, watch

ROUNDS = 2000


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_two_thousand_rounds() -> None:
    samples = watch(ROUNDS)
    assert samples[-1].round >= 0.95 * ROUNDS
    for name, bytes_grown in growth(samples, "memory"):
        assert bytes_grown < 4 * MIB, (name, bytes_grown, samples)
    for what in ("handles", "threads"):
        for name, grown in growth(samples, what):
            assert grown < 2, (what, name, grown, samples)
    for kind, bytes_grown in growth(samples, "disk"):
        if kind not in PURPOSE:
            assert bytes_grown < 100_000, (kind, bytes_grown, samples)
