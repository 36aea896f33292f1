"""A head made of a site's own class means, with noise, once, before the first round.

Formal guarantee: one release is a Gaussian mechanism with noise multiplier sigma, for adding or
removing one unit, and is charged to the ledger as such (q = 1). A unit contributes the average,
over all its records, of a record's features at unit length in the row of its class: a matrix of
Frobenius norm at most 1, for a mean of matrices of norm at most 1 has norm at most 1, however many
records there are and whichever classes they are of. Every coordinate of the sum gets noise of
standard deviation sigma. What is made of the noisy sum, directions of rows around their common
centre, is post-processing; how many records a class has is in nothing but that sum. Which classes
there are is public. The means stay at the site, and the adapter's gradients through them are what
an observer sees of them.

Edge cases: a class without records gets a direction of noise alone, as good as any other; a record
whose features are not finite counts as one of its unit with features of zero.

Source: Snell et al. 2017, "Prototypical networks for few-shot learning", for the head; the release
is the Gaussian mechanism (Dwork and Roth 2014, appendix A).

Shapes: N records, U units, D features, K classes.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from fedgraft_client.head import LinearHead
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.tasks.single_label import SingleLabel
from fedgraft_common.errors import PlanError


def class_sums(
    features: torch.Tensor, labels: torch.Tensor, classes: int, units: torch.Tensor | None
) -> torch.Tensor:
    """(K, D) float64, without noise: private, and not to be used as it is.

    Args:
        features: (N, D) float32.
        labels: (N,) int64.
        classes: K.
        units: (N,) int64, the unit of each record; None if the plan protects records.
    """
    shown = LinearHead.normalise(features.double())  # in float32 a length may be above 1
    shown = torch.where(shown.isfinite().all(dim=1, keepdim=True), shown, 0.0)
    if units is not None:
        shown = shown / torch.bincount(units).double()[units, None]
    found = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    return found.index_add_(0, labels, shown)


def noisy_prototypes(sums: torch.Tensor, sigma: float, noise: NoiseSource) -> torch.Tensor:
    """(K, D) float32 rows of length 1, private.

    Args:
        sums: `class_sums`.
        sigma: noise multiplier; 0 without DP, in a simulation.
        noise: where noise comes from.
    """
    noisy = sums + noise.gaussian(tuple(sums.shape), sigma)
    directions = functional.normalize(noisy, dim=1)
    return functional.normalize(directions - directions.mean(dim=0), dim=1).float()


def check_few_shot(head: LinearHead) -> None:
    """Refuses tasks that have no class of a record.

    Raises:
        PlanError: another task than telling classes apart.
    """
    if type(head.task) is not SingleLabel:
        raise PlanError(
            "head.training", "prototype", f"private or fixed, for {head.task.spec.kind}: only "
            "tasks with one class for each record have class means",
            "Choose another head in the plan.",
        )  # fmt: skip
