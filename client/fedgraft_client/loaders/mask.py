"""Masks: images whose grey values are classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgraft_client.loaders.image import content_of
from fedgraft_client.loaders.table import Broken


class MaskReader:
    """Reads mask images with Pillow.

    Args:
        folder: what relative paths are relative to.
        size: side of the square that the images were brought to; None if they were left alone.
    """

    def __init__(self, folder: Path, size: int | None) -> None:
        self._folder = folder
        self._size = size

    def __call__(self, value: Any) -> torch.Tensor:
        """(H, W) int64 grey values or palette numbers, brought to size without mixing them.

        Raises:
            ValueError: it cannot be read.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(content_of(value, self._folder)) as image:
                image.load()
                plain = image if image.mode in ("1", "L", "P") else image.convert("L")
                grey = torch.from_numpy(np.array(plain).astype(np.int64))
        except (OSError, SyntaxError, UnidentifiedImageError, Broken) as error:
            raise ValueError(str(error) or type(error).__name__) from None
        if self._size is None or tuple(grey.shape) == (self._size, self._size):
            return grey
        from torchvision.transforms.v2 import InterpolationMode, functional

        height, width = grey.shape
        scale = self._size / min(height, width)
        shape = [max(self._size, round(height * scale)), max(self._size, round(width * scale))]
        resized = functional.resize(grey[None], shape, interpolation=InterpolationMode.NEAREST)
        found: torch.Tensor = functional.center_crop(resized, [self._size, self._size])[0]
        return found
