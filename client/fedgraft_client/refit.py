"""The sealed local refit: after the last round a site fits its head without noise, at home.

It costs no privacy because nothing computed from it leaves; a refitted head never takes part in
a round again (PRIVACY.md). The fit minimises the task's own loss, held near the head that the
federation used: a branch with thirty records, and none at all of some classes, keeps what the
shared adapter was trained towards and corrects it where its own records say so.

Shapes: N records, D features, K outputs at a place.
"""

from __future__ import annotations

import torch
from torch.func import functional_call

from fedgraft_client.head import LinearHead

STIFFNESS = 0.05  # weight of the squared distance from the start, against a sum over records
ITERATIONS = 200


def refit_head(
    features: torch.Tensor,
    labels: torch.Tensor,
    start: LinearHead,
    stiffness: float = STIFFNESS,
) -> LinearHead:
    """Fits a head to a site's own records, without noise.

    Minimises sum of losses + stiffness/2 * |head - start|^2 by L-BFGS in float64. For all tasks
    but detection, whose loss of a box is not, and for heads without a local affine part, that is
    convex with one minimum: the maximum a posteriori estimate under a Gaussian prior around
    `start`. With classes and a head of zeros it
    is ordinary ridge-penalised logistic regression.

    Args:
        features: float32, N records first, of the kind that the head takes.
        labels: of the head's task, N records first; classes without a record are allowed.
        start: the head the federation used, or a new one.
        stiffness: how hard it is held, in records; see above.

    Returns:
        A frozen head. Of one whose table of tokens is the backbone's own, only the bias is fitted.
    """
    task = start.task
    head = start.like().requires_grad_(False)
    inputs = features.double()
    labels = labels.double() if labels.is_floating_point() else labels
    centre = {name: p.detach().double() for name, p in start.named_parameters()}
    fitted = ("linear.bias",) if start.public else tuple(centre)
    change = {name: torch.zeros_like(centre[name], requires_grad=True) for name in fitted}
    solver = torch.optim.LBFGS(
        list(change.values()), max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def objective() -> torch.Tensor:
        solver.zero_grad()
        moved = {name: p + change[name] if name in change else p for name, p in centre.items()}
        fit = task.loss(functional_call(head, moved, (inputs,)), labels).sum()
        distance = torch.stack([part.square().sum() for part in change.values()]).sum()
        loss: torch.Tensor = fit + 0.5 * stiffness * distance
        loss.backward()
        return loss

    solver.step(objective)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(centre[name] + change[name] if name in change else centre[name])
    return head
