"""Released evaluation: how many held-out units are predicted correctly, with noise.

Formal guarantee: one release is a Gaussian mechanism with noise multiplier sigma, add or remove
one unit. A held-out unit adds 1 to the total and its share of correct records, at most 1, to the
correct ones, so it moves the pair by at most sqrt(2) in L2 norm; each count gets noise of standard
deviation sigma * sqrt(2). A training unit moves nothing but through adapter and head, which are
private on their own: the head here is the one the federation trained or fixed, never a refitted
one. There is no sampling, so the event is q = 1. Proof: deploy/decisions/0004.

Shapes: N held-out records, K classes.
"""

from __future__ import annotations

import math

import torch

from fedgraft_client.data import Records
from fedgraft_client.head import LinearHead
from fedgraft_client.randomness import NoiseSource
from fedgraft_common.messages import Counts

SENSITIVITY = math.sqrt(2)


def exact_counts(features: torch.Tensor, head: LinearHead, records: Records) -> Counts:
    """Correct and all held-out units, without noise: private, and not to be sent.

    Args:
        features: float32, of the kind that the head takes.
        head: DP-trained or fixed.
        records: the held-out records.

    Raises:
        PlanError: the head's task has no number of correct answers.
    """
    with torch.no_grad():
        correct = head.task.correct(head.cpu()(features), records.labels).clamp(0, 1)
    if records.units is None:
        return Counts(float(correct.sum()), float(len(correct)))
    sizes = torch.bincount(records.units).double()
    shares = torch.bincount(records.units, weights=correct) / sizes
    return Counts(float(shares.sum()), float(len(sizes)))


def noised(counts: Counts, sigma: float, noise: NoiseSource) -> Counts:
    """The counts as they may leave."""
    draw = noise.gaussian((2,), sigma * SENSITIVITY)
    return Counts(counts.correct + float(draw[0]), counts.total + float(draw[1]))
