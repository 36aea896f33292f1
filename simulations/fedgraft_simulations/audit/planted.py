"""A canary string and a canary tensor in a site's data, and the search for them in what left.

The string is in every text that a site has: its own name, the data set's name, the name of a class,
and, as grey values, in a record. The tensor is another record's picture. Both are searched for in
every encoding that a careless line of code would use; a contiguous part of 32 bytes is enough to
be found.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from fedgraft_client.data import Records

BLOCK = 16
"""Bytes of a needle: any leaked run of 31 bytes holds one whole block."""


@dataclass(frozen=True, slots=True)
class Canary:
    """What is planted.

    Attributes:
        text: unlike anything else, 24 letters and digits.
        tensor: (C, H, W) float32 in [0, 1], random.
    """

    text: str
    tensor: torch.Tensor

    @classmethod
    def draw(cls, shape: tuple[int, ...], random: np.random.Generator) -> Canary:
        """A new one, for pictures of this shape (C, H, W)."""
        letters = "".join(random.choice(list("ABCDEFGHJKLMNPQRSTUVWXYZ23456789"), size=18))
        pixels = random.random(shape, dtype=np.float32)
        return cls(f"canary{letters}", torch.from_numpy(pixels))

    def plant(self, records: Records) -> Records:
        """The records, with the tensor and the text as the pictures of the first two."""
        images = records.images.clone()
        images[0] = self.tensor
        if len(images) > 1:
            written = torch.frombuffer(bytearray(self.text.encode()), dtype=torch.uint8)
            flat = images[1].reshape(-1)
            size = min(len(flat), len(written))
            flat[:size] = written[:size].float() / 255
        return Records(images, records.labels, records.units)

    def needles(self, derived: Iterable[torch.Tensor] = ()) -> tuple[bytes, ...]:
        """What to look for.

        Args:
            derived: tensors that were computed from the canary alone, e.g. its cached features.
        """
        text = self.text.encode()
        found = [text[i : i + BLOCK] for i in range(0, len(text) - BLOCK + 1, 4)]
        found += [text[::-1][:BLOCK], text.hex().encode()[:32], self.text.encode("utf-16-le")[:32]]
        found += [  # base64 has three alignments
            base64.b64encode(b"\0" * shift + text)[4 : 4 + BLOCK] for shift in range(3)
        ]
        for tensor in (self.tensor, *derived):
            for encoded in _encodings(tensor):
                blocks = range(0, len(encoded) - BLOCK + 1, BLOCK)
                found += [encoded[i : i + BLOCK] for i in blocks]
        return tuple(dict.fromkeys(n for n in found if len(set(n)) > 4))  # not a run of zeros


def _encodings(tensor: torch.Tensor) -> Iterable[bytes]:
    values = tensor.detach().cpu().reshape(-1).numpy()
    values = values[: 64 * BLOCK].astype(np.float64)
    for kind in ("<f4", ">f4", "<f8", "<f2"):
        yield values.astype(kind).tobytes()
    if len(values) and values.min() >= 0 and values.max() <= 1:
        yield np.round(values * 255).astype(np.uint8).tobytes()


def find(needles: Iterable[bytes], haystack: bytes) -> bytes | None:
    """The first needle that is in it."""
    return next((needle for needle in needles if needle in haystack), None)
