"""Preparations: from raw records to a model's inputs. A modality is one file and one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from fedgraft_common.description import first_problem
from fedgraft_common.errors import BackboneError
from fedgraft_common.modality import Modality
from fedgraft_common.preparations.audio import AudioPreparation
from fedgraft_common.preparations.image import ImagePreparation
from fedgraft_common.preparations.pair import PairPreparation
from fedgraft_common.preparations.preparation import Preparation
from fedgraft_common.preparations.series import SeriesPreparation
from fedgraft_common.preparations.table import TablePreparation
from fedgraft_common.preparations.text import TextPreparation
from fedgraft_common.preparations.video import VideoPreparation

KINDS: dict[Modality, Any] = {
    "image": ImagePreparation,
    "text": TextPreparation,
    "audio": AudioPreparation,
    "series": SeriesPreparation,
    "tabular": TablePreparation,
    "video": VideoPreparation,
    "image-text": PairPreparation,
}


def build(
    settings: Mapping[str, Any],
    modality: Modality,
    directory: Path,
    where: str,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Preparation:
    """The preparation of a modality.

    Args:
        settings: its fields; those of the image part of a video stand beside its own.
        modality: which one.
        directory: where tokenizer and feature extractor lie.
        where: file, for the error.
        changes: the plan's `backbone.preprocessing`; of a pair, its parts' fields are meant.

    Raises:
        BackboneError: a field is missing or wrong, or the plan changes one that there is not.
    """
    parts = {"video": (ImagePreparation,), "image-text": (ImagePreparation, TextPreparation)}
    known = {
        name for kind in (KINDS[modality], *parts.get(modality, ())) for name in kind.model_fields
    }
    known -= {"modality", "directory", "image", "text"}
    for name, value in changes.items():
        if name not in known:
            raise BackboneError(
                f"plan: backbone.preprocessing.{name}", value, ", ".join(sorted(known)),
                "Correct the plan.",
            )  # fmt: skip
    given: dict[str, Any] = {"directory": directory, **settings, **changes}
    if modality == "video":
        given["image"] = {**settings.get("image", settings), **changes}
    if modality == "image-text":
        given["image"] = {**settings["image"], **changes}
        given["text"] = {"directory": directory, **settings["text"], **changes}
    try:
        found: Preparation = KINDS[modality].model_validate(given)
    except ValidationError as error:
        raise first_problem(error, where, "preprocessing") from None
    return found


__all__ = [
    "AudioPreparation",
    "ImagePreparation",
    "PairPreparation",
    "Preparation",
    "SeriesPreparation",
    "TablePreparation",
    "TextPreparation",
    "VideoPreparation",
    "build",
]
