"""T1 and T1b against the golden values of PRIVACY.md and a slow oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull
from scipy.special import expit, ndtri
from scipy.stats import binom

from fedgraft_simulations.audit.certificate import (
    CEILING,
    Guesses,
    best_share,
    certificate,
    gaussian_certificate,
    gaussian_excess,
    guesses,
    p_value,
)


def test_golden_t1() -> None:
    assert certificate(Guesses(1000, 100, 75), 1e-4) == pytest.approx(0.67298, abs=5e-6)
    assert certificate(Guesses(100_000, 1510, 1439), 1e-5) == pytest.approx(2.67585, abs=5e-6)


def every_threshold(shift: float) -> list[Guesses]:
    """IN-only guesses at each corner of the ROC curve of PRIVACY.md's scores.

    PRIVACY.md says "all distinct scores"; its figures count the corners of the curve's convex hull,
    which is where thresholds of jax_privacy are, and are reproduced to the last digit that way.
    """
    size = 10_000
    outside = ndtri((np.arange(size) + 0.5) / size)
    inside = outside + shift
    thresholds = np.r_[np.union1d(outside, inside), np.inf]
    hits = np.asarray(size - np.searchsorted(inside, thresholds))
    alarms = np.asarray(size - np.searchsorted(outside, thresholds))
    corners = ConvexHull(np.stack([alarms, hits], axis=1).astype(float)).vertices
    upper = [i for i in corners if hits[i] >= alarms[i]]
    return [Guesses(2 * size, int(hits[i] + alarms[i]), int(hits[i])) for i in upper]


def worth_a_look(found: list[Guesses]) -> list[Guesses]:
    """Those better than chance, the most precise first."""
    better = [one for one in found if 2 * one.right > one.made]
    limit = [binom.sf(one.right - 1, one.made, 0.5) for one in better]
    return [better[i] for i in np.argsort(limit)]


@pytest.mark.parametrize(("shift", "golden"), [(1, 1.133460), (2, 2.311945), (4, 4.395568)])
def test_golden_sweep_t1(shift: float, golden: float) -> None:
    found = every_threshold(shift)
    significance, delta, best = 0.05 / len(found), 1e-6, 0.0
    for one in worth_a_look(found):
        if p_value(one, best, 0.0) >= significance:  # cheap, and sufficient
            continue
        if p_value(one, best, delta) < significance:
            best = certificate(one, delta, significance)
    assert best == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize(("shift", "golden"), [(1, 2.164749), (2, 4.721807), (4, 9.133752)])
def test_golden_sweep_t1b(shift: float, golden: float) -> None:
    found = every_threshold(shift)
    significance, delta, best = 0.05 / len(found), 1e-6, 0.0
    for one in worth_a_look(found):
        if gaussian_excess(one, best, delta, significance) > 0:
            best = gaussian_certificate(one, delta, significance)
    assert best == pytest.approx(golden, abs=1e-6)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_p_value_against_sums_over_outcomes(data: st.DataObject) -> None:
    made = data.draw(st.integers(1, 30))
    right = data.draw(st.integers(0, made))
    epsilon = data.draw(st.floats(0, 4))
    delta = data.draw(st.sampled_from([0.0, 1e-6, 1e-3]))
    chance = expit(epsilon)
    beyond = sum(binom.pmf(k, made, chance) for k in range(right, made + 1))
    windows = [
        sum(binom.pmf(k, made, chance) for k in range(right - i, right)) / i
        for i in range(1, right + 1)
    ]
    expected = min(1.0, beyond + 2 * 50 * delta * max(windows, default=0.0))
    assert p_value(Guesses(50, made, right), epsilon, delta) == pytest.approx(expected, abs=1e-9)


def test_guessing_shows_nothing_and_certainty_is_bounded() -> None:
    assert certificate(Guesses(100, 100, 50), 1e-5) == 0.0
    assert gaussian_certificate(Guesses(100, 100, 50), 1e-5) == 0.0
    assert certificate(Guesses(1, 0, 0), 1e-5) == 0.0
    sure = certificate(Guesses(1000, 1000, 1000), 0.0)
    assert 5 < sure < CEILING
    assert certificate(Guesses(1000, 1000, 1000), 1e-5) < sure


def test_guesses_count_both_ends() -> None:
    scores = np.array([3.0, 2.0, 1.0, 0.0])
    included = np.array([True, False, True, False])
    assert guesses(scores, included, 0.25) == Guesses(4, 2, 2)
    assert guesses(scores, included, 0.5) == Guesses(4, 4, 2)


def test_best_share_is_small_where_only_the_tails_tell() -> None:
    random = np.random.default_rng(0)
    scores = random.normal(size=2000)
    included = random.random(2000) < 0.5
    scores[included] += np.where(random.random(included.sum()) < 0.1, 10.0, 0.0)
    scores[~included] -= np.where(random.random((~included).sum()) < 0.1, 10.0, 0.0)
    assert best_share(scores, included) < 0.1
