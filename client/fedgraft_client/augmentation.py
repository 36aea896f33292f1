"""Several views of each record, whose gradients are averaged before they are clipped.

Formal guarantee: the views of a record are a function of that record and of public numbers alone
(the plan's seed and settings; the randomness is keyed by a hash of the record itself, not by its
place among the others), and their average gradient is clipped as one. So a step has the
sensitivity that it has without views, for adding or removing one unit, and costs the same epsilon
(De et al. 2022, "Unlocking high-accuracy differentially private image classification through
scale", section 3.2).

The views are drawn once and kept, so that the frozen part of the backbone sees each of them once.

Shapes: N records, K views of each, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from fedgraft_common.errors import PlanError
from fedgraft_common.modality import Raw
from fedgraft_common.plan import Augmentation

MAGNITUDES = {
    "image": ("flip", "shift", "rotate", "zoom", "brightness", "contrast", "noise"),
    "audio": ("shift", "contrast", "noise"),
    "series": ("shift", "contrast", "noise"),
    "tabular": ("noise",),
}
"""What makes views of each kind of record."""


def views(raw: Raw, settings: Augmentation, seed: int, modality: str) -> Raw:
    """K views of each record, next to each other; the first is the record itself.

    Args:
        raw: N records: images, audio, series or tabular.
        settings: the plan's.
        seed: the plan's.
        modality: of the records.

    Returns:
        N * K records of the same form.

    Raises:
        PlanError: records of this modality have no views, or all would be the same.
    """
    if settings.views == 1:
        return raw
    _check_modality(settings, modality)
    if not isinstance(raw, torch.Tensor):
        raise TypeError("records of one form")
    make = {"image": _picture, "audio": _signal, "series": _signal, "tabular": _noisy}[modality]
    found = raw.new_empty(len(raw), settings.views, *raw.shape[1:])
    for i, record in enumerate(raw):
        generator = _generator(record, seed)
        found[i, 0] = record
        for k in range(1, settings.views):
            found[i, k] = make(record, settings, generator)
    return found.flatten(0, 1)


def _generator(record: torch.Tensor, seed: int) -> torch.Generator:
    """Randomness that belongs to a record, wherever it stands and whoever stands beside it."""
    digest = hashlib.sha256(f"fedgraft views {seed}".encode())
    digest.update(record.contiguous().numpy().tobytes())
    return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "big") >> 1)


def _uniform(generator: torch.Generator, most: float) -> float:
    """Between -most and most."""
    return float(2 * torch.rand((), generator=generator) - 1) * most


def _picture(image: torch.Tensor, settings: Augmentation, g: torch.Generator) -> torch.Tensor:
    """(C, H, W): turned, moved, zoomed, mirrored, and in another light."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    height, width = image.shape[1:]
    moved = [
        round(_uniform(g, settings.shift) * width),
        round(_uniform(g, settings.shift) * height),
    ]
    found: torch.Tensor = functional.affine(
        image, angle=_uniform(g, settings.rotate), translate=moved,
        scale=1 + _uniform(g, settings.zoom), shear=[0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
    )  # fmt: skip
    if settings.flip and bool(torch.rand((), generator=g) < 0.5):
        found = found.flip(-1)
    mean = found.mean()
    found = (found - mean) * (1 + _uniform(g, settings.contrast)) + mean
    return _noisy(found + _uniform(g, settings.brightness), settings, g).clamp(0, 1)


def _signal(signal: torch.Tensor, settings: Augmentation, g: torch.Generator) -> torch.Tensor:
    """(samples, ...): moved in time with silence before or after it, and louder or softer."""
    places = round(_uniform(g, settings.shift) * len(signal))
    found = torch.zeros_like(signal)
    kept = len(signal) - abs(places)
    start, target = max(0, -places), max(0, places)
    found[target : target + kept] = signal[start : start + kept]
    return _noisy(found * (1 + _uniform(g, settings.contrast)), settings, g)


def _noisy(values: torch.Tensor, settings: Augmentation, g: torch.Generator) -> torch.Tensor:
    if settings.noise == 0:
        return values
    return values + settings.noise * torch.randn(values.shape, generator=g)


def check_views(settings: Augmentation, modality: str, features: str, kind: str) -> None:
    """Refuses views that cannot be made, or that would make labels wrong.

    Args:
        settings: the plan's.
        modality: of the records.
        features: what the task's head takes.
        kind: of the task.

    Raises:
        PlanError: records of this modality have no views, or all would be the same; or the task is
            about places in the record, and the views would move them.
    """
    if settings.views == 1:
        return
    _check_modality(settings, modality)
    moves: dict[str, Any] = {
        "flip": settings.flip, "shift": settings.shift, "rotate": settings.rotate,
        "zoom": settings.zoom,
    }  # fmt: skip
    named = [name for name, value in moves.items() if value]
    if features != "pooled" and named:
        raise PlanError(
            f"augmentation.{named[0]}", moves[named[0]], f"nothing that moves, for {kind}: its "
            "labels say where things are", "Keep brightness, contrast and noise only.",
        )  # fmt: skip


def _check_modality(settings: Augmentation, modality: str) -> None:
    if modality not in MAGNITUDES:
        raise PlanError(
            "augmentation.views", settings.views, f"1 for {modality}: views are made of images, "
            "audio, series and tabular records", "Set augmentation.views = 1 in the plan.",
        )  # fmt: skip
    names = MAGNITUDES[modality]
    if not any(getattr(settings, name) for name in names):
        raise PlanError(
            "augmentation.views", settings.views,
            f"1, as long as nothing makes views of {modality} records differ: "
            + ", ".join(f"augmentation.{name}" for name in names),
            "Set one of these above 0, or views = 1.",
        )  # fmt: skip
