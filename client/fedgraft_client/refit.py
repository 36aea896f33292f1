"""The sealed local refit: after the last round a site fits its head without noise, at home.

It costs no privacy because nothing computed from it leaves; a refitted head never takes part in
a round again (PRIVACY.md). The fit is multinomial logistic regression, held near the head that
the federation used: a branch with thirty records, and none at all of some classes, keeps what
the shared adapter was trained towards and corrects it where its own records say so.

Shapes: N records, D features, K classes.
"""

from __future__ import annotations

import torch
from torch.nn import functional

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

    Minimises sum of cross-entropies + stiffness/2 * |head - start|^2, which is convex with one
    minimum, by L-BFGS in float64. It is the maximum a posteriori estimate under a Gaussian prior
    around `start`; with a head of zeros it is ordinary ridge-penalised logistic regression.

    Args:
        features: (N, D) float32.
        labels: (N,) int64 in [0, K); classes without a record are allowed.
        start: the head the federation used, or one of zeros.
        stiffness: how hard it is held, in records; see above.

    Returns:
        A frozen head.
    """
    inputs = LinearHead.normalise(features).double()
    centre = torch.cat([start.linear.weight, start.linear.bias[:, None]], dim=1).detach().double()
    ones = torch.ones(len(inputs), 1, dtype=torch.float64)
    augmented = torch.cat([inputs, ones], dim=1)
    change = torch.zeros_like(centre, requires_grad=True)
    solver = torch.optim.LBFGS([change], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        solver.zero_grad()
        logits = augmented @ (centre + change).T
        fit = functional.cross_entropy(logits, labels, reduction="sum")
        loss = fit + 0.5 * stiffness * change.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    head = LinearHead(start.linear.in_features, start.linear.out_features).requires_grad_(False)
    fitted = (centre + change.detach()).float()
    head.linear.weight.copy_(fitted[:, :-1])
    head.linear.bias.copy_(fitted[:, -1])
    return head
