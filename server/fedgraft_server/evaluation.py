"""What the server makes of noised counts: one accuracy over all sites, and how sure it is.

Sites that did not answer are left out. The interval holds the uncertainty of two things: of the
held-out units (binomial) and of the noise that each site added to both counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import norm

from fedgraft_common.messages import Counts

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A released evaluation over sites.

    Attributes:
        round: after which it was taken.
        sites: how many answered.
        accuracy: share of held-out units predicted correctly, in [0, 1]; nan if the noise hides
            whether there were any.
        low: lower end of the 95 % interval.
        high: upper end.
    """

    round: int
    sites: int
    accuracy: float
    low: float
    high: float


def estimate(number: int, counts: Sequence[Counts], sigma: float) -> Estimate:
    """Adds the sites' counts up and divides, with the delta method's interval.

    The ratio p = C / T of the noisy sums C and T has variance close to
    p (1 - p) / T + v (1 + p^2) / T^2, where v = 2 sigma^2 per site is the noise on either sum.

    Args:
        number: the round.
        counts: one per site.
        sigma: noise multiplier of one release.
    """
    correct, total = sum(c.correct for c in counts), sum(c.total for c in counts)
    noise = 2 * sigma**2 * len(counts)
    if total <= 3 * math.sqrt(noise):  # the number of units drowns in the noise
        return Estimate(number, len(counts), math.nan, 0.0, 1.0)
    share = min(max(correct / total, 0.0), 1.0)
    variance = share * (1 - share) / total + noise * (1 + share**2) / total**2
    half = float(norm.ppf(0.5 + CONFIDENCE / 2)) * math.sqrt(variance)
    return Estimate(number, len(counts), share, max(0.0, share - half), min(1.0, share + half))
