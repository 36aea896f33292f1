"""Membership scores where the truth is known: a planted leak is found, and nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from fedgraft_simulations.audit.inference import (
    Members,
    Scores,
    attack_p,
    attack_r,
    lira,
    logit,
    rmia,
)

N, R = 2000, 64
Attack = Callable[[Scores, Scores, Members], Scores]
ATTACKS: dict[str, Attack] = {
    "P": lambda target, reference, had: attack_p(target),
    "R": attack_r,
    "RMIA": rmia,
    "LiRA": lira,
}


def world(gap: float, seed: int = 0) -> tuple[Scores, Scores, Members, Members]:
    """Models whose logits are a record's difficulty, plus `gap` if trained on it, plus noise."""
    random = np.random.default_rng(seed)
    difficulty = random.normal(0, 3, N)
    had = random.random((R + 1, N)) < 0.5
    logits = difficulty + gap * had + random.normal(0, 1, (R + 1, N))
    confidence = -np.logaddexp(0, -logits)
    return confidence[0], confidence[1:], had[1:], had[0]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_leak_is_found(attack: str) -> None:
    target, reference, had, members = world(gap=2.0)
    assert roc_auc_score(members, ATTACKS[attack](target, reference, had)) > 0.62


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_found_where_nothing_is(attack: str) -> None:
    """2,000 coin flips: the area's standard deviation is 0.013."""
    target, reference, had, members = world(gap=0.0)
    assert abs(roc_auc_score(members, ATTACKS[attack](target, reference, had)) - 0.5) < 0.045


def test_reference_models_take_difficulty_out() -> None:
    """LiRA is near the best test, N(2, 1) against N(0, 1); the model alone is far from it."""
    target, reference, had, members = world(gap=2.0)
    best = norm.cdf(2 / np.sqrt(2))
    assert roc_auc_score(members, lira(target, reference, had)) > best - 0.02
    assert roc_auc_score(members, rmia(target, reference, had)) > 0.75
    assert roc_auc_score(members, attack_r(target, reference, had)) > best - 0.05
    assert roc_auc_score(members, attack_p(target)) < 0.75


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_reference_models_are_enough_for_rmia(count: int) -> None:
    target, reference, had, members = world(gap=2.0)
    few = rmia(target, reference[:count], had[:count])
    assert roc_auc_score(members, few) > roc_auc_score(members, attack_p(target)) + 0.02


@pytest.mark.parametrize("attack", ["R", "RMIA", "LiRA"])
def test_a_record_that_every_reference_model_had_decides_nothing_alone(attack: str) -> None:
    target, reference, had, _ = world(gap=2.0)
    had[:, 0] = True
    found = ATTACKS[attack](target, reference, had)
    assert np.isfinite(found).all()
    expected = {"R": 0.5, "LiRA": 0.0}
    if attack in expected:
        assert found[0] == expected[attack]


def test_attack_r_counts_models_that_are_less_sure() -> None:
    target = np.log(np.array([0.5, 0.5, 0.5]))
    reference = np.log(np.array([[0.4, 0.6, 0.5], [0.3, 0.4, 0.5]]))
    had = np.array([[False, False, False], [False, True, False]])
    assert attack_r(target, reference, had).tolist() == [1.0, 0.0, 0.5]


def test_rmia_by_hand() -> None:
    """Ratios 0.9 / 0.74 and 0.5 / 0.74 with p_out = 0.6: ((1 + .3) .6 + 1 - .3) / 2 = 0.74."""
    target, reference = np.log(np.array([0.9, 0.5])), np.log(np.array([[0.6, 0.6]]))
    had = np.zeros((1, 2), dtype=bool)
    assert rmia(target, reference, had).tolist() == [1.0, 0.5]
    assert rmia(target, reference, had, population=np.array([0])).tolist() == [1.0, 0.0]


def test_logits_of_certainty_are_finite() -> None:
    found = logit(np.array([0.0, -1e-300, -800.0, np.log(0.5)]))
    assert np.isfinite(found).all()
    assert found[0] > 30
    assert found[2] < -30
    assert found[3] == pytest.approx(0.0)
