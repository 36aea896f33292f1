"""A tensor that grows row by row, beyond a size in a file instead of memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO

import torch

LIMIT = 256 * 2**20  # bytes of one site's inputs that stay in memory


class Rows:
    """Rows of one shape and type.

    They are private data, so the file is readable by its owner only and has no name once it is
    mapped: it is gone with the process, whichever way that ends.

    Args:
        directory: where the file is made; None for the system's temporary directory.
        limit: bytes up to which everything stays in memory.
    """

    def __init__(self, directory: Path | None = None, limit: int = LIMIT) -> None:
        self._directory = directory
        self._limit = limit
        self._parts: list[torch.Tensor] = []
        self._held = 0
        self._file: IO[bytes] | None = None
        self._count = 0
        self._form: tuple[tuple[int, ...], torch.dtype] | None = None

    def __len__(self) -> int:
        return self._count

    @property
    def form(self) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and type of a row; None before the first one."""
        return self._form

    def append(self, rows: torch.Tensor) -> None:
        """Adds rows (M, ...), all of the same shape and type as those before.

        Raises:
            ValueError: they are not.
        """
        form = tuple(rows.shape[1:]), rows.dtype
        if self._form is None:
            self._form = form
        if form != self._form:
            raise ValueError(f"rows of {form} after rows of {self._form}")
        self._parts.append(rows)
        self._held += rows.nbytes
        self._count += len(rows)
        if self._held > self._limit or (self._file is not None and self._held > 2**24):
            self._spill()

    def _spill(self) -> None:
        if self._file is None:
            if self._directory is not None:
                self._directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.NamedTemporaryFile(dir=self._directory)  # noqa: SIM115 - mode 0600
        for part in self._parts:
            part.contiguous().numpy().tofile(self._file)
        self._parts.clear()
        self._held = 0

    def tensor(self) -> torch.Tensor:
        """All rows (N, ...); nothing can be added afterwards."""
        if self._form is None:
            return torch.empty(0)
        if self._file is None:
            return torch.cat(self._parts)
        self._spill()
        self._file.flush()
        shape, dtype = self._form
        size = self._count * dtype.itemsize * int(torch.Size(shape).numel())
        storage = torch.UntypedStorage.from_file(self._file.name, shared=True, nbytes=size)
        self._file.close()
        return torch.empty(0, dtype=dtype).set_(storage, 0, (self._count, *shape))  # type: ignore[call-overload,no-any-return]
