"""A file that is arriving: it goes on where it stopped, and is used only if its hash is right.

Bytes are written as they come and hashed in a second thread, at most two pieces behind. A file is
not flushed to the disk: one that a power failure damaged is found by its hash, before use.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final

from fedgraft_common.errors import BackboneError, TransferError
from fedgraft_common.manifest import FileEntry, read_pieces

_BEHIND: Final = 2  # pieces


class PartialBlob:
    """One arriving file, open for appending.

    Args:
        path: where the bytes are kept meanwhile; what is there already is hashed first.
        entry: size and hash from the signed manifest.

    Raises:
        TransferError: the file cannot be written.
    """

    def __init__(self, path: Path, entry: FileEntry) -> None:
        self._path = path
        self._entry = entry
        self._digest = hashlib.sha256()
        self._pending: deque[Future[None]] = deque()
        self.offset = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size > entry.size:
                path.unlink()
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            self._file = os.fdopen(os.open(path, flags, 0o600), "ab", buffering=0)
        except OSError as error:
            raise _cannot_write(path, error) from None
        for piece in read_pieces(path):
            self._digest.update(piece)
            self.offset += len(piece)
        self.resumed_at = self.offset
        self._hashing = ThreadPoolExecutor(1, "blob-hash")

    def write(self, piece: bytes) -> None:
        """Appends what arrived.

        Raises:
            BackboneError: more than the manifest says; what arrived is thrown away.
            TransferError: the disk is full or broken; what is written stays for the next try.
        """
        if self.offset + len(piece) > self._entry.size:
            self.discard()
            raise BackboneError(
                self._entry.name, f"more than {self._entry.size} bytes",
                f"{self._entry.size} bytes, as in the signed manifest",
                "The server's copy was altered; tell the federation's operator.",
            )  # fmt: skip
        rest = memoryview(piece)
        try:
            while rest:
                rest = rest[self._append(rest) :]
        except OSError as error:
            raise _cannot_write(self._path, error) from None
        self.offset += len(piece)
        self._pending.append(self._hashing.submit(self._digest.update, piece))
        if len(self._pending) > _BEHIND:
            self._pending.popleft().result()

    def _append(self, piece: memoryview) -> int:
        return self._file.write(piece)

    def finish(self, target: Path) -> bool:
        """Moves the whole file to its place if its hash is right, else throws it away.

        Returns:
            Whether it is there now.

        Raises:
            TransferError: it cannot be moved.
        """
        for one in self._pending:
            one.result()
        if self.offset != self._entry.size or self._digest.hexdigest() != self._entry.sha256:
            self.discard()
            return False
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._path.chmod(0o400)
            self._path.replace(target)
        except OSError as error:
            raise _cannot_write(target, error) from None
        return True

    def discard(self) -> None:
        """Deletes what has arrived."""
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> PartialBlob:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the file; what has arrived stays."""
        self._hashing.shutdown()
        self._file.close()


def _cannot_write(path: Path, error: OSError) -> TransferError:
    return TransferError(
        str(path), error.strerror or str(error), "a disk with room that may be written",
        "Make room or correct the permissions; the transfer goes on where it stopped.",
    )  # fmt: skip
