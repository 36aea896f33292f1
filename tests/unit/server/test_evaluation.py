"""The interval around a released accuracy covers the truth as often as it says."""

from __future__ import annotations

import math

import numpy as np

from fedgraft_common.messages import Counts
from fedgraft_server.evaluation import estimate


def test_without_noise_it_is_the_binomial_interval() -> None:
    found = estimate(3, [Counts(40.0, 50.0), Counts(50.0, 50.0)], 1e-9)
    assert (found.round, found.sites, found.accuracy) == (3, 2, 0.9)
    half = 1.959964 * math.sqrt(0.9 * 0.1 / 100)
    assert math.isclose(found.high - 0.9, half, rel_tol=1e-5)
    assert math.isclose(0.9 - found.low, half, rel_tol=1e-5)


def test_the_interval_covers_the_truth() -> None:
    generator = np.random.default_rng(0)
    truth, sigma, sites, units = 0.85, 4.0, 16, 100
    inside = 0
    for _ in range(2000):
        correct = generator.binomial(units, truth, sites)
        noise = generator.normal(0, sigma * math.sqrt(2), (2, sites))
        counts = [
            Counts(float(c + a), float(units + b)) for c, a, b in zip(correct, *noise, strict=True)
        ]
        found = estimate(1, counts, sigma)
        inside += found.low <= truth <= found.high
    assert 0.93 <= inside / 2000 <= 0.97


def test_counts_that_drown_in_noise_say_nothing() -> None:
    found = estimate(1, [Counts(3.0, -2.0)], 8.0)
    assert math.isnan(found.accuracy)
    assert (found.low, found.high) == (0.0, 1.0)
    assert math.isnan(estimate(1, [], 8.0).accuracy)


def test_the_interval_stays_a_share() -> None:
    found = estimate(1, [Counts(101.0, 100.0)], 1.0)
    assert (found.accuracy, found.high) == (1.0, 1.0)
    assert 0.9 < found.low < 1
