from __future__ import annotations

import numpy as np
import pytest

from fedgraft_client.randomness import NoiseSource
from fedgraft_simulations.audit.probe import Drawn
from fedgraft_simulations.audit.sampling import ALARM, batches_of, check_sampling


def poisson(sizes: list[int], rates: list[float], rounds: int, seed: int) -> list[Drawn]:
    source = NoiseSource.for_simulation("sampling", seed)
    return [
        Drawn(site, number, source.poisson_sample(size, rate), size)
        for number in range(1, rounds + 1)
        for site, (size, rate) in enumerate(zip(sizes, rates, strict=True))
    ]


def shuffled(size: int, batch: int, rounds: int) -> list[Drawn]:
    random = np.random.default_rng(0)
    deck: list[int] = []
    found = []
    for number in range(1, rounds + 1):
        if len(deck) < batch:
            deck = random.permutation(size).tolist()
        found.append(Drawn(0, number, np.array(sorted(deck[:batch])), size))
        deck = deck[batch:]
    return found


@pytest.mark.parametrize("rounds", [3, 60])
def test_poisson_samples_pass(rounds: int) -> None:
    smallest = []
    for seed in range(40):
        drawn = poisson([30, 55, 7], [0.5, 0.2, 0.9], rounds, seed)
        check = check_sampling(drawn, [0.5, 0.2, 0.9], np.random.default_rng(seed))
        assert check.poisson
        smallest.append(min(check.sizes, check.units))
    assert np.mean(np.array(smallest) < 0.05) < 0.35  # two tests: about one in ten


def test_everybody_in_every_batch_passes_at_rate_one() -> None:
    drawn = poisson([20], [1.0], 10, 0)
    assert check_sampling(drawn, [1.0], np.random.default_rng(0)).poisson


def test_shuffling_is_noticed() -> None:
    check = check_sampling(shuffled(40, 10, 40), [0.25], np.random.default_rng(0))
    assert not check.poisson
    assert max(check.sizes, check.units) < ALARM
    assert check.total > ALARM  # the rate is right: shuffling looks normal


def test_another_rate_is_noticed() -> None:
    check = check_sampling(poisson([60], [0.3], 100, 0), [0.25], np.random.default_rng(0))
    assert check.total < ALARM


def test_the_same_batch_every_time_is_noticed() -> None:
    first = poisson([60], [0.5], 1, 0)[0]
    drawn = [Drawn(0, number, first.units, 60) for number in range(1, 31)]
    assert check_sampling(drawn, [0.5], np.random.default_rng(0)).units < ALARM


def test_one_batch_more_than_planned_is_poisson_and_is_counted() -> None:
    drawn = [*poisson([30, 40], [0.5, 0.5], 20, 0), *poisson([30], [0.5], 1, 1)]
    assert check_sampling(drawn, [0.5, 0.5], np.random.default_rng(0)).poisson
    assert batches_of(drawn, 3) == [21, 20, 0]
