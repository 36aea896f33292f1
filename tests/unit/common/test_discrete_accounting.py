from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from fedgraft_common.accounting import SamplingEvent, epsilon
from fedgraft_common.discrete_accounting import discrete_epsilon
from fedgraft_common.discrete_gaussian import DiscreteGaussian, sampler
from fedgraft_common.fixed_point import FixedPoint, fixed_point
from fedgraft_common.plan import Plan

SITES, DELTA = 16, 1e-5


def encoding(
    target: float, rate: float, dropouts: int = 2, colluders: int = 1, rounds: int = 60
) -> FixedPoint:
    changes = {
        "privacy.mechanism": "distributed",
        "privacy.epsilon": target,
        "privacy.tolerated_dropouts": dropouts,
        "privacy.tolerated_colluders": colluders,
        "training.sample_rate": rate,
        "training.expected_batch": 20,
        "aggregation.sites": SITES,
        "rounds.count": rounds,
    }
    return fixed_point(Plan().replace(changes), 1440)


@pytest.mark.parametrize(
    ("target", "rate", "dropouts", "colluders"),
    [(1.0, 0.5, 0, 1), (8.0, 0.5, 0, 0), (8.0, 0.5, 2, 3), (4.0, 0.25, 3, 3), (4.0, 1.0, 1, 1)],
)
def test_two_computations_of_epsilon(
    target: float, rate: float, dropouts: int, colluders: int
) -> None:
    """PLD of the continuous mechanism, as charged; PLD of the integers that are drawn."""
    found = encoding(target, rate, dropouts, colluders)
    decided = epsilon([SamplingEvent(rate, found.noise_multiplier, 60)], DELTA)
    honest = SITES - dropouts - colluders
    second = discrete_epsilon(found, honest, rate, 60, DELTA)
    assert decided <= target
    assert second == pytest.approx(decided, rel=0.01)


Share = Callable[[FixedPoint], DiscreteGaussian]


def _weak(field: FixedPoint) -> DiscreteGaussian:
    """Five percent too little noise."""
    return sampler(0.95 * _right(field).std)


def _of_all(field: FixedPoint) -> DiscreteGaussian:
    """A wrong h: the noise is spread over all sites, as if none could drop out or collude."""
    return sampler(_right(field).std * math.sqrt(field.shares / field.sites))


def _one_more(field: FixedPoint) -> DiscreteGaussian:
    """A wrong h, by one."""
    return sampler(_right(field).std * math.sqrt(field.shares / (field.shares + 1)))


def _right(field: FixedPoint) -> DiscreteGaussian:
    full = field.noise_multiplier * field.sensitivity * field.scale
    return sampler(math.sqrt((full**2 + 9) / field.shares))


@pytest.mark.parametrize("share", [_weak, _of_all, _one_more])
def test_it_catches_wrong_noise(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    found = encoding(8.0, 0.5)
    decided = epsilon([SamplingEvent(0.5, found.noise_multiplier, 60)], DELTA)
    assert found.share.std == _right(found).std
    monkeypatch.setattr(FixedPoint, "share", property(share))
    assert discrete_epsilon(found, SITES - 3, 0.5, 60, DELTA) > 1.02 * decided


def test_the_variance_is_that_of_the_samples() -> None:
    random = np.random.default_rng(0)
    for std in (6.0, 700.0, 5e6):
        drawn = DiscreteGaussian(std)
        assert math.sqrt(drawn.variance) == pytest.approx(std, rel=1e-9)
        values = drawn.sample(200_000, lambda n: random.integers(0, 2**64, n, dtype=np.uint64))
        assert values.std() == pytest.approx(math.sqrt(drawn.variance), rel=0.01)


@pytest.mark.parametrize("width", [500, 4000])
def test_the_width_of_the_grid_does_not_matter(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = encoding(8.0, 0.5)
    usual = discrete_epsilon(found, SITES - 3, 0.5, 60, DELTA)
    monkeypatch.setattr("fedgraft_common.discrete_accounting.WIDTH", width)
    assert discrete_epsilon(found, SITES - 3, 0.5, 60, DELTA) == pytest.approx(usual, rel=1e-4)
