"""What a backbone's output becomes before a head sees it.

Shapes: N records, T tokens, D features, H x W cells of a feature map.

| kind | shape | for |
|---|---|---|
| `pooled` | (N, D) | one answer a record |
| `tokens` | (N, T, D) | one answer a token, step, box or query |
| `map` | (N, D, H, W) | one answer a pixel |
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch

from fedgraft_common.errors import AdapterError

FeatureKind: TypeAlias = Literal["pooled", "tokens", "map"]
Pooling: TypeAlias = Literal["pooler", "cls", "last", "mean"]


def pool(output: Any, pooling: Pooling | None, mask: torch.Tensor | None = None) -> torch.Tensor:
    """One feature vector a record from a model's output.

    Args:
        output: has `last_hidden_state` (N, T, D) or (N, D, H, W), maybe `pooler_output`.
        pooling: None takes the model's own pooler if it has one, else the mean.
        mask: (N, T), not 0 where a token counts; the mean is over those, and `cls` and `last` are
            the first and the last of them. Tokens that a prompt adds in front have none.

    Returns:
        (N, D) float32.

    Raises:
        AdapterError: the pooler is asked for and there is none.
    """
    pooled: torch.Tensor | None = getattr(output, "pooler_output", None)
    if pooling == "pooler" or (pooling is None and pooled is not None):
        if pooled is None:
            raise AdapterError(
                "backbone.pooling", "pooler", "cls or mean: this model has no pooler",
                "Choose another pooling.",
            )  # fmt: skip
        return pooled.flatten(1).float()
    hidden: torch.Tensor = output.last_hidden_state
    if hidden.dim() == 4:
        return hidden.flatten(2).mean(dim=2).float()
    if mask is None or mask.dim() != 2 or mask.shape[1] > hidden.shape[1]:
        counts = hidden.new_ones(hidden.shape[:2])
    else:
        hidden = hidden[:, hidden.shape[1] - mask.shape[1] :]
        counts = (mask != 0).to(hidden.dtype)
    if pooling in ("cls", "last"):
        order = torch.arange(hidden.shape[1], device=hidden.device).to(counts.dtype)
        chosen = (counts * (order + 1 if pooling == "last" else len(order) - order)).argmax(dim=1)
        return hidden.gather(1, chosen[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0].float()
    total = (hidden.float() * counts[:, :, None].float()).sum(dim=1)
    return total / counts.float().sum(dim=1, keepdim=True).clamp(min=1)


def as_tokens(output: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
    """(N, T, D) float32: the model's tokens, or the cells of its map row by row.

    Args:
        output: has `last_hidden_state` (N, T, D) or (N, D, H, W).
        mask: (N, T) of a text, 0 where a token is padding, whose features become zeros; tokens
            that a prompt added in front are left out.
    """
    hidden: torch.Tensor = output.last_hidden_state
    if hidden.dim() == 4:
        return hidden.flatten(2).transpose(1, 2).float()
    if mask is not None and mask.dim() == 2 and mask.shape[1] <= hidden.shape[1]:
        hidden = hidden[:, hidden.shape[1] - mask.shape[1] :]
        hidden = hidden * (mask != 0).to(hidden)[:, :, None]
    return hidden.float()


def as_map(output: Any) -> torch.Tensor:
    """(N, D, H, W) float32: the model's map, or its patch tokens laid out in a square.

    Raises:
        AdapterError: the tokens, without a few at the front that stand for the whole, are not a
            square.
    """
    hidden: torch.Tensor = output.last_hidden_state
    if hidden.dim() == 4:
        return hidden.float()
    side = math.isqrt(hidden.shape[1])
    if hidden.shape[1] - side**2 > 5:  # a class token, a distillation token, at most 4 registers
        raise AdapterError(
            "features", f"{hidden.shape[1]} tokens", "a map, or tokens of a square image",
            "Choose a task for tokens or for whole records, or another backbone.",
        )  # fmt: skip
    patches = hidden[:, hidden.shape[1] - side**2 :]
    cells: torch.Tensor = patches.transpose(1, 2).unflatten(2, (side, side))
    return cells.float()
