from __future__ import annotations

import numpy as np
import pytest

from fedgraft_simulations.audit.noise import check_noise


def gaussian(seed: int, rows: int = 60, columns: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns))


def test_independent_gaussians_pass() -> None:
    for seed in range(40):
        check = check_noise(gaussian(seed), np.random.default_rng(seed))
        assert check.strong and check.well_made
        assert check.low < 1 < check.high


@pytest.mark.parametrize("strength", [0.0, 0.05, 0.9, 0.96])
def test_weaker_noise_is_noticed(strength: float) -> None:
    assert not check_noise(strength * gaussian(0), np.random.default_rng(0)).strong


def test_stronger_noise_is_no_failure() -> None:
    check = check_noise(1.1 * gaussian(0), np.random.default_rng(0))
    assert check.strong and check.low > 1


def test_noise_that_is_used_twice_is_noticed() -> None:
    noise = gaussian(0)
    noise[41] = noise[7]
    check = check_noise(noise, np.random.default_rng(0))
    assert check.correlation == pytest.approx(1.0)
    assert check.strong and not check.well_made


def test_half_of_the_noise_shared_is_noticed() -> None:
    noise = gaussian(0)
    noise[41] = np.sqrt(0.5) * (noise[7] + noise[41])
    assert not check_noise(noise, np.random.default_rng(0)).well_made


def test_another_shape_is_noticed() -> None:
    uniform = np.random.default_rng(0).uniform(-np.sqrt(3), np.sqrt(3), size=(60, 400))
    assert check_noise(uniform, np.random.default_rng(0)).gaussian < 1e-5
