"""DICOM files as a radiologist sees them, and those that hold no image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from fedgraft_client.loaders import load
from fedgraft_client.tasks import build_task
from fedgraft_common.errors import DataError
from fedgraft_common.reading import Reading
from fedgraft_common.task_spec import TaskSpec

TASK = build_task(TaskSpec(classes=("healthy", "ill")))
STORED = np.array([[0, 1000], [2000, 4095]], dtype=np.uint16)


def write(path: Path, pixels: Any = STORED, patient: str = "Ä-1", **fields: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SpecificCharacterSet = "ISO_IR 192"
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, generate_uid()
    file.PatientID, file.Modality = patient, "CT"
    if pixels is not None:
        file.Rows, file.Columns = pixels.shape[:2]
        file.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
        file.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
        if pixels.ndim == 3:
            file.PlanarConfiguration = 0
        file.BitsAllocated = pixels.dtype.itemsize * 8
        file.BitsStored, file.HighBit = (12, 11) if pixels.dtype.itemsize == 2 else (8, 7)
        file.PixelRepresentation = int(pixels.dtype.kind == "i")
        file.PixelData = pixels.tobytes()
    for name, value in fields.items():
        setattr(file, name, value)
    file.save_as(path, enforce_file_format=True)
    return path


def seen(folder: Path, **changes: Any) -> torch.Tensor:
    found = load(f"dicom:{folder}", Reading(**changes), TASK).records.inputs
    assert isinstance(found, torch.Tensor)
    return found


def test_without_a_window_the_stored_bits_are_the_range(tmp_path: Path) -> None:
    write(tmp_path / "ill" / "a.dcm")
    assert torch.allclose(seen(tmp_path)[0, 0], torch.from_numpy(STORED / 4095).float())


def test_slope_intercept_and_the_sites_own_window(tmp_path: Path) -> None:
    """Hounsfield units -1000, 0, 1000, 3095 in a window of -100 to 900."""
    write(tmp_path / "ill" / "a.dcm", RescaleSlope=1, RescaleIntercept=-1000)
    found = seen(tmp_path, window=(400, 1000))[0, 0]
    assert torch.allclose(found, torch.tensor([[0.0, 0.1], [1.0, 1.0]]))


def test_the_files_window(tmp_path: Path) -> None:
    write(
        tmp_path / "ill" / "a.dcm", RescaleSlope=1, RescaleIntercept=-1000,
        WindowCenter=500, WindowWidth=1000, VOILUTFunction="LINEAR_EXACT",
    )  # fmt: skip
    assert torch.allclose(seen(tmp_path)[0, 0], torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    write(
        tmp_path / "ill" / "a.dcm", RescaleSlope=1, RescaleIntercept=-1000,
        WindowCenter=0, WindowWidth=2000, VOILUTFunction="LINEAR_EXACT",
    )  # fmt: skip
    assert torch.allclose(seen(tmp_path)[0, 0], torch.tensor([[0.0, 0.5], [1.0, 1.0]]))


def test_white_may_be_low(tmp_path: Path) -> None:
    write(tmp_path / "ill" / "a.dcm", PhotometricInterpretation="MONOCHROME1")
    assert torch.allclose(seen(tmp_path)[0, 0], 1 - torch.from_numpy(STORED / 4095).float())


def test_signed_values(tmp_path: Path) -> None:
    write(tmp_path / "ill" / "a.dcm", np.array([[-2048, 2047]], dtype=np.int16))
    assert seen(tmp_path)[0, 0].tolist() == [[0, 1]]


def test_colours(tmp_path: Path) -> None:
    write(tmp_path / "ill" / "a.dcm", np.full((2, 3, 3), 255, np.uint8))
    assert seen(tmp_path).shape == (1, 3, 2, 3)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_gives_colours(tmp_path: Path, bits: int) -> None:
    """Ultrasound: a stored value is a line in a table, and says nothing about how bright it is."""
    most = 2**bits - 1
    kind = np.uint8 if bits == 8 else np.uint16
    table = {"Red": (most, 0, 0), "Green": (0, most, 0), "Blue": (0, 0, most)}
    fields: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, values in table.items():
        data = np.array([*values, 0], kind).tobytes()
        fields[f"{colour}PaletteColorLookupTableDescriptor"] = [4, 0, bits]
        fields[f"{colour}PaletteColorLookupTableData"] = data
    write(tmp_path / "ill" / "a.dcm", np.array([[0, 1], [2, 3]], np.uint8), **fields)
    red, green, blue = seen(tmp_path)[0].tolist()
    assert red == [[1, 0], [0, 0]]
    assert green == [[0, 1], [0, 0]]
    assert blue == [[0, 0], [1, 0]]


def test_the_patient_is_the_unit(tmp_path: Path) -> None:
    for number, patient in enumerate(("Ä-1", "B", "Ä-1")):
        write(tmp_path / "ill" / f"{number}.dcm", patient=patient)
    found = load(f"dicom:{tmp_path}", Reading(), TASK, unit="PatientID").records
    assert found.units is not None
    assert found.units.tolist() == [0, 1, 0]
    write(tmp_path / "ill" / "9.dcm", patient="")
    with pytest.raises(DataError, match=r"ill/9\.dcm: no PatientID, so whom it belongs to"):
        load(f"dicom:{tmp_path}", Reading(), TASK, unit="PatientID")


def test_labels_from_metadata(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    (tmp_path / "metadata.csv").write_text("file_name,finding\nb,ill\na,healthy\n", "utf-8")
    found = load(f"dicom:{tmp_path}", Reading(label="finding"), TASK, unit="PatientID").records
    assert found.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: write(p, None, Modality="SR"), r"DICOM without pixels \(SR\)"),
        (lambda p: p.write_text("no header"), "not a DICOM file"),
        (lambda p: write(p, NumberOfFrames=2), "2 frames; write one file for each frame"),
        (lambda p: truncate(write(p)), "damaged pixels|not a DICOM file"),
    ],
)
def test_files_that_hold_no_image(tmp_path: Path, make: Any, words: str) -> None:
    write(tmp_path / "ill" / "a.dcm")
    make(tmp_path / "ill" / "x.dcm")
    with pytest.raises(DataError, match=rf"1 broken records: found .ill/x\.dcm: ({words})"):
        seen(tmp_path)
    assert len(seen(tmp_path, skip_broken=True)) == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    assert pydicom.dcmread(write(tmp_path / "a.dcm")).PatientID == "Ä-1"
