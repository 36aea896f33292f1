"""Curves and their confidence: against scikit-learn, by hand, and over many null audits."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from fedgraft_common.accounting import SamplingEvent
from fedgraft_simulations.audit.ceiling import ceiling
from fedgraft_simulations.audit.roc import against_ceiling, clopper_pearson, draw, facts, roc_of


def gaussian_attack(mu: float, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The best attack on a mu-Gaussian mechanism."""
    random = np.random.default_rng(seed)
    members = np.arange(2 * count) < count
    return random.normal(size=2 * count) + mu * members, members


def test_points_by_hand() -> None:
    members = np.array([True] * 4 + [False] * 100)
    scores = np.concatenate([[5.0, 4.0, 1.5, -1.0], np.linspace(0, 2, 100)])
    found = {point.rate: point for point in roc_of("x", scores, members).points}
    assert (found[0.001].hits, found[0.001].alarms) == (2, 0)
    assert (found[0.01].hits, found[0.01].alarms) == (2, 1)
    assert (found[0.1].hits, found[0.1].alarms) == (2, 10)
    assert found[0.1].true_positives == 0.5


def test_ties_are_never_split_in_the_attackers_favour() -> None:
    members = np.array([True] * 50 + [False] * 50)
    for point in roc_of("x", np.zeros(100), members).points:
        assert (point.hits, point.alarms) == (0, 0)


def test_the_area_of_a_known_attack() -> None:
    scores, members = gaussian_attack(1.0, 20_000, 0)
    assert roc_of("x", scores, members).auc == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=0.005)


def test_clopper_pearson_golden() -> None:
    """0 of n at 95 %: 1 - (alpha / 2)^(1 / n)."""
    assert clopper_pearson(0, 100, 0.95) == pytest.approx((0.0, 1 - 0.025**0.01))
    assert clopper_pearson(100, 100, 0.95) == pytest.approx((0.025**0.01, 1.0))


EVENT = SamplingEvent(1.0, 2.0, 4)  # one Gaussian with sigma 1: mu = 1


def test_an_attacker_at_the_ceiling_is_not_called_a_breach() -> None:
    """60 null audits with the best possible attacker: fewer false alarms than promised."""
    alarms = 0
    for seed in range(60):
        scores, members = gaussian_attack(1.0, 1000, seed)
        curves = [roc_of("x", scores, members)]
        alarms += any(excess.above for excess in against_ceiling(curves, [EVENT]))
    assert alarms <= 5


def test_an_attacker_above_it_is() -> None:
    """Half the noise: mu = 2."""
    scores, members = gaussian_attack(2.0, 1000, 0)
    excesses = against_ceiling([roc_of("x", scores, members)], [EVENT])
    assert any(excess.above for excess in excesses)
    for excess in excesses:
        assert excess.lower <= excess.point.true_positives
        assert excess.allowed >= ceiling([EVENT], np.array([excess.point.rate]))[0]


def test_more_curves_need_more_evidence() -> None:
    scores, members = gaussian_attack(2.0, 1000, 0)
    curve = roc_of("x", scores, members)
    alone = against_ceiling([curve], [EVENT])[1]
    among = against_ceiling([curve] * 20, [EVENT])[1]
    assert among.lower < alone.lower
    assert among.allowed > alone.allowed


def test_without_dp_nothing_is_above() -> None:
    members = np.arange(200) < 100
    curves = [roc_of("x", members.astype(float), members)]
    assert not any(excess.above for excess in against_ceiling(curves, []))


def test_the_picture_is_the_same_every_time() -> None:
    scores, members = gaussian_attack(1.0, 300, 0)
    curve = roc_of("x", scores, members)
    first, second = (draw([curve], [EVENT], "ceiling") for _ in range(2))
    assert first == second
    assert first.startswith(b"\x89PNG")
    assert draw([curve], [], "") != first


def test_facts_are_plain_numbers() -> None:
    import json

    scores, members = gaussian_attack(1.0, 300, 0)
    document = facts(roc_of("x", scores, members))
    assert json.loads(json.dumps(document, allow_nan=False)) == document
