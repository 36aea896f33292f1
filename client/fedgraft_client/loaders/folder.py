"""Folders of images or sounds, in the two forms that Hugging Face's imagefolder knows.

With a `metadata.csv`, `.jsonl` or `.parquet`, its column `file_name` says which file a row is
about, and the other columns are the answer, the unit, whatever it has; `NAME_file_name` is a
second file, such as a mask. Without, the answer is the name of the folder that a file is in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from fedgraft_client.loaders.csv import open_csv
from fedgraft_client.loaders.hub import open_hub
from fedgraft_client.loaders.table import ROWS, Table
from fedgraft_common.errors import DataError
from fedgraft_common.reading import Reading

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_FILE = "file_name"


def open_folder(
    path: Path, reading: Reading, media: Literal["image", "audio"], endings: tuple[str, ...]
) -> Table:
    """Files of a folder and all folders in it, in the order of their names.

    Args:
        path: the folder.
        reading: how the metadata is written.
        media: what the column of files is called.
        endings: of the files, in small letters; empty: any file but the metadata.

    Raises:
        DataError: no such folder, no file in it, or metadata without `file_name`.
    """
    if not path.is_dir():
        raise DataError(
            str(path), "no such folder", f"a folder of {media} files", "Check the path."
        )
    for name in METADATA:
        if (path / name).is_file():
            return _described(path / name, reading, media)
    files = [
        file for file in sorted(path.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
        and (not endings or file.suffix.lower() in endings)
    ]  # fmt: skip
    if not files:
        raise DataError(
            str(path), "no file", f"{media} files ({', '.join(endings) or 'any ending'})",
            "Check the path.",
        )  # fmt: skip

    def batches(wanted: tuple[str, ...]) -> Iterator[dict[str, list[Any]]]:
        for start in range(0, len(files), ROWS):
            part = files[start : start + ROWS]
            names = [str(file.relative_to(path)) for file in part]
            yield {media: names, "label": [file.parent.name for file in part]}

    return Table(str(path), (media, "label"), batches, path, media=media)


def _described(file: Path, reading: Reading, media: str) -> Table:
    kinds = {".jsonl": "json", ".parquet": "parquet"}
    kind = kinds.get(file.suffix)
    table = open_hub(kind, file) if kind else open_csv(file, reading)
    table.need((_FILE,), "source")
    renamed = {
        name: media if name == _FILE else name.removesuffix(f"_{_FILE}") for name in table.columns
    }
    back = {new: old for old, new in renamed.items()}

    def batches(wanted: tuple[str, ...]) -> Iterator[dict[str, list[Any]]]:
        for batch in table.batches(tuple(back[name] for name in wanted)):
            yield {renamed[name]: values for name, values in batch.items()}

    names = {renamed[name]: values for name, values in table.names.items()}
    return Table(str(file), tuple(renamed.values()), batches, file.parent, names, media)
