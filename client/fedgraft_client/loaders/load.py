"""From a source to records: opened, read one by one, labelled, and everything broken named.

Shapes: N records.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from fedgraft_client.data import Records
from fedgraft_client.loaders import audio, image
from fedgraft_client.loaders.audio import AudioReader
from fedgraft_client.loaders.columns import ColumnsReader
from fedgraft_client.loaders.csv import open_csv
from fedgraft_client.loaders.dicom import DicomReader, open_dicom
from fedgraft_client.loaders.folder import open_folder
from fedgraft_client.loaders.hub import open_hub
from fedgraft_client.loaders.image import ImageReader
from fedgraft_client.loaders.mask import MaskReader
from fedgraft_client.loaders.npz import load_npz
from fedgraft_client.loaders.rows import Rows
from fedgraft_client.loaders.series import SeriesReader
from fedgraft_client.loaders.table import Broken, Table
from fedgraft_client.loaders.text import TextReader
from fedgraft_client.tasks import IGNORED, Task
from fedgraft_client.tasks.reading import Labels, Written
from fedgraft_common.errors import DataError
from fedgraft_common.modality import Modality, Raw
from fedgraft_common.reading import SOURCES, Reading, split_source

log = logging.getLogger(__name__)
SHOWN = 5  # broken records that an error lists


@dataclass(slots=True)
class Loaded:
    """What a source holds.

    Attributes:
        origin: file or folder.
        modality: what a record is.
        records: those that can be used.
        broken: where, and why not, of the others.
        unknown: label values that the task does not know, and how often each occurs.
        columns: all columns of the source.
        extra: columns that were asked for besides, one value for each record.
    """

    origin: str
    modality: Modality
    records: Records
    broken: list[tuple[str, str]] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)
    columns: tuple[str, ...] = ()
    extra: dict[str, list[Any]] = field(default_factory=dict)


def load(
    source: str,
    reading: Reading,
    task: Task | None,
    unit: str = "record",
    base: Path = Path(),
    scratch: Path | None = None,
    extra: tuple[str, ...] = (),
) -> Loaded:
    """Reads a source that is whole, or of which broken records may be left out.

    Args:
        source: `KIND:PATH`, or the path of an npz file.
        reading: what is in it.
        task: what its labels mean; None: they have none, as new records to be predicted.
        unit: what the promise protects: `record`, or a column.
        base: what a relative path is relative to.
        scratch: where inputs too large for memory are kept; None for the system's place.
        extra: columns to hand back with the records.

    Raises:
        DataError: it cannot be read, a column is missing, labels are outside the map, or records
            are broken and `skip_broken` is off. Names the first few.
    """
    found = survey(source, reading, task, unit, base, scratch, extra)
    if found.unknown:
        values = ", ".join(f"{value!r} ({n}x)" for value, n in found.unknown.most_common(SHOWN))
        raise DataError(
            f"{found.origin}: labels", values, _known(task, reading),
            "Add them to data.label_map, or correct the labels.",
        )  # fmt: skip
    if found.broken and not reading.skip_broken:
        first = "; ".join(f"{where}: {why}" for where, why in found.broken[:SHOWN])
        more = f"; and {len(found.broken) - SHOWN} more" if len(found.broken) > SHOWN else ""
        raise DataError(
            f"{found.origin}: {len(found.broken)} broken records", first + more,
            "records that can be read", "Repair them, or set data.skip_broken = true to leave "
            "them out; `fedgraft data check` lists all.",
        )  # fmt: skip
    if found.broken:  # a file's name or a wrong value is nothing for a log
        log.warning(
            "broken records are left out; `fedgraft data check` lists them",
            extra={"action": "leave-out"},
        )
    return found


def _known(task: Task | None, reading: Reading) -> str:
    classes = ", ".join(task.spec.classes if task else ()) or "numbers"
    return f"{classes}; or, of the label map, {', '.join(reading.label_map)}" if (
        reading.label_map
    ) else classes  # fmt: skip


def survey(
    source: str,
    reading: Reading,
    task: Task | None,
    unit: str = "record",
    base: Path = Path(),
    scratch: Path | None = None,
    extra: tuple[str, ...] = (),
) -> Loaded:
    """The same, but broken records and unknown labels are told instead of refused.

    Raises:
        DataError: it cannot be opened, or a column is missing.
    """
    kind, path = split_source(source)
    if kind == "npz":
        modality, records, columns, more = load_npz(base / path, reading, task, unit, extra)
        return Loaded(str(base / path), modality, records, columns=columns, extra=more)
    table = open_table(kind, base / path, reading)
    return _Survey(table, kind, reading, task, unit, scratch, extra).run()


def open_table(kind: str, path: Path, reading: Reading) -> Table:
    """Opens a source.

    Raises:
        DataError: no such kind, or it cannot be opened.
    """
    if kind == "csv":
        return open_csv(path, reading)
    if kind in ("parquet", "json", "webdataset", "saved"):
        return open_hub(kind, path)
    if kind == "imagefolder":
        return open_folder(path, reading, "image", image.ENDINGS)
    if kind == "audiofolder":
        return open_folder(path, reading, "audio", audio.ENDINGS)
    if kind == "dicom":
        return open_dicom(path, reading)
    raise DataError("data.source", kind, ", ".join(SOURCES), "Choose one of these kinds.")


class _Survey:
    """One pass over a table."""

    def __init__(
        self,
        table: Table,
        kind: str,
        reading: Reading,
        task: Task | None,
        unit: str,
        scratch: Path | None,
        extra: tuple[str, ...],
    ) -> None:
        self.table, self.reading, self.task = table, reading, task
        self.unit = None if unit == "record" else unit
        self.extra = extra
        self.modality = _modality(kind, reading)
        self.columns_reader = ColumnsReader(reading) if self.modality == "tabular" else None
        self.readers: tuple[Any, ...] = () if self.columns_reader else self._readers(kind)
        table.need(self._inputs(), "input" if not self.columns_reader else "columns")
        self.label = (reading.label,) if isinstance(reading.label, str) else reading.label
        if task is None or task.spec.kind == "language-modelling":
            self.label = ()
        table.need(self.label, "label")
        table.need((self.unit,) if self.unit else (), "unit")
        table.need(extra, "source")
        self.rows = Rows(scratch)
        self.texts: list[str] = []
        self.labels: list[torch.Tensor] = []
        self.units: list[int] = []
        self.numbers: dict[str, int] = {}
        self.found = Loaded(table.origin, self.modality, Records(torch.empty(0), torch.empty(0)),
                            columns=table.columns)  # fmt: skip

    def _inputs(self) -> tuple[str, ...]:
        if self.columns_reader:
            return self.columns_reader.columns
        return tuple(name for reader in self.readers for name in reader.columns)

    def _readers(self, kind: str) -> tuple[Any, ...]:
        reading, folder = self.reading, self.table.folder
        named = reading.input
        if named == "auto":
            text = "text" if self.modality != "series" else "series"
            named = self.table.media or text
            if self.modality == "image-text":
                named = (self.table.media or "image", "text")
        names = (named,) if isinstance(named, str) else named
        if self.modality == "text":
            return (TextReader(names[0]),)
        if self.modality == "series":
            return (SeriesReader(names, reading),)
        if self.modality == "audio":
            return (AudioReader(names[0], folder, reading),)
        pictures = DicomReader if kind == "dicom" else ImageReader
        first = pictures(names[0], folder, reading)
        if self.modality == "image":
            return (first,)
        if self.modality == "image-text" and len(names) == 2:
            return (first, TextReader(names[1]))
        raise DataError(
            f"{self.table.origin}: modality", self.modality,
            "image, audio, series, tabular, text, or image-text with two columns in data.input",
            "Videos are read from npz files only.",
        )  # fmt: skip

    def run(self) -> Loaded:
        """Reads all rows."""
        wanted = [*self._inputs(), *self.label, *self.extra, *([self.unit] if self.unit else [])]
        start = 0
        for batch in self.table.batches(tuple(dict.fromkeys(wanted))):
            count = len(next(iter(batch.values())))
            self._batch(batch, start, count)
            start += count
        labels = _joined(self.labels, self.task)
        raw: Raw = self.rows.tensor() if self.modality != "text" else self.texts
        if self.modality == "image-text":
            raw = (self.rows.tensor(), self.texts)
        units = torch.tensor(self.units, dtype=torch.int64) if self.unit else None
        self.found.records = Records(raw, labels, units)
        return self.found

    def _batch(self, batch: dict[str, list[Any]], start: int, count: int) -> None:
        problems: dict[int, str] = {}
        inputs: list[tuple[Any, ...]] = [()] * count
        tensor = torch.empty(0)
        if self.columns_reader:
            tensor, problems = self.columns_reader(batch)
        else:
            for i in range(count):
                try:
                    inputs[i] = tuple(
                        reader([batch[name][i] for name in reader.columns])
                        for reader in self.readers
                    )
                except Broken as error:
                    problems[i] = str(error)
        good = [i for i in range(count) if i not in problems]
        labels = None
        if good and self.task is None:
            labels = Labels(torch.zeros(len(good), dtype=torch.int64))
        elif good and self.task is not None:
            labels = self.task.read(self._written(batch, inputs, good))
        if labels is not None:
            problems |= {good[i]: why for i, why in labels.broken.items()}
            self.found.unknown.update(labels.unknown.values())
        if self.unit:
            problems |= {
                i: f"no {self.unit}, so whom it belongs to is unknown"
                for i in good if batch[self.unit][i] in (None, "")
            }  # fmt: skip
        unknown = {} if labels is None else {good[i] for i in labels.unknown}
        for i, why in sorted(problems.items()):
            self.found.broken.append((self._where(batch, i, start), why))
        kept = [k for k, i in enumerate(good) if i not in problems and i not in unknown]
        if not kept or labels is None:
            return
        self.labels.append(labels.values[kept])
        rows = [good[k] for k in kept]
        if self.columns_reader:
            self.rows.append(tensor[rows])
        else:
            self._keep([inputs[i] for i in rows])
        if self.unit:
            names = [str(batch[self.unit][i]) for i in rows]
            self.units += [self.numbers.setdefault(name, len(self.numbers)) for name in names]
        for name in self.extra:
            self.found.extra.setdefault(name, []).extend(batch[name][i] for i in rows)

    def _written(
        self, batch: dict[str, list[Any]], inputs: Sequence[tuple[Any, ...]], good: list[int]
    ) -> Written:
        columns = []
        for name in self.label:
            values = [batch[name][i] for i in good]
            columns.append(_named(values, self.table.names.get(name), self.reading.missing))
        texts = [next((v for v in inputs[i] if isinstance(v, str)), "") for i in good]
        sizes: list[tuple[int, int]] = []
        for reader in self.readers:
            if isinstance(reader, ImageReader):
                sizes, reader.sizes = reader.sizes, []
        return Written(
            columns, self.reading.label_map, sizes, self.reading.size,
            MaskReader(self.table.folder, self.reading.size),
            texts if self.modality in ("text", "image-text") else [],
        )  # fmt: skip

    def _keep(self, inputs: list[tuple[Any, ...]]) -> None:
        for one in inputs:
            for value in one:
                if isinstance(value, str):
                    self.texts.append(value)
                    continue
                try:
                    self.rows.append(value[None])
                except ValueError:
                    self._refuse_shape(tuple(value.shape))

    def _refuse_shape(self, shape: tuple[int, ...]) -> None:
        form = self.rows.form
        before = form[0] if form else ()
        if self.modality in ("image", "image-text"):
            key = "data.channels" if shape[1:] == before[1:] else "data.size"
            raise DataError(
                f"{self.table.origin}: images", f"{shape} after {before} (channels, height, width)",
                "images of one size and as many channels", f"State {key}, a public constant that "
                "all are brought to.",
            )  # fmt: skip
        raise DataError(
            f"{self.table.origin}: {self.modality}", f"a length of {shape[0]} after {before[0]}",
            "records of one length and as many channels", "State data.samples, a public constant "
            "to which all are cut or filled up.",
        )  # fmt: skip

    def _where(self, batch: dict[str, list[Any]], i: int, start: int) -> str:
        """A file's name, or the number of a row."""
        media = self.table.media
        value = batch[media][i] if media in batch else None
        if isinstance(value, dict):
            value = value.get("path")
        if isinstance(value, str):
            path = Path(value)
            folder = self.table.folder
            return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
        return f"row {start + i + 1}"


