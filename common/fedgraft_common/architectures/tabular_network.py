"""A residual network for tables (Gorishniy et al. 2021, section 3.2, with layer normalisation).

Shapes: N rows, F columns, D features.
"""

from __future__ import annotations

import torch
from torch import nn


class TabularBlock(nn.Module):
    """x + Linear(ReLU(Linear(LayerNorm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D) to (N, D)."""
        result: torch.Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return result


class TabularNetwork(nn.Module):
    """Columns to features.

    Args:
        columns: F.
        width: D.
        depth: residual blocks.
    """

    def __init__(self, columns: int, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(columns, width)
        self.blocks = nn.ModuleList(TabularBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(N, F) float32 to (N, D)."""
        hidden = self.stem(values)
        for block in self.blocks:
            hidden = block(hidden)
        result: torch.Tensor = self.norm(hidden)
        return result
