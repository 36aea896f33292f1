"""Rows of a source, a few thousand at a time: what every loader gives and every reader takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from fedgraft_common.errors import DataError

ROWS = 4096  # of a batch


@dataclass(frozen=True, slots=True)
class Table:
    """A source that is open.

    Attributes:
        origin: file or folder, for errors.
        columns: their names.
        batches: iterates over the rows as {column: values}; each call starts again. Of the
            columns asked for only.
        folder: what relative file names in it are relative to.
        names: categories of columns that hold numbers for them, as the file itself says.
        media: the column that holds images or sounds, if there is one.
    """

    origin: str
    columns: tuple[str, ...]
    batches: Callable[[tuple[str, ...]], Iterator[dict[str, list[Any]]]]
    folder: Path
    names: dict[str, list[str]] = field(default_factory=dict)
    media: str | None = None

    def need(self, wanted: tuple[str, ...], key: str) -> None:
        """Refuses a configuration that names columns which are not there.

        Args:
            wanted: columns.
            key: of the configuration, for the error.

        Raises:
            DataError: one of them is missing.
        """
        for name in wanted:
            if name not in self.columns:
                raise DataError(
                    f"{self.origin}: {key}", f"no column {name!r}",
                    "one of " + ", ".join(self.columns), f"Correct data.{key}, or the file.",
                )  # fmt: skip


class Broken(Exception):  # noqa: N818 - of one record; becomes a DataError or is skipped
    """Why one record cannot be used."""


class Reader(Protocol):
    """Makes the raw input of one record of its columns."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Which columns it needs."""

    def __call__(self, values: list[Any]) -> torch.Tensor:
        """One record.

        Raises:
            Broken: it cannot be read.
        """
