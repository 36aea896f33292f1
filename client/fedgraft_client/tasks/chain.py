"""Ordered outcomes as a chain of yes-or-no questions, whether a record went further than step k.

What `ordinal` and `survival` share. Outputs (N, J) are log-odds of going on past each of J steps;
an outcome that stopped at step j answers yes to the j questions before it and no to the j-th, and
has no part in the later ones. The likelihood of a record is the product of its own answers
(Cox 1972, section 6; Tutz 1991), so a record's loss depends on that record alone.

Shapes: N records, J questions.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def chain_loss(outputs: torch.Tensor, went: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each record, (N,).

    Args:
        outputs: (N, J) log-odds of going on.
        went: (N, J) 1 where the record went on.
        asked: (N, J) 1 where the question was asked of it.
    """
    found = functional.binary_cross_entropy_with_logits(outputs, went.to(outputs), reduction="none")
    return (found * asked.to(outputs)).sum(dim=1)


def reached(outputs: torch.Tensor) -> torch.Tensor:
    """(N, J) probability of going past each step; falls from left to right."""
    return functional.logsigmoid(outputs).cumsum(dim=1).exp()


def even_odds(steps: int) -> torch.Tensor:
    """(J,) log-odds under which each of the J + 1 outcomes is as likely as the others."""
    return torch.arange(steps, 0, -1).float().log()
