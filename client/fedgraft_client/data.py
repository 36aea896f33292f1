"""A site's records, checked before they are used.

Shapes: N records, C channels, H x W pixels, K classes. The raw form of the inputs depends on the
modality (`fedgraft_common.modality.FORMS`); the backbone prepares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from fedgraft_client.tasks import Task
from fedgraft_common.errors import DataError
from fedgraft_common.modality import FORMS, Raw, count, fits, form_of


@dataclass(frozen=True, slots=True)
class Records:
    """Labelled records of one site.

    Attributes:
        inputs: raw, N records in the form of their modality; images are (N, C, H, W) float32 in
            [0, 1].
        labels: N records first; what they are is the task's, e.g. (N,) int64 indices of classes.
        units: (N,) int64, the unit of each record, numbered from 0 at this site with no number
            left out (`number_units`); None if every record is a unit of its own.
    """

    inputs: Raw
    labels: torch.Tensor
    units: torch.Tensor | None = None

    @property
    def unit_count(self) -> int:
        """U, how many units the records belong to."""
        return len(self) if self.units is None else len(self.units.unique())

    def __len__(self) -> int:
        return len(self.labels)


def check_records(records: Records, task: Task, site: str) -> None:
    """Refuses records that cannot be trained on.

    Raises:
        DataError: no records, a value that is not finite, a pixel outside [0, 1], labels that are
            not the task's, or units that are not numbered 0 to U-1.
    """
    check_unlabelled(records, site)
    task.check(records.labels, f"site {site}")


def check_unlabelled(records: Records, site: str) -> None:
    """The same, but for what the labels say.

    Raises:
        DataError: see `check_records`.
    """
    where = f"site {site}"
    if len(records) == 0:
        raise DataError(
            f"{where}: records", 0, "at least one record",
            "Check the data source, or leave the site out.",
        )  # fmt: skip
    _check_inputs(records, where)
    _check_units(records, where)


def _check_inputs(records: Records, where: str) -> None:
    """What holds for the raw records of each modality."""
    inputs = records.inputs
    if count(inputs) != len(records.labels):
        raise DataError(
            f"{where}: inputs", f"{count(inputs)} records", f"{len(records)}, one for each label",
            "Give one input and one label for each record.",
        )  # fmt: skip
    if not any(fits(inputs, modality) for modality in FORMS):
        raise DataError(
            f"{where}: inputs", form_of(inputs), "; or ".join(FORMS.values()),
            "Bring them into one of these forms.",
        )  # fmt: skip
    values = inputs[0] if isinstance(inputs, tuple) else inputs
    if not isinstance(values, torch.Tensor):
        return
    finite = torch.isfinite(values).flatten(1).all(dim=1)
    if not finite.all():
        broken = (~finite).nonzero().flatten().tolist()
        raise DataError(
            f"{where}: inputs", f"NaN or infinity in {len(broken)} records, first at {broken[0]}",
            "finite values", "Repair or remove these records.",
        )  # fmt: skip
    if not (fits(values, "image") or fits(values, "video")):
        return
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise DataError(
            f"{where}: inputs", f"values from {low:g} to {high:g}", "values in [0, 1]",
            "Scale by a public constant (255 for 8-bit images), never by the data's own range.",
        )  # fmt: skip


def _check_units(records: Records, where: str) -> None:
    units = records.units
    if units is None:
        return
    if units.dtype != torch.int64 or units.shape != (len(records),):
        raise DataError(
            f"{where}: units", f"{units.dtype}{tuple(units.shape)}",
            f"{len(records)} int64 unit numbers, one for each record",
            "Number the column with number_units.",
        )  # fmt: skip
    numbers = units.unique()  # sorted
    if not torch.equal(numbers, torch.arange(len(numbers))):
        raise DataError(
            f"{where}: units", f"numbers from {int(numbers[0])} to {int(numbers[-1])}",
            f"0 to {len(numbers) - 1}, for there are {len(numbers)} units",
            "A number without records would be sampled for nothing; number the column with "
            "number_units.",
        )  # fmt: skip


def number_units(column: np.ndarray[Any, Any], where: str) -> torch.Tensor:
    """Numbers the units of a column: (N,) int64 from 0, equal values get equal numbers.

    Args:
        column: (N,) strings or integers, one identifier for each record.
        where: file and column, for the error.

    Raises:
        DataError: another shape or type, or an empty identifier.
    """
    if column.ndim != 1 or column.dtype.kind not in "iuUS":
        raise DataError(
            where, f"{column.dtype}{column.shape}", "one string or integer for each record",
            "Write the identifiers as a flat array of strings or integers.",
        )  # fmt: skip
    values, numbers = np.unique(column, return_inverse=True)
    if column.dtype.kind in "US" and len(values) and not values[0]:
        raise DataError(
            where, "an empty identifier", "an identifier for every record",
            "Fill it in, or leave the record out: whom it belongs to decides what is protected.",
        )  # fmt: skip
    return torch.from_numpy(numbers.astype(np.int64))


def load_images(path: Path) -> torch.Tensor:
    """Images of an npz file with an array `images`: (N, C, H, W) float32 in [0, 1].

    Raises:
        DataError: no such file, or no such array, or one that is misshapen.
    """
    return to_images(load_arrays(path, ("images",))["images"], path)


def load_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray[Any, Any]]:
    """Named arrays of an npz file; pickled objects are refused.

    Raises:
        DataError: the file or an array cannot be read.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise DataError(
            str(path), str(error), f"an npz file with arrays {' and '.join(names)}",
            "Write it with numpy.savez(path, images=..., ...).",
        ) from None  # fmt: skip


def to_images(pixels: np.ndarray[Any, Any], path: Path) -> torch.Tensor:
    """(N, H, W[, C]) of uint8, or of floats in [0, 1], as (N, C, H, W) float32 in [0, 1].

    Raises:
        DataError: another shape or type.
    """
    if pixels.ndim not in (3, 4) or (pixels.dtype != np.uint8 and pixels.dtype.kind != "f"):
        raise DataError(
            f"{path}: images", f"{pixels.dtype}{pixels.shape}",
            "(records, height, width[, channels]) of 8-bit integers or floats in [0, 1]",
            "Reshape or scale the array.",
        )  # fmt: skip
    scale = 255.0 if pixels.dtype == np.uint8 else 1.0
    images = torch.tensor(pixels.astype(np.float32) / scale)
    return (images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)).contiguous()
