"""Images, one at a time, from files or from bytes inside a table."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft_client.loaders.table import Broken
from fedgraft_common.reading import Reading

ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".pgm", ".ppm")
_DEEP = ("I;16", "I;16B", "I;16L", "I")  # what Pillow calls 16-bit images


class ImageReader:
    """Reads image files with Pillow.

    Args:
        column: that holds them: a path, relative to `folder` or whole, or {bytes, path}.
        folder: see above.
        reading: size, channels and bits.

    Attributes:
        sizes: height and width of each image that was read, before it was brought to size.
    """

    def __init__(self, column: str, folder: Path, reading: Reading) -> None:
        self.columns = (column,)
        self._folder = folder
        self._reading = reading
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, values: list[Any]) -> torch.Tensor:
        """(C, H, W) float32 in [0, 1]; C is 1 for grey images, else 3.

        Raises:
            Broken: missing, damaged, or of 16 bits where nobody said how many are in use.
        """
        pixels, bits = self._open(content_of(values[0], self._folder))
        grey = pixels.ndim == 2
        image = torch.from_numpy(pixels.astype(np.float32) / (2**bits - 1))
        image = image[None] if grey else image.permute(2, 0, 1)
        if self._reading.channels == 3 and grey:
            image = image.expand(3, -1, -1)
        self.sizes.append((image.shape[1], image.shape[2]))
        return fit(image.contiguous(), self._reading.size)

    def _open(self, source: io.BytesIO | Path) -> tuple[NDArray[Any], int]:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(source) as image:
                image.load()
                if image.mode in _DEEP:
                    return self._deep(np.asarray(image).astype(np.int64))
                grey = image.mode in ("1", "L", "LA") or self._reading.channels == 1
                return np.asarray(image.convert("L" if grey else "RGB")), 8
        except FileNotFoundError:
            raise Broken("no such file") from None
        except UnidentifiedImageError:
            raise Broken("not an image that Pillow reads") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise Broken(f"damaged: {str(error) or type(error).__name__}") from None

    def _deep(self, pixels: NDArray[np.int64]) -> tuple[NDArray[Any], int]:
        bits = self._reading.bits
        if bits is None:
            raise Broken(
                "16 bits a pixel, and data.bits does not say how many are in use (12 for most "
                "scanners); the image's own maximum would tell of its content"
            )
        if pixels.min() < 0 or pixels.max() >= 2**bits:
            raise Broken(f"a value of {pixels.max()}, beyond data.bits = {bits}")
        return pixels, bits


def content_of(value: Any, folder: Path) -> io.BytesIO | Path:
    """Where a media column's value is: bytes in the table, or a file.

    Raises:
        Broken: neither.
    """
    if isinstance(value, dict):
        if value.get("bytes"):
            return io.BytesIO(value["bytes"])
        value = value.get("path")
    if isinstance(value, bytes):
        return io.BytesIO(value)
    if not value:
        raise Broken("no file name")
    return folder / str(value)  # a whole path stays as it is


def fit(image: torch.Tensor, size: int | None) -> torch.Tensor:
    """Shorter side to `size`, then the middle square; as it is without a size.

    Args:
        image: (C, H, W) float32 in [0, 1].
        size: pixels.
    """
    if size is None or tuple(image.shape[1:]) == (size, size):
        return image
    from torchvision.transforms.v2 import functional

    height, width = image.shape[1:]
    scale = size / min(height, width)
    shape = [max(size, round(height * scale)), max(size, round(width * scale))]
    resized = functional.resize(image, shape, antialias=True)
    found: torch.Tensor = functional.center_crop(resized, [size, size]).clamp(0, 1)
    return found
