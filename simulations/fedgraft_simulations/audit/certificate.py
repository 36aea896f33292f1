"""Lower bounds on epsilon from guesses in one run, T1 and T1b of PRIVACY.md.

m canaries are each included by a fair coin. An attacker guesses for r of them whether they were,
and is right v times. A mechanism that is (epsilon, delta)-DP lets nobody be right much more often
than exp(epsilon) / (1 + exp(epsilon)); more right guesses than that refute the epsilon.

    T1   needs no assumption about the mechanism (Steinke, Nasr and Jagielski 2023, "Privacy
         Auditing with One (1) Training Run", appendix D)
    T1b  tests the hypothesis that the mechanism is mu-GDP (Mahloujifar, Melis and Chaudhuri 2024,
         "Auditing f-Differential Privacy in One Run", algorithm 3)

Both hold for adding or removing one unit. Which canaries are guessed, and how many, must not be
chosen by looking at the coins that are then counted: it is fixed before, or chosen on a half that
is then left out. (The reference sweep of PRIVACY.md takes the best of all corners of the ROC
curve's convex hull, each at an equal part of the significance. That reproduces its figures to the
digit, and is a test here; but the corners depend on the coins, so the audit does not do it.)
Neither notices noise at half strength (PRIVACY.md); T2 in `gaussian_bound.py` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, ndtr, ndtri
from scipy.stats import binom

from fedgraft_simulations.audit.gaussian_bound import gaussian_mu

CEILING = 100.0
"""Epsilons beyond this are not told apart."""


@dataclass(frozen=True, slots=True)
class Guesses:
    """How an attacker did.

    Attributes:
        canaries: m, canaries whose coin the attacker could have guessed.
        made: r, guesses made.
        right: v, of them right.
    """

    canaries: int
    made: int
    right: int


def guesses(scores: NDArray[np.float64], included: NDArray[np.bool_], share: float) -> Guesses:
    """Guesses IN for this share of the canaries, the highest scores, and OUT for as many lowest.

    Args:
        scores: (m,) higher means that the attacker believes more in IN.
        included: (m,) the coins.
        share: in (0, 0.5]; fixed before looking, or by `best_share` on other canaries.
    """
    coins = included[np.argsort(-scores, kind="stable")]
    count = max(1, round(len(coins) * share))
    right = int(coins[:count].sum()) + int((~coins[len(coins) - count :]).sum())
    return Guesses(len(coins), 2 * count, right)


def best_share(scores: NDArray[np.float64], included: NDArray[np.bool_]) -> float:
    """The share of guesses with the largest certificate on these canaries, which it uses up."""
    shares = [float(share) for share in np.geomspace(0.01, 0.5, 16)]
    return max(shares, key=lambda share: certificate(guesses(scores, included, share), 0.0))


def p_value(found: Guesses, epsilon: float, delta: float) -> float:
    """How likely that many right guesses are, at most, if the mechanism is (epsilon, delta)-DP.

    Source: Steinke et al. 2023, theorem 5.2 and appendix D.
    """
    chance, right = expit(epsilon), found.right
    beyond = float(binom.sf(right - 1, found.made, chance))
    if delta == 0 or right == 0:
        return min(1.0, beyond)
    mean = found.made * chance
    rare = int(mean - 12 * math.sqrt(mean * (1 - chance))) - 40  # fewer never happen: Chernoff
    fewer = np.arange(1, max(1, right - max(0, rare)) + 1)  # beyond, the quotient only falls
    window = binom.cdf(right - 1, found.made, chance) - binom.cdf(
        right - fewer - 1, found.made, chance
    )
    return min(1.0, beyond + 2 * found.canaries * delta * float((window / fewer).max()))


def certificate(found: Guesses, delta: float, significance: float = 0.05) -> float:
    """T1: an epsilon that the mechanism exceeds, right with probability 1 - `significance`.

    Edge cases: 0 if even epsilon 0 is not refuted; `CEILING` if nothing below it stands.
    """
    return _largest_refuted(lambda epsilon: significance - p_value(found, epsilon, delta))


def gaussian_certificate(found: Guesses, delta: float, significance: float = 0.05) -> float:
    """T1b: the same if the mechanism is Gaussian; much larger, because it assumes more.

    Edge cases: as for `certificate`.
    """
    return _largest_refuted(lambda e: gaussian_excess(found, e, delta, significance))


def gaussian_excess(found: Guesses, epsilon: float, delta: float, significance: float) -> float:
    """Positive if the guesses refute that the mechanism is Gaussian and (epsilon, delta)-DP."""
    made, right, m = found.made, found.right, found.canaries
    mu = gaussian_mu(epsilon, delta)
    inside = significance * right / m
    outside = significance * (made - right) / m
    for i in range(right - 1, -1, -1):
        larger = max(outside, float(ndtr(ndtri(inside) - mu)))
        if larger == outside:  # then nothing changes any more
            break
        inside = min(1.0, inside + i / (made - i) * (larger - outside))
        outside = larger
    return inside + outside - made / m


def _largest_refuted(excess: Callable[[float], float]) -> float:
    """The largest epsilon at which `excess` is positive; it falls with epsilon."""
    if excess(0.0) <= 0:
        return 0.0
    low, high = 0.0, 1.0
    while excess(high) > 0:
        if high >= CEILING:
            return CEILING
        low, high = high, 2 * high
    return float(brentq(excess, low, high, xtol=1e-9))
