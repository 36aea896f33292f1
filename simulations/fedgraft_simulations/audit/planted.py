"""A canary string and a canary tensor in a site's data, and the search for them in what left.

The string is in every text that a site has: its own name, the data set's name, the name of a class,
and, as grey values, in a record. The tensor is another record's picture. Both are searched for in
every encoding that a careless line of code would use; a contiguous part of 32 bytes is enough to
be found.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from fedgraft_client.data import Records
from fedgraft_common.modality import Raw, is_pair

BLOCK = 16
"""Bytes of a needle: any leaked run of 31 bytes holds one whole block."""


@dataclass(frozen=True, slots=True)
class Canary:
    """What is planted.

    Attributes:
        text: unlike anything else, 24 letters and digits.
        tensor: one record's, float32 in [0, 1], random; (C, H, W) if the records are images.
    """

    text: str
    tensor: torch.Tensor

    @classmethod
    def draw(cls, records: Records, random: np.random.Generator) -> Canary:
        """A new one, in the form of these records; a row of numbers if they are texts."""
        inputs = records.inputs[0] if is_pair(records.inputs) else records.inputs
        shape = inputs.shape[1:] if isinstance(inputs, torch.Tensor) else (BLOCK,)
        letters = "".join(random.choice(list("ABCDEFGHJKLMNPQRSTUVWXYZ23456789"), size=18))
        pixels = random.random(shape, dtype=np.float32)
        return cls(f"canary{letters}", torch.from_numpy(pixels))

    def plant(self, records: Records) -> Records:
        """The records, with the tensor and the text as the values of the first two."""
        inputs = records.inputs
        planted: Raw
        if isinstance(inputs, torch.Tensor):
            planted = self._drawn(inputs)
        elif is_pair(inputs):
            planted = self._drawn(inputs[0]), self._written(inputs[1])
        else:
            planted = self._written(cast(Sequence[str], inputs))
        return Records(planted, records.labels, records.units)

    def _drawn(self, values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        values[0] = self.tensor
        if len(values) > 1:
            written = torch.frombuffer(bytearray(self.text.encode()), dtype=torch.uint8)
            flat = values[1].view(-1)
            size = min(len(flat), len(written))
            flat[:size] = written[:size].float() / 255
        return values

    def _written(self, texts: Sequence[str]) -> list[str]:
        return [self.text, *texts[1:]]

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
