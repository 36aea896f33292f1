"""A lower bound on epsilon from canaries that add to a gradient sum: T2 of PRIVACY.md, the gate.

Canary j, if its coin says so, adds C * e_j to the summed clipped gradient in the steps for which it
is sampled. The attacker's score for it is the sum over steps of <noisy sum, e_j> / C. A threshold
on the score makes two kinds of mistakes; both rates are bounded from above with confidence
(Clopper and Pearson 1934), and no mu-GDP mechanism with a smaller mu allows both
(Nasr et al. 2023, "Tight Auditing of Differentially Private Machine Learning"; Andrew et al. 2023,
"One-shot Empirical Privacy Estimation for Federated Learning").

Assumption: the mechanism's trade-off curve is a Gaussian's. A composition of many sampled Gaussian
steps is close to one and, where the attacker works, on the safe side of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr
from scipy.stats import beta, mannwhitneyu, norm


@dataclass(frozen=True, slots=True)
class GaussianBound:
    """What the scores of canaries show.

    Attributes:
        canaries: that were counted; as many again chose the threshold.
        false_positives: share of OUT canaries called IN.
        false_negatives: share of IN canaries called OUT.
        mu: lower bound on mu.
        epsilon: lower bound on epsilon at `delta`.
        estimate: epsilon of the mu that all scores together suggest, without confidence.
        delta: both are for.
        significance: chance that the bound is wrong.
    """

    canaries: int
    false_positives: float
    false_negatives: float
    mu: float
    epsilon: float
    estimate: float
    delta: float
    significance: float


def gaussian_bound(
    scores: NDArray[np.float64],
    included: NDArray[np.bool_],
    choosing: NDArray[np.bool_],
    delta: float,
    significance: float = 0.05,
) -> GaussianBound:
    """T2.

    Args:
        scores: (m,) higher means that the attacker believes more in IN.
        included: (m,) the coins.
        choosing: (m,) the half on which the threshold is chosen; the other half is counted.
        delta: of the epsilon.
        significance: chance, at most, that the mechanism's mu is below the bound.

    Edge cases: 0 where the scores show nothing; scores that tell IN from OUT without a mistake
    give a finite bound, because the number of canaries is.
    """
    threshold = _best_threshold(scores[choosing], included[choosing], significance)
    called, coins = scores[~choosing] >= threshold, included[~choosing]
    inside, outside = int(coins.sum()), int((~coins).sum())
    false_positives, false_negatives = int((called & ~coins).sum()), int((~called & coins).sum())
    mu = _mu(
        np.array([false_positives]), outside, np.array([false_negatives]), inside, significance
    )
    lower = max(0.0, float(mu[0]))
    return GaussianBound(
        canaries=len(coins),
        false_positives=false_positives / max(1, outside),
        false_negatives=false_negatives / max(1, inside),
        mu=lower,
        epsilon=gaussian_epsilon(lower, delta),
        estimate=gaussian_epsilon(suggested_mu(scores, included), delta),
        delta=delta,
        significance=significance,
    )


def suggested_mu(scores: NDArray[np.float64], included: NDArray[np.bool_]) -> float:
    """Mu of two Gaussians that overlap as much as the scores do: sqrt(2) times the quantile of the
    area under the ROC curve. Scores without any overlap suggest what their number can show.
    """
    if included.all() or not included.any():
        return 0.0
    inside, outside = scores[included], scores[~included]
    pairs = len(inside) * len(outside)
    area = float(mannwhitneyu(inside, outside).statistic) / pairs
    area = min(max(area, 0.5 / pairs), 1 - 0.5 / pairs)
    return max(0.0, math.sqrt(2) * float(norm.ppf(area)))


def _best_threshold(
    scores: NDArray[np.float64], included: NDArray[np.bool_], significance: float
) -> float:
    """The threshold with the largest bound on these canaries."""
    inside, outside = np.sort(scores[included]), np.sort(scores[~included])
    candidates = np.unique(scores)
    false_positives = len(outside) - np.searchsorted(outside, candidates)
    false_negatives = np.searchsorted(inside, candidates)
    mu = _mu(false_positives, len(outside), false_negatives, len(inside), significance)
    best = int(np.argmax(mu))
    if best == 0:
        return float(candidates[0])
    return float(candidates[best - 1] + candidates[best]) / 2


def _mu(
    false_positives: NDArray[np.int64],
    outside: int,
    false_negatives: NDArray[np.int64],
    inside: int,
    significance: float,
) -> NDArray[np.float64]:
    """Lower bounds on mu; each rate is bounded at half the significance."""
    high = clopper_pearson_upper(false_positives, outside, significance / 2)
    low = clopper_pearson_upper(false_negatives, inside, significance / 2)
    mu: NDArray[np.float64] = norm.isf(high) - norm.ppf(low)
    return mu


def clopper_pearson_upper(
    count: NDArray[np.int64], trials: int, significance: float
) -> NDArray[np.float64]:
    """Upper confidence limits of a probability, from `count` of `trials`; 1 without trials."""
    limits: NDArray[np.float64] = np.where(
        count < trials,
        beta.ppf(1 - significance, count + 1, np.maximum(trials - count, 1)),
        1.0,
    )
    return limits


def gaussian_delta_log(mu: float, epsilon: float) -> float:
    """Log of the delta of a mu-GDP mechanism at epsilon (Dong et al. 2022, corollary 2.13)."""
    first = log_ndtr(-epsilon / mu + mu / 2)
    second = epsilon + log_ndtr(-epsilon / mu - mu / 2)
    if second >= first:  # rounding, where delta is nothing
        return -math.inf
    return float(first + math.log1p(-math.exp(second - first)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of a mu-GDP mechanism at delta; 0 where delta alone covers it."""
    target = math.log(delta)
    if mu <= 0 or gaussian_delta_log(mu, 0.0) <= target:
        return 0.0
    high = 1.0
    while gaussian_delta_log(mu, high) > target:
        high *= 2
    return float(brentq(lambda e: gaussian_delta_log(mu, e) - target, 0.0, high, xtol=1e-12))


@lru_cache(maxsize=4096)
def gaussian_mu(epsilon: float, delta: float) -> float:
    """Mu of the Gaussian mechanism that is exactly (epsilon, delta)-DP."""
    target = math.log(delta)
    high = 1.0
    while gaussian_delta_log(high, epsilon) < target:
        high *= 2
    return float(brentq(lambda m: gaussian_delta_log(m, epsilon) - target, 1e-12, high, xtol=1e-14))
