"""Records that cannot be trained on: the text names the site, what was found and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft_client.data import (
    Records,
    check_records,
    load_arrays,
    load_images,
    number_units,
    to_images,
)
from fedgraft_client.tasks import build_task
from fedgraft_common.errors import DataError
from fedgraft_common.task_spec import TaskSpec

CLASSES = ("ill", "well")
TASK = build_task(TaskSpec(classes=CLASSES))


def pixels(records: Records) -> torch.Tensor:
    assert isinstance(records.inputs, torch.Tensor)
    return records.inputs


def records(count: int = 4) -> Records:
    return Records(torch.rand(count, 1, 8, 8), torch.arange(count) % 2)


def spoilt(value: float) -> Records:
    broken = records()
    pixels(broken)[2, 0, 3, 3] = value
    return broken


def labelled(*labels: int) -> Records:
    return Records(torch.rand(len(labels), 1, 8, 8), torch.tensor(labels))


def test_good_records_pass() -> None:
    check_records(records(), TASK, "north")
    check_records(Records(torch.ones(1, 3, 2, 2), torch.tensor([0])), TASK, "north")
    check_records(Records(torch.zeros(1, 3, 2, 2), torch.tensor([1])), TASK, "north")


REFUSED: list[tuple[str, Callable[[], Records], tuple[str, ...], list[str]]] = [
    ("NaN", lambda: spoilt(math.nan), CLASSES, ["NaN", "1 records", "first at 2", "Repair"]),
    ("infinity", lambda: spoilt(math.inf), CLASSES, ["infinity", "first at 2", "Repair"]),
    ("too bright", lambda: spoilt(255.0), CLASSES, ["255", "[0, 1]", "public constant"]),
    ("negative", lambda: spoilt(-0.5), CLASSES, ["-0.5", "[0, 1]", "public constant"]),
    ("no records", lambda: records(0), CLASSES, ["0", "at least one record", "Check the data"]),
    ("one class", records, ("ill",), ["ill", "at least two classes", "list every class"]),
    ("no class", records, (), ["none", "at least two classes", "list every class"]),
    ("label above", lambda: labelled(0, 7), CLASSES, ["7", "0 to 1", "ill, well", "label map"]),
    ("label below", lambda: labelled(0, -1), CLASSES, ["-1", "0 to 1", "label map"]),
    (
        "one dimension",
        lambda: Records(torch.rand(4), torch.zeros(4, dtype=torch.int64)),
        CLASSES,
        ["float32(4,)", "channels, height, width", "one of these forms"],
    ),
    (
        "fewer images than labels",
        lambda: Records(torch.rand(3, 1, 8, 8), torch.zeros(4, dtype=torch.int64)),
        CLASSES,
        ["3 records", "4, one for each label", "one input and one label"],
    ),
    (
        "a column of labels",
        lambda: Records(torch.rand(4, 1, 8, 8), torch.zeros(4, 1, dtype=torch.int64)),
        CLASSES,
        ["labels"],
    ),
    (
        "labels that are not whole numbers",
        lambda: Records(torch.rand(4, 1, 8, 8), torch.zeros(4)),
        CLASSES,
        ["labels"],
    ),
    (
        "images that are not float32",
        lambda: Records(torch.rand(4, 1, 8, 8).double(), torch.zeros(4, dtype=torch.int64)),
        CLASSES,
        ["inputs", "float64(4, 1, 8, 8)", "float32"],
    ),
    ("twice the same class", records, ("ill", "ill"), ["classes", "ill"]),
]


@pytest.mark.parametrize(
    ("make", "classes", "parts"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_bad_records_are_refused(
    make: Callable[[], Records], classes: tuple[str, ...], parts: list[str]
) -> None:
    with pytest.raises(DataError) as refusal:
        check_records(make(), build_task(TaskSpec(classes=classes), where="site north"), "north")
    for part in ["site north", *parts]:
        assert part in str(refusal.value)


def saved(path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Path:
    np.savez(path, images=array)
    return path


def test_eight_bit_grey_images_are_scaled_by_255(tmp_path: Path) -> None:
    pixels = np.array([[[0, 51], [102, 255]]], dtype=np.uint8)
    images = load_images(saved(tmp_path / "a.npz", pixels))
    assert images.dtype == torch.float32
    assert images.shape == (1, 1, 2, 2)
    assert torch.allclose(images, torch.tensor([[[[0, 0.2], [0.4, 1.0]]]]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_are_taken_as_they_are(tmp_path: Path, dtype: type[np.floating]) -> None:
    pixels = np.array([[[0, 0.25], [0.5, 1]]], dtype=dtype)
    images = load_images(saved(tmp_path / "a.npz", pixels))
    assert images.dtype == torch.float32
    assert images.flatten().tolist() == [0, 0.25, 0.5, 1]


def test_channels_come_last_in_a_file_and_first_in_memory(tmp_path: Path) -> None:
    pixels = np.zeros((2, 4, 5, 3), dtype=np.uint8)
    pixels[1, 2, 3] = (10, 20, 30)
    images = load_images(saved(tmp_path / "a.npz", pixels))
    assert images.shape == (2, 3, 4, 5)
    assert (images[1, :, 2, 3] * 255).tolist() == pytest.approx([10, 20, 30])


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((2, 4, 4), dtype=np.int64),
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((1, 2, 3, 4, 5), dtype=np.float32),
        np.zeros((2, 4, 4), dtype=np.complex64),
    ],
)
def test_other_arrays_are_refused(
    pixels: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
) -> None:
    with pytest.raises(DataError, match="8-bit integers or floats"):
        to_images(pixels, Path("x.npz"))


def write_pickle(path: Path) -> None:
    np.savez(path, images=np.array([{"a": 1}], dtype=object))


def write_npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def write_torn_archive(path: Path) -> None:
    np.savez(path, images=np.zeros((9, 8, 8)))
    path.write_bytes(path.read_bytes()[:400])


BAD_FILES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "pickle": write_pickle,
    "one array": write_npy,
    "torn": write_torn_archive,
    "other names": lambda path: np.savez(path, pictures=np.zeros((1, 2, 2))),
}


@pytest.mark.parametrize("kind", list(BAD_FILES))
def test_files_that_cannot_be_read_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "records.npz"
    BAD_FILES[kind](path)
    with pytest.raises(DataError) as refusal:
        load_images(path)
    for part in (str(path), "array", "numpy.savez"):
        assert part in str(refusal.value)


def test_several_arrays_of_one_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 3, 3)), labels=np.array([1, 0]))
    arrays = load_arrays(tmp_path / "a.npz", ("images", "labels"))
    assert arrays["labels"].tolist() == [1, 0]


# --- units


def test_equal_identifiers_get_equal_numbers_without_gaps() -> None:
    names = number_units(np.array(["b", "a", "b", "c"]), "x")
    assert (names.tolist(), names.dtype) == ([1, 0, 1, 2], torch.int64)
    assert number_units(np.array([70, -3, 70], np.int32), "x").tolist() == [1, 0, 1]
    assert number_units(np.array([b"q", b"p"]), "x").tolist() == [1, 0]
    check_records(Records(torch.rand(4, 1, 8, 8), torch.arange(4) % 2, names), TASK, "north")


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (np.array([1.0, 2.0]), r"float64\(2,\).*one string or integer"),
        (np.array([True, False]), "bool"),
        (np.array([["a"], ["b"]]), r"\(2, 1\)"),
        (np.array("a"), "one string or integer for each record"),
        (np.array(["a", ""]), "an empty identifier.*whom it belongs to decides"),
        (np.array([b"", b"a"]), "an empty identifier"),
    ],
    ids=["floats", "booleans", "nested", "one", "empty", "empty bytes"],
)
def test_a_column_that_names_no_units(column: np.ndarray[Any, Any], text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        number_units(column, "data.npz: patient_id")
    assert caught.value.field == "data.npz: patient_id"


@pytest.mark.parametrize(
    ("units", "text"),
    [
        (torch.tensor([0, 0, 1]), "4 int64 unit numbers, one for each record"),
        (torch.tensor([0, 0, 1, 1], dtype=torch.int32), "int32.*Number the column"),
        (
            torch.tensor([0, 0, 2, 2]),
            "numbers from 0 to 2'; allowed: 0 to 1, for there are 2 units",
        ),
        (torch.tensor([1, 1, 2, 2]), "0 to 1"),
        (torch.tensor([-1, 0, 1, 1]), "numbers from -1 to 1"),
    ],
)
def test_units_that_are_not_numbered_from_zero(units: torch.Tensor, text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        check_records(Records(torch.rand(4, 1, 8, 8), torch.arange(4) % 2, units), TASK, "north")
    assert caught.value.field == "site north: units"


def test_unit_count() -> None:
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4) % 2
    assert Records(images, labels).unit_count == 4
    assert Records(images, labels, torch.tensor([0, 1, 0, 1])).unit_count == 2
