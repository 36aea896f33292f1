"""The ceiling of membership inference: golden values of PRIVACY.md, and its edges."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from fedgraft_common.accounting import SamplingEvent
from fedgraft_simulations.audit.ceiling import ceiling

RATES = np.array([0.001, 0.01, 0.1])


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (SamplingEvent(0.25, 2.0, 100), (3.97, 15.6, 50.4)),
        (SamplingEvent(256 / 60000, 1.1, 14100), (0.55, 3.99, 24.0)),
    ],
)
def test_golden_values(event: SamplingEvent, expected: tuple[float, ...]) -> None:
    """To the digits that PRIVACY.md prints."""
    found = 100 * ceiling([event], RATES)
    for value, wanted in zip(found, expected, strict=True):
        digits = len(str(wanted).partition(".")[2])
        assert round(float(value), digits) == wanted


def test_a_gaussian_is_the_textbook_curve() -> None:
    """One Gaussian mechanism, q = 1: TPR = Phi(Phi^-1(FPR) + 1 / sigma) (Dong et al. 2022)."""
    found = ceiling([SamplingEvent(1.0, 2.0, 1)], RATES)
    np.testing.assert_allclose(found, norm.cdf(norm.ppf(RATES) + 0.5), rtol=1e-4)


def test_more_releases_raise_it_and_noise_lowers_it() -> None:
    steps, more = SamplingEvent(0.5, 2.0, 20), SamplingEvent(1.0, 8.0, 3)
    alone = ceiling([steps], RATES)
    assert (ceiling([steps, more], RATES) > alone).all()
    assert (ceiling([SamplingEvent(0.5, 4.0, 20)], RATES) < alone).all()


def test_without_dp_there_is_none() -> None:
    assert (ceiling([], RATES) == 1).all()


def test_it_never_leaves_the_unit_square() -> None:
    found = ceiling([SamplingEvent(0.5, 0.4, 50)], np.array([0.0, 1e-9, 0.5, 1.0]))
    assert (found >= 0).all()
    assert (found <= 1).all()
    assert found[-1] == pytest.approx(1)
