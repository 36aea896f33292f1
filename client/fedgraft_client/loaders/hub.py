"""Sources that Hugging Face `datasets` reads: parquet, JSON lines, webdataset, saved data sets.

Everything is local and streamed; nothing is asked of the network, and nothing is copied into a
cache in the home directory. Images and sounds stay as they are in the file, to be decoded one by
one, so that a broken one can be named.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedgraft_client.loaders.table import ROWS, Table
from fedgraft_common.errors import DataError


def open_hub(kind: str, path: Path) -> Table:
    """A parquet or JSON file (or a folder of them), a webdataset's tar, or a saved data set.

    Args:
        kind: `parquet`, `json`, `webdataset` or `saved`.
        path: file or folder.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = _saved(path) if kind == "saved" else _streamed(kind, path)
            features = dict(dataset.features or dataset._resolve_features().features)
    except Exception as error:  # whatever a foreign file makes a foreign library do
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            str(path), reason, f"a {kind} source that Hugging Face datasets reads",
            "Check the path and the file.",
        ) from None  # fmt: skip
    names, media = {}, None
    for name, feature in features.items():
        if hasattr(feature, "names"):
            names[name] = list(feature.names)
        if type(feature).__name__ in ("Image", "Audio"):
            dataset = dataset.cast_column(name, type(feature)(decode=False))
            media = media or name

    def batches(wanted: tuple[str, ...]) -> Iterator[dict[str, list[Any]]]:
        chosen = dataset.select_columns(list(wanted)).with_format("arrow")
        for batch in chosen.iter(batch_size=ROWS):
            yield batch.to_pydict()

    folder = path if path.is_dir() else path.parent
    return Table(str(path), tuple(features), batches, folder, names, media)


def _streamed(kind: str, path: Path) -> Any:
    from datasets import load_dataset

    endings = {"parquet": "parquet", "json": "json*", "webdataset": "tar"}
    files = sorted(map(str, path.rglob(f"*.{endings[kind]}"))) if path.is_dir() else [str(path)]
    if not files or not Path(files[0]).is_file():
        raise FileNotFoundError("no such file")
    with tempfile.TemporaryDirectory() as cache:
        return load_dataset(kind, data_files=files, split="train", streaming=True, cache_dir=cache)


def _saved(path: Path) -> Any:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(path))
    if isinstance(found, DatasetDict):
        splits = ", ".join(f"{path}/{name}" for name in found)
        raise ValueError(f"several splits; name one of {splits}")
    return found
