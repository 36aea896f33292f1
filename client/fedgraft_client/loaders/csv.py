"""CSV files, read a block at a time: ten million rows need no more memory than ten thousand.

By pyarrow, which `datasets` builds on too, because it reads the columns asked for only, every field
as text (a column whose type changes half-way through is common), eight times as fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedgraft_client.loaders.table import Table
from fedgraft_common.errors import DataError
from fedgraft_common.reading import Reading

BLOCK = 1 << 20  # bytes


def open_csv(path: Path, reading: Reading) -> Table:
    """A CSV file in UTF-8 with the names of the columns in its first line, or in `header`.

    Raises:
        DataError: no such file, no names, two columns of one name.
    """
    columns = _names(path, reading)
    if len(set(columns)) < len(columns) or any(not name for name in columns):
        raise DataError(
            f"{path}: first line", ", ".join(columns), "a different name for each column",
            "Name the columns in the first line, or in data.header if the file has no such line.",
        )  # fmt: skip

    def batches(wanted: tuple[str, ...]) -> Iterator[dict[str, list[Any]]]:
        yield from _batches(path, reading, wanted)

    return Table(str(path), columns, batches, path.parent)


def _names(path: Path, reading: Reading) -> tuple[str, ...]:
    import csv

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = next(csv.reader(file, delimiter=reading.delimiter), None)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            str(path), str(error), "a CSV file in UTF-8", "Check the path, or save it in UTF-8."
        ) from None
    if not first:
        raise DataError(
            str(path), "an empty file", "a line for each record", "Check the data source."
        )
    if reading.header and len(reading.header) != len(first):
        raise DataError(
            f"{path}: header", f"{len(first)} fields in the first line",
            f"{len(reading.header)}, as data.header names", "Correct data.header.",
        )  # fmt: skip
    return reading.header or tuple(name.strip() for name in first)


def _batches(
    path: Path, reading: Reading, wanted: tuple[str, ...]
) -> Iterator[dict[str, list[Any]]]:
    import pyarrow as pa
    from pyarrow import csv

    names = _names(path, reading)
    try:
        reader = csv.open_csv(
            path,
            read_options=csv.ReadOptions(
                block_size=BLOCK,
                column_names=list(names),
                skip_rows=0 if reading.header else 1,
                use_threads=False,
            ),
            parse_options=csv.ParseOptions(delimiter=reading.delimiter, newlines_in_values=True),
            convert_options=csv.ConvertOptions(
                column_types={name: pa.string() for name in names},
                include_columns=list(wanted),
                null_values=list(reading.missing),
                strings_can_be_null=True,
                quoted_strings_can_be_null=True,
            ),
        )
        for batch in reader:
            yield batch.to_pydict()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            str(path), str(error).splitlines()[0], f"lines of {len(names)} fields in UTF-8",
            "Correct the file, or data.delimiter.",
        ) from None  # fmt: skip
