"""Update inversion: an input whose gradient looks like the one that was seen.

    matching   minimise 1 - cos(gradient(x), seen) + weight * prior(x) by Adam, x kept in its box
               (Geiping et al. 2020, "Inverting gradients", section 4); started from the attacker's
               own inputs whose gradients are nearest, which a fresh network needs less than a
               pre-trained, ReLU-kinked one
    analytic   a linear layer with a bias gives its input away: row k of its weight's gradient is
               the input times the bias' gradient at k (Phong et al. 2017, section 3)

The cosine takes no notice of clipping, which only shortens a gradient.

Shapes: N inputs attacked at once, D gradient values, S the shape of one input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

Gradients = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Inputs (N, *S) and labels (N,) to gradients (N, D), differentiable in the inputs."""
CHUNK = 256


@dataclass(frozen=True, slots=True)
class Matching:
    """How hard the attack tries.

    Attributes:
        iterations: steps of Adam.
        restarts: starts for each input; the one that matches best is kept.
        rate: first step size, in units of the box; it falls to zero along a cosine.
        prior: weight of the prior.
    """

    iterations: int = 300
    restarts: int = 4
    rate: float = 0.03
    prior: float = 0.003


def match_gradients(
    gradients: Gradients,
    seen: torch.Tensor,
    labels: torch.Tensor,
    starts: torch.Tensor,
    how: Matching,
    prior: Callable[[torch.Tensor], torch.Tensor],
    box: tuple[float, float] = (0.0, 1.0),
    on_step: Callable[[int], None] = lambda _: None,
) -> torch.Tensor:
    """The attack.

    Args:
        gradients: of the model under attack.
        seen: (N, D) what the attacker has, up to a factor.
        labels: (N,) of the inputs; known to the attacker.
        starts: (restarts, N, *S) where to begin.
        how: effort.
        prior: (N, *S) to (N,), smaller for likelier inputs.
        box: least and largest value of an input.
        on_step: told the number of each finished step.

    Returns:
        (N, *S) the best input found for each.
    """
    restarts, count = starts.shape[:2]
    target = seen.repeat(restarts, *[1] * (seen.dim() - 1))
    wanted = labels.repeat(restarts)
    guess = starts.flatten(0, 1).clone().requires_grad_(True)
    solver = torch.optim.Adam([guess], lr=how.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, how.iterations)
    for step in range(1, how.iterations + 1):
        solver.zero_grad()
        distance = 1 - functional.cosine_similarity(gradients(guess, wanted), target, dim=1)
        (distance + how.prior * prior(guess)).sum().backward()
        solver.step()
        schedule.step()
        with torch.no_grad():
            guess.clamp_(*box)
        on_step(step)
    with torch.no_grad():
        found = 1 - functional.cosine_similarity(gradients(guess, wanted), target, dim=1)
    best = found.view(restarts, count).argmin(dim=0)
    return guess.detach().view(restarts, count, *guess.shape[1:])[best, torch.arange(count)]


def nearest_starts(
    gradients: Gradients,
    seen: torch.Tensor,
    labels: torch.Tensor,
    own: torch.Tensor,
    own_labels: torch.Tensor,
    restarts: int,
) -> torch.Tensor:
    """Of the attacker's own inputs, those of the right label whose gradients are most alike.

    Args:
        gradients: of the model under attack.
        seen: (N, D).
        labels: (N,) of the inputs that are wanted.
        own: (M, *S) inputs of the same kind that the attacker has.
        own_labels: (M,).
        restarts: how many for each.

    Returns:
        (restarts, N, *S); where the attacker has too few of a label, others fill up.
    """
    known = all_gradients(gradients, own, own_labels)
    alike = functional.normalize(seen, dim=1) @ functional.normalize(known, dim=1).T
    alike -= 4.0 * (labels[:, None] != own_labels[None])
    count = min(restarts, len(own))
    nearest = alike.topk(count, dim=1).indices
    filled = nearest[:, torch.arange(restarts) % count]
    return own[filled.T]


def all_gradients(gradients: Gradients, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(M, D) gradients of many inputs, a chunk at a time, detached."""
    parts = [
        gradients(inputs[i : i + CHUNK], labels[i : i + CHUNK]).detach()
        for i in range(0, len(inputs), CHUNK)
    ]
    return torch.cat(parts)


def total_variation(images: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) to (N,): mean absolute difference of neighbours, the usual prior of images."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3))
    right = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
    return down + right


def layer_input(weight_gradient: torch.Tensor, bias_gradient: torch.Tensor) -> torch.Tensor:
    """The input of a linear layer, from the gradient of its weight and bias.

    Exact for one record: dL/dW = d x' and dL/db = d, so any row with d not 0 gives x; the row with
    the largest |d| is taken. For a sum over records, a mixture.

    Args:
        weight_gradient: (N, K, D).
        bias_gradient: (N, K).

    Returns:
        (N, D).
    """
    row = bias_gradient.abs().argmax(dim=1)
    rows = torch.arange(len(row))
    divisor = bias_gradient[rows, row]
    safe = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    return weight_gradient[rows, row] / safe[:, None]
