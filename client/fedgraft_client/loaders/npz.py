"""npz files: arrays that somebody prepared, records first."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft_client.data import Records, load_arrays, number_units, to_images
from fedgraft_client.tasks import IGNORED, Task
from fedgraft_client.tasks.reading import Written
from fedgraft_common.errors import DataError
from fedgraft_common.modality import FORMS, Modality
from fedgraft_common.reading import Reading

ARRAYS: dict[str, Modality] = {
    "images": "image", "audio": "audio", "series": "series", "tabular": "tabular",
    "video": "video", "texts": "text",
}  # fmt: skip
"""What the array of inputs is called, and what it then holds."""


def load_npz(
    path: Path, reading: Reading, task: Task | None, unit: str, extra: tuple[str, ...] = ()
) -> tuple[Modality, Records, tuple[str, ...], dict[str, list[Any]]]:
    """An npz file with one of `ARRAYS` and `labels`.

    Args:
        path: the file.
        reading: which arrays, if they are called otherwise.
        task: what the labels mean; None: there are none.
        unit: `record`, or the array that says whose a record is.
        extra: arrays to hand back.

    Returns:
        What a record is, the records, names of all arrays, and the values of `extra`.

    Raises:
        DataError: an array is missing or misshapen, or the labels are not the task's.
    """
    names = _names(path)
    array, modality = _input(path, names, reading)
    label = reading.label if isinstance(reading.label, str) else reading.label[0]
    label = "labels" if label == "label" else label
    wants_label = task is not None and task.spec.kind != "language-modelling"
    wanted = [array, *[label] * wants_label, *[unit] * (unit != "record"), *extra]
    for name in wanted:
        if name not in names:
            raise DataError(
                f"{path}: {name}", "no such array", "one of " + ", ".join(names),
                f"Write it with numpy.savez(path, {name}=..., ...), or name another.",
            )  # fmt: skip
    arrays = load_arrays(path, tuple(dict.fromkeys(wanted)))
    inputs = _inputs(arrays[array], modality, f"{path}: {array}")
    labels = torch.full((len(inputs), 1), IGNORED)  # a text is its own label
    if task is not None and wants_label:
        labels = _labels(arrays[label], task, reading, f"{path}: {label}")
    units = None if unit == "record" else number_units(arrays[unit], f"{path}: {unit}")
    if units is not None and len(units) != len(inputs):
        raise DataError(
            f"{path}: {unit}", f"{len(units)} identifiers", f"{len(inputs)}, one for each record",
            "Write one identifier for each record.",
        )  # fmt: skip
    more = {name: arrays[name].tolist() for name in extra}
    return modality, Records(inputs, labels, units), names, more


def _names(path: Path) -> tuple[str, ...]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return tuple(file.files)
    except (OSError, ValueError, AttributeError, EOFError, BadZipFile) as error:
        raise DataError(
            str(path), str(error), "an npz file with arrays images and labels",
            "Write it with numpy.savez(path, images=..., labels=...).",
        ) from None  # fmt: skip


def _input(path: Path, names: tuple[str, ...], reading: Reading) -> tuple[str, Modality]:
    if reading.input != "auto":
        name = reading.input if isinstance(reading.input, str) else reading.input[0]
        known = ARRAYS.get(name, "image")
        return name, known if reading.modality == "auto" else reading.modality
    for name, modality in ARRAYS.items():
        if name in names and reading.modality in ("auto", modality):
            return name, modality
    raise DataError(
        f"{path}: inputs",
        "arrays " + ", ".join(names),
        "an array named " + ", ".join(ARRAYS),
        "Rename it, or name it in data.input.",
    )


def _inputs(array: NDArray[Any], modality: Modality, where: str) -> Any:
    if modality == "image":
        return to_images(array, Path(where.rpartition(": ")[0]))
    if modality == "text":
        if array.ndim != 1 or array.dtype.kind not in "US":
            raise DataError(where, f"{array.dtype}{array.shape}", FORMS["text"], "Write strings.")
        return [str(text) for text in array]
    wide = array
    if modality == "video" and array.ndim == 5:
        scale = 255.0 if array.dtype == np.uint8 else 1.0
        wide = np.moveaxis(array, -1, 2).astype(np.float32) / scale
    dimensions = {"audio": 2, "series": 3, "tabular": 2, "video": 5}[modality]
    if wide.ndim != dimensions or wide.dtype.kind not in "fiu":
        raise DataError(where, f"{array.dtype}{array.shape}", FORMS[modality], "Reshape the array.")
    return torch.from_numpy(np.ascontiguousarray(wide, dtype=np.float32))


def _labels(array: NDArray[Any], task: Task, reading: Reading, where: str) -> torch.Tensor:
    if array.dtype.kind in "US":
        read = task.read(Written([array.tolist()], reading.label_map))
        if read.unknown:
            raise DataError(
                where, next(iter(read.unknown.values())), ", ".join(task.spec.classes),
                "Add it to data.label_map, or correct the labels.",
            )  # fmt: skip
        return read.values
    whole = task.dtype is torch.int64
    if array.dtype.kind not in ("iub" if whole else "fiub"):
        raise DataError(
            where, f"{array.dtype}{array.shape}",
            "one class number per record" if whole else "numbers",
            "Write an integer for each record, in the order of `classes`.",
        )  # fmt: skip
    return torch.from_numpy(array.astype(np.int64 if whole else np.float32))
