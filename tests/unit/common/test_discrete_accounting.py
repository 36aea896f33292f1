from __future__ import annotations

import math

import pytest

from fedgraft_common.accounting import SamplingEvent, epsilon
from fedgraft_common.discrete_accounting import discrete_epsilon
from fedgraft_common.fixed_point import FixedPoint, fixed_point
from fedgraft_common.plan import Plan


def encoding(target: float, rate: float, rounds: int = 60) -> FixedPoint:
    changes = {
        "privacy.mechanism": "distributed",
        "privacy.epsilon": target,
        "training.sample_rate": rate,
        "training.expected_batch": 20,
        "aggregation.sites": 16,
        "rounds.count": rounds,
    }
    return fixed_point(Plan().replace(changes), 1440)


@pytest.mark.parametrize(("target", "rate"), [(1.0, 0.5), (8.0, 0.5), (4.0, 0.25), (4.0, 1.0)])
def test_two_computations_of_epsilon(target: float, rate: float) -> None:
    """PLD through the continuous mechanism; Rényi moments of the discrete one, a looser bound."""
    found = encoding(target, rate)
    decided = epsilon([SamplingEvent(rate, found.noise_multiplier, 60)], 1e-5)
    second = discrete_epsilon(found, rate, 60, 1e-5)
    assert decided <= target
    assert decided < second < 1.25 * decided
    opacus = epsilon([SamplingEvent(rate, found.ratio, 60)], 1e-5, "rdp")
    assert second == pytest.approx(opacus, rel=0.03)  # which also tries fractional orders


def moment(std: float, sensitivity: int, rate: float, order: int) -> float:
    """E_Q[((1 - q) + q P / Q)^a] by adding up every integer that matters."""
    reach = int(order * sensitivity + 14 * std)
    points = range(-reach, reach + 1)
    weights = [math.exp(-(y**2) / (2 * std**2)) for y in points]
    whole = math.fsum(weights)
    return math.fsum(
        w / whole
        * (1 - rate + rate * math.exp((2 * y * sensitivity - sensitivity**2) / (2 * std**2)))
        ** order
        for y, w in zip(points, weights, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize(("std", "sensitivity"), [(0.7, 1), (2.0, 1), (5.0, 7), (40.0, 13)])
@pytest.mark.parametrize("order", [2, 3, 5])
@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_the_moments_are_those_of_the_sampled_gaussian(
    std: float, sensitivity: int, order: int, rate: float
) -> None:
    """The identity in the docstring, at integer shifts even for very little noise."""
    ratio = std / sensitivity
    formula = math.fsum(
        math.comb(order, k) * (1 - rate) ** (order - k) * rate**k
        * math.exp((k * k - k) / (2 * ratio**2))
        for k in range(order + 1)
    )  # fmt: skip
    assert moment(std, sensitivity, rate, order) == pytest.approx(formula, rel=1e-9)


def test_the_librarys_discrete_gaussian_agrees_with_the_continuous() -> None:
    """dp_accounting's PLD of N_Z along one coordinate: a third computation of the same epsilon."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    found = encoding(8.0, 0.5)
    sensitivity = 200
    one = pld.from_discrete_gaussian_mechanism(
        found.noise_multiplier * sensitivity, sensitivity=sensitivity, sampling_prob=0.5
    )
    discrete = one.self_compose(60).get_epsilon_for_delta(1e-5)
    continuous = epsilon([SamplingEvent(0.5, found.noise_multiplier, 60)], 1e-5)
    assert discrete == pytest.approx(continuous, rel=0.002)
