"""T2's statistics, and T2 itself through the production optimiser."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest

from fedgraft_client.prefix import Cached
from fedgraft_client.randomness import NoiseSource
from fedgraft_simulations.audit.gaussian_bound import (
    clopper_pearson_upper,
    gaussian_bound,
    gaussian_epsilon,
    gaussian_mu,
    suggested_mu,
)
from fedgraft_simulations.audit.probe import SUMMED, Canaries, Place, Probe, ProbedOptimizer

TRUE = 6.449  # PLD of (q 0.25, sigma 2, T 100) at delta 1e-5, PRIVACY.md


def test_golden_gaussian() -> None:
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.377178, abs=5e-7)
    assert 1 / gaussian_mu(1.0, 1e-5) == pytest.approx(3.730632, abs=5e-7)


@pytest.mark.parametrize("mu", [1e-3, 0.1, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_epsilon_and_mu_are_inverse(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    if epsilon > 0:
        assert gaussian_mu(epsilon, delta) == pytest.approx(mu, rel=1e-6)
    else:  # delta alone covers so small a mu
        assert gaussian_mu(0.0, delta) >= mu


@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_clopper_pearson_against_scipy(count: int) -> None:
    interval = binomtest(count, 20).proportion_ci(0.9, method="exact")
    found = clopper_pearson_upper(np.array([count]), 20, 0.05)[0]
    assert found == pytest.approx(interval.high)


def test_scores_that_show_nothing_give_zero() -> None:
    random = np.random.default_rng(0)
    scores, included = random.normal(size=2000), random.random(2000) < 0.5
    bound = gaussian_bound(scores, included, np.arange(2000) % 2 == 0, 1e-5)
    assert bound.epsilon == 0.0
    assert bound.canaries == 1000


def test_the_bound_holds_and_comes_close_on_a_gaussian() -> None:
    random = np.random.default_rng(1)
    wrong, bounds = 0, []
    for _ in range(100):
        included = random.random(2000) < 0.5
        scores = random.normal(size=2000) + 1.0 * included
        bound = gaussian_bound(scores, included, random.random(2000) < 0.5, 1e-5)
        wrong += bound.mu > 1.0
        bounds.append(bound.mu)
    assert wrong <= 5
    assert np.mean(bounds) > 0.7


def test_suggested_mu_of_gaussians_and_of_scores_without_overlap() -> None:
    random = np.random.default_rng(2)
    included = np.arange(20_000) % 2 == 0
    scores = random.normal(size=20_000) + 1.5 * included
    assert suggested_mu(scores, included) == pytest.approx(1.5, abs=0.05)
    assert 4 < suggested_mu(included.astype(float), included) < 10
    assert suggested_mu(scores, np.ones(20_000, bool)) == 0.0


def run_optimizer(canaries: int, noise: float, seed: int) -> tuple[NDArray[np.float64], Canaries]:
    """The scores of T2 at (q 0.25, sigma 2, T 100), with the noise at a fraction of its strength.

    One record with a gradient of zero, and the canaries, go through the production optimiser.
    """
    random = np.random.default_rng(seed)
    planted = Canaries(
        np.arange(canaries), np.full(canaries, SUMMED), np.zeros(canaries, np.int64),
        random.random(canaries) < 0.5,
    )  # fmt: skip
    probe = Probe(planted, 1.0, 1, 1, np.zeros(canaries, np.int64))
    place = Place(probe, 0, 1, probe.held_by(0), 1, None)
    weights = torch.nn.Parameter(torch.zeros(canaries))
    source = NoiseSource.for_simulation("T2", seed)
    cached, labels = (
        place.mark((torch.zeros(1, 1),)),
        place.extend(torch.zeros(1, dtype=torch.int64)),
    )

    class Flat:
        name = "flat"

        def __call__(self, cached: Cached, labels: torch.Tensor) -> None:
            weights.grad_sample = torch.zeros(len(labels), canaries)  # type: ignore[attr-defined]

        def close(self) -> None:
            """Nothing to close."""

    total = torch.zeros(canaries, dtype=torch.float64)
    group = {"params": [weights], "lr": 0.0, "noise_std": 2.0 * noise}
    joint = ProbedOptimizer(place, torch.optim.SGD([group]), 1.0, source)
    for _ in range(100):
        batch = torch.from_numpy(source.poisson_sample(len(labels), 0.25))
        joint.noisy_sum(Flat(), tuple(t[batch] for t in cached), labels[batch], 256)
        assert weights.grad is not None
        total += weights.grad.double()
    return total.numpy(), planted


def bound_at(canaries: int, noise: float, seed: int) -> float:
    scores, planted = run_optimizer(canaries, noise, seed)
    choosing = np.random.default_rng(1000 + seed).random(canaries) < 0.5  # not the coins
    return gaussian_bound(scores, planted.included, choosing, 1e-5).epsilon


def test_t2_on_the_correct_mechanism_stays_below_and_comes_close() -> None:
    bounds = [bound_at(5000, 1.0, seed) for seed in range(3)]
    assert max(bounds) <= TRUE
    assert np.median(bounds) > TRUE / 2


def test_t2_notices_noise_at_half_strength() -> None:
    assert min(bound_at(1000, 0.5, seed) for seed in range(5)) > TRUE


def test_t2_notices_that_noise_is_missing() -> None:
    bound = bound_at(1000, 0.0, 0)
    assert TRUE < bound < math.inf
