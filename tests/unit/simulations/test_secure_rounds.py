"""Many sites in one process: absences, restarts from nothing, what an auditor gets."""

from __future__ import annotations

import datetime as dt
import hashlib

import numpy as np
import pytest

from fedgraft_common.errors import AggregationError
from fedgraft_common.secure_messages import Terms
from fedgraft_common.secure_transcript import check_transcript
from fedgraft_simulations.benchmarks import secure_aggregation
from fedgraft_simulations.secure_rounds import SecureRounds, Step
from fedgraft_simulations.throwaway_keys import throwaway_keys

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
NAMES = [f"site-{i:02d}" for i in range(20)]
KEYS, TRUST = throwaway_keys(NAMES, NOW)
TERMS = Terms(bytes(32), bytes(16), 1, 4, 10, 32, 20, 3, 2)


def secret(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def inputs(source: int) -> dict[str, np.ndarray[tuple[int], np.dtype[np.uint32]]]:
    values = np.random.default_rng(source)
    return {name: values.integers(0, 2**32, 10, dtype=np.uint32) for name in NAMES}


def test_twenty_sites_with_other_ones_missing_in_every_round() -> None:
    rounds = SecureRounds(TERMS, KEYS, TRUST, secret)
    for number in range(1, 5):
        missing = NAMES[3 * number : 3 * number + 3]
        absent = dict(zip(missing, (Step.MASK, Step.UNMASK, Step.MASK), strict=True))
        values = inputs(number)
        rounds.restart(missing[0])
        total = rounds.sum(number, values, b"", absent)
        there = [name for name in NAMES if absent.get(name) is not Step.MASK]
        assert total.survivors == tuple(there)
        expected = np.sum([values[name] for name in there], axis=0, dtype=np.uint32)
        assert total.values.tolist() == expected.tolist()
    assert check_transcript(rounds.transcript(), TRUST) == []


def test_a_round_with_too_few_sites_is_aborted_and_the_next_goes_on() -> None:
    rounds = SecureRounds(TERMS, KEYS, TRUST, secret)
    for step, number in ((Step.MASK, 1), (Step.UNMASK, 2)):
        with pytest.raises(AggregationError, match=f"round {number}"):
            rounds.sum(number, inputs(0), b"", dict.fromkeys(NAMES[:4], step))
    assert rounds.sum(3, inputs(0)).survivors == tuple(NAMES)


def test_the_benchmark_checks_its_sums_and_counts_bytes() -> None:
    """Its timings are not tested."""
    report = secure_aggregation.measure(repetitions=1, sites=6, length=20)
    assert [ratio.slow.seconds != () for ratio in report.ratios] == [True] * 4
    sent = report.figures["a round, a site sends beyond its vector, kB"]
    assert 6 * 33 / 1e3 < sent < 0.6
