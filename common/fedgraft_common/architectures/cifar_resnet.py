"""The small residual network for 32 x 32 images (He et al. 2015, section 4.2), no classifier.

Parameter names are those of the weights that are published for CIFAR-10: conv1, bn1,
layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters (option A: stride, then zero channels)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.padding = (width - channels) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, channels, H, W) to (N, width, H / stride, W / stride)."""
        hidden = functional.relu(self.bn1(self.conv1(x)))
        hidden = self.bn2(self.conv2(hidden))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return functional.relu(
            hidden + functional.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding))
        )


class CifarResNet(nn.Module):
    """A 3x3 stem and three stages of blocks.

    Args:
        depth: 6 n + 2 layers, with n blocks in a stage; 20, 32, 44, 56 or 110 are published.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        count = (depth - 2) // 6
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], count, 1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], count, 2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], count, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) to a map (N, 64, H / 4, W / 4)."""
        hidden = functional.relu(self.bn1(self.conv1(pixel_values)))
        result: torch.Tensor = self.layer3(self.layer2(self.layer1(hidden)))
        return result


def _stage(channels: int, width: int, count: int, stride: int) -> nn.Sequential:
    first = Block(channels, width, stride)
    return nn.Sequential(first, *(Block(width, width, 1) for _ in range(count - 1)))
