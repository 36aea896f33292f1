"""Epsilon of the discrete mechanism itself, computed without the continuous one.

`fixed_point` proves that the integer noise is at least as good as a continuous Gaussian, which
`accounting` composes. This is the computation beside it, on the distribution that is drawn: the
variance of one share as the sampler's tables have it, h of them, held against the sensitivity with
rounding; then the privacy loss distribution of N_Z along one coordinate, `dp_accounting`'s
`from_discrete_gaussian_mechanism`, composed over the steps. The two must agree within 1 %.

The library adds up all integers one by one, and real sums have millions of them to one unit of
sensitivity. So the same ratio of noise to sensitivity is taken on a coarser grid, where the noise's
standard deviation is `WIDTH` integers: a coarser grid hides less, and at 500 or 500,000 integers
epsilon is the same to the fourth digit.
"""

from __future__ import annotations

import math
from typing import Final

from fedgraft_common.fixed_point import FixedPoint

WIDTH: Final = 1000
"""Standard deviation, in integers, of the noise that is added up."""


def discrete_epsilon(
    encoding: FixedPoint, shares: int, sample_rate: float, steps: int, delta: float
) -> float:
    """Epsilon of `steps` steps, each on its own Poisson sample, add or remove one unit.

    Args:
        encoding: says how noise is drawn, and the sensitivity with rounding.
        shares: h: how many sites' noise counts.
        sample_rate: q.
        steps: T.
        delta: of the promise.
    """
    from dp_accounting.pld import privacy_loss_distribution

    std = math.sqrt(shares * encoding.share.variance)
    ratio = std / (encoding.sensitivity * encoding.scale)
    sensitivity = max(1, round(WIDTH / ratio))
    step = privacy_loss_distribution.from_discrete_gaussian_mechanism(
        ratio * sensitivity, sensitivity=sensitivity, sampling_prob=sample_rate
    )
    return max(0.0, float(step.self_compose(steps).get_epsilon_for_delta(delta)))
