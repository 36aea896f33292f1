"""The kinds of raw records, and what works on all of them: counting them and choosing some.

A site loads raw records; the backbone prepares them for its model (`Backbone.prepare`). So a data
loader need not know the model, and the same records serve any backbone of their modality.

Shapes: N records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, TypeGuard, cast

import torch

Modality: TypeAlias = Literal[
    "image", "audio", "series", "tabular", "video", "text", "image-text"
]  # fmt: skip
Raw: TypeAlias = torch.Tensor | Sequence[str] | tuple[torch.Tensor, Sequence[str]]
"""Raw records of one site; which form, see `FORMS`."""

FORMS: Final[dict[Modality, str]] = {
    "image": "images (records, channels, height, width), float32 in [0, 1]",
    "audio": "sound (records, samples), float32",
    "series": "time series (records, time, channels), float32",
    "tabular": "rows (records, columns), float32",
    "video": "videos (records, frames, channels, height, width), float32 in [0, 1]",
    "text": "a sequence of strings, one for each record",
    "image-text": "a pair: images (records, channels, height, width) and as many strings",
}
"""What raw records of each modality look like, for documents and errors."""
DIMENSIONS: Final[dict[Modality, int]] = {
    "image": 4, "audio": 2, "series": 3, "tabular": 2, "video": 5
}  # fmt: skip
"""Dimensions of the tensor, for the modalities that are one."""


def is_pair(raw: Raw) -> TypeGuard[tuple[torch.Tensor, Sequence[str]]]:
    """Whether raw records are a pair of images and texts."""
    return isinstance(raw, tuple) and len(raw) == 2 and isinstance(raw[0], torch.Tensor)


def count(raw: Raw) -> int:
    """N, how many records there are."""
    return len(raw[0]) if is_pair(raw) else len(raw)


def take(raw: Raw, where: slice | torch.Tensor) -> Raw:
    """Some of the records, in the order asked for.

    Args:
        raw: of any modality.
        where: a slice, indices (M,) int64 or a mask (N,) bool.
    """
    if isinstance(raw, torch.Tensor):
        return raw[where]
    if is_pair(raw):
        images, texts = raw
        return images[where], _strings(texts, where)
    return _strings(cast(Sequence[str], raw), where)


def _strings(texts: Sequence[str], where: slice | torch.Tensor) -> Sequence[str]:
    if isinstance(where, slice):
        return texts[where]
    indices = where.nonzero().flatten() if where.dtype is torch.bool else where
    return [texts[i] for i in indices.tolist()]


def form_of(raw: object) -> str:
    """What was found, for an error: shape and dtype, or type and length."""
    if isinstance(raw, torch.Tensor):
        return f"{raw.dtype}{tuple(raw.shape)}".removeprefix("torch.")
    if isinstance(raw, tuple) and len(raw) == 2 and isinstance(raw[0], torch.Tensor):
        return f"a pair of {form_of(raw[0])} and {form_of(raw[1])}"
    if isinstance(raw, Sequence) and not isinstance(raw, str):
        return f"{len(raw)} of {type(raw[0]).__name__ if len(raw) else 'nothing'}"
    return type(raw).__name__


def fits(raw: object, modality: Modality) -> bool:
    """Whether raw records have the form of a modality (dtype and dimensions; not the values)."""
    if modality in DIMENSIONS:
        return (
            isinstance(raw, torch.Tensor)
            and raw.dtype is torch.float32
            and raw.dim() == DIMENSIONS[modality]
        )
    if modality == "text":
        return (
            isinstance(raw, Sequence)
            and not isinstance(raw, str)
            and all(isinstance(text, str) for text in raw)
        )
    return (
        isinstance(raw, tuple)
        and len(raw) == 2
        and fits(raw[0], "image")
        and fits(raw[1], "text")
        and len(raw[0]) == len(raw[1])
    )
