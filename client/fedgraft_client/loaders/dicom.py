"""DICOM folders: X-rays, slices of CT and MR, ultrasound, as the scanner's archive wrote them.

A file's pixels become what a radiologist would see: stored values through the rescale slope and
intercept to the modality's unit (Hounsfield units for CT), through a grey window, and inverted if
the file says that white is low (MONOCHROME1); colours are RGB, also those of a palette. Every
constant of it is in the file itself or in `data.window`; nothing is taken from other files. DICOM
PS3.3, C.7.6.3.1.2 and C.11.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft_client.loaders.folder import METADATA, open_folder
from fedgraft_client.loaders.image import content_of, fit
from fedgraft_client.loaders.table import Broken, Table
from fedgraft_common.errors import DataError
from fedgraft_common.reading import Reading

TAGS = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "Modality",
        "StudyDescription", "SeriesDescription", "PatientSex", "PatientAge", "ViewPosition",
        "Laterality", "BodyPartExamined")  # fmt: skip
"""Header fields that may be a label or a unit, by their DICOM keyword."""


def open_dicom(path: Path, reading: Reading) -> Table:
    """A folder of DICOM files, with or without metadata; see `open_folder`.

    Header fields in `TAGS` are columns too, so that the unit may be `PatientID`.

    Raises:
        DataError: pydicom is not installed, no such folder, or no file in it.
    """
    try:
        import pydicom  # noqa: F401 - here, so that one error stands for all files
    except ImportError:
        raise DataError(
            "data.source", "DICOM files, and no pydicom on this machine",
            "pydicom, which reads them", "Install it: pip install 'fedgraft[dicom]'.",
        ) from None  # fmt: skip
    described = any((path / name).is_file() for name in METADATA)
    table = open_folder(path, reading, "image", () if described else (".dcm", ".dicom", ""))
    tags = tuple(tag for tag in TAGS if tag not in table.columns)

    def batches(wanted: tuple[str, ...]) -> Iterator[dict[str, list[Any]]]:
        own = tuple(name for name in wanted if name in table.columns)
        asked = tuple(name for name in wanted if name in tags)
        for batch in table.batches((*own, "image") if "image" not in own else own):
            headers = [_header(value, table.folder, asked) for value in batch["image"]]
            yield batch | {tag: [header[tag] for header in headers] for tag in asked}

    return Table(
        table.origin, (*table.columns, *tags), batches, table.folder, table.names, table.media
    )


def _header(value: Any, folder: Path, tags: tuple[str, ...]) -> dict[str, str | None]:
    """Header fields of a file; None where a field, or the file, is missing."""
    if not tags:
        return {}
    import pydicom

    try:
        found = pydicom.dcmread(
            content_of(value, folder), stop_before_pixels=True, specific_tags=list(tags)
        )
    except Exception:  # the reader of the pixels says what is wrong
        return dict.fromkeys(tags)
    return {tag: str(found[tag].value) if tag in found and found[tag].value else None
            for tag in tags}  # fmt: skip


class DicomReader:
    """Reads DICOM files with pydicom.

    Args:
        column: that holds their paths.
        folder: what relative paths are relative to.
        reading: size and window.
    """

    def __init__(self, column: str, folder: Path, reading: Reading) -> None:
        self.columns = (column,)
        self._folder = folder
        self._reading = reading

    def __call__(self, values: list[Any]) -> torch.Tensor:
        """(1, H, W) float32 in [0, 1], (3, H, W) if the file has colours.

        Raises:
            Broken: missing, no DICOM file, no pixels, several frames, or compressed in a way that
                this machine cannot undo.
        """
        import pydicom

        source = content_of(values[0], self._folder)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # values that break a rule of their field
                file = pydicom.dcmread(source)
        except FileNotFoundError:
            raise Broken("no such file") from None
        except Exception as error:  # whatever a damaged header does
            raise Broken(f"not a DICOM file: {str(error).splitlines()[0]}") from None
        if "PixelData" not in file:
            what = file.get("Modality", "unknown modality")
            raise Broken(f"DICOM without pixels ({what}): a report or a structure, not an image")
        if int(file.get("NumberOfFrames", 1) or 1) > 1:
            raise Broken(f"{file.NumberOfFrames} frames; write one file for each frame")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                grey = self._grey(file)
        except Exception as error:  # decoders fail in many ways
            raise Broken(f"damaged pixels: {str(error).splitlines()[0]}") from None
        image = torch.from_numpy(np.ascontiguousarray(grey, dtype=np.float32))
        image = image[None] if image.dim() == 2 else image.permute(2, 0, 1).contiguous()
        return fit(image.clamp(0, 1), self._reading.size)

    def _grey(self, file: Any) -> NDArray[np.float64]:
        from pydicom.pixels import (
            apply_color_lut,
            apply_rescale,
            apply_windowing,
            convert_color_space,
        )

        pixels: NDArray[Any] = file.pixel_array
        kind = str(file.get("PhotometricInterpretation", "MONOCHROME2"))
        bits = int(file.BitsStored)
        if kind == "PALETTE COLOR":  # stored values are places in the file's own table of colours
            looked_up = apply_color_lut(pixels, file)
            rgb: NDArray[np.float64] = looked_up.astype(np.float64) / np.iinfo(looked_up.dtype).max
            return rgb
        if pixels.ndim == 3:
            if kind.startswith("YBR") and not _decoded_to_rgb(file):
                pixels = convert_color_space(pixels, kind, "RGB")
            colours: NDArray[np.float64] = pixels.astype(np.float64) / (2**bits - 1)
            return colours
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        if int(file.get("PixelRepresentation", 0)) == 0:
            low, high = 0, 2**bits - 1
        window = self._reading.window
        if window is not None:
            values = apply_rescale(pixels, file).astype(np.float64)
            centre, width = window
            shown = (values - (centre - width / 2)) / width
        elif "WindowWidth" in file and file.WindowWidth:
            values = apply_windowing(apply_rescale(pixels, file), file).astype(np.float64)
            edges = apply_rescale(np.array([low, high]), file).astype(np.float64)
            shown = (values - edges.min()) / (edges.max() - edges.min())
        else:
            shown = (pixels.astype(np.float64) - low) / (high - low)
        grey: NDArray[np.float64] = shown.clip(0, 1)
        return 1 - grey if kind == "MONOCHROME1" else grey


def _decoded_to_rgb(file: Any) -> bool:
    """JPEG decoders of pydicom give RGB for YBR files already."""
    return bool(file.file_meta.TransferSyntaxUID.is_compressed)