def _named(values: list[Any], names: list[str] | None, blank: tuple[str, ...]) -> list[Any]:
    """Numbers of categories by the names that the file gives them; None for what is missing."""
    found: Iterator[Any] = (
        None if isinstance(v, str) and v.strip() in blank and v.strip() else v for v in values
    )
    if names is None:
        return list(found)
    return [names[v] if isinstance(v, int) and 0 <= v < len(names) else v for v in found]


def _joined(parts: list[torch.Tensor], task: Task | None) -> torch.Tensor:
    """Labels of all batches; those of words are filled up to the longest record's."""
    if not parts:
        return torch.empty(0, dtype=task.dtype if task else torch.int64)
    if task and task.features == "tokens" and parts[0].dim() == 2:
        longest = max(part.shape[1] for part in parts)
        gaps = [(0, longest - part.shape[1]) for part in parts]
        parts = [pad(part, gap, value=IGNORED) for part, gap in zip(parts, gaps, strict=True)]
    return torch.cat(parts)


def _modality(kind: str, reading: Reading) -> Modality:
    if reading.modality != "auto":
        return reading.modality
    folders: dict[str, Modality] = {
        "imagefolder": "image", "webdataset": "image", "dicom": "image", "audiofolder": "audio"
    }  # fmt: skip
    return folders.get(kind, "tabular" if reading.columns else "text")
