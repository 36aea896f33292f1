"""The ceiling of membership inference: what no attacker can beat if the mechanism is as claimed.

A mechanism's trade-off curve gives, for each rate of false alarms, the highest rate of hits of any
test that tells "this unit took part" from "it did not" (Dong, Roth and Su 2022, "Gaussian
differential privacy", section 2; Kulynych et al. 2024, "Attack-aware noise calibration", algorithm
1). It says more than epsilon: one (epsilon, delta) is only one point of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft_common.accounting import SamplingEvent


def ceiling(events: Sequence[SamplingEvent], false_positives: NDArray[np.float64]) -> NDArray[Any]:
    """Highest true positive rate of any membership attack on `events`, by riskcal.

    Holds for one unit, add or remove, against whoever sees everything that the events released.
    The privacy loss is kept on a grid of 1e-4, which changes the rates in the fifth digit.

    Args:
        events: what was charged; none means no DP, and the ceiling is 1.
        false_positives: (n,) rates in [0, 1].

    Returns:
        (n,) rates in [0, 1].
    """
    if not events:
        return np.ones_like(false_positives)
    from riskcal.analysis import get_beta_from_pld

    missed = get_beta_from_pld(_privacy_loss(tuple(events)), alpha=np.atleast_1d(false_positives))
    return np.clip(1.0 - np.asarray(missed, dtype=np.float64), 0.0, 1.0)


@lru_cache(maxsize=8)
def _privacy_loss(events: tuple[SamplingEvent, ...]) -> Any:
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    composed = None
    for event in events:
        one = from_gaussian_mechanism(event.noise_multiplier, sampling_prob=event.sample_rate)
        steps = one.self_compose(event.steps)
        composed = steps if composed is None else composed.compose(steps)
    return composed
