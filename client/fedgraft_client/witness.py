"""The witness: a second copy of the ledger's lines, kept apart from it, best on another disk.

It is appended to after every entry, so it lags by at most one. An old copy of the ledger, or one
whose end was cut off, is shorter than its witness, and a ledger that went on from an old copy
differs from it: both are noticed when the ledger is opened. Because the witness holds the lines
themselves, what an old copy lacks is put back exactly.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from fedgraft_client.entry import Entry, parse_entry
from fedgraft_common.errors import LedgerError
from fedgraft_common.files import write_atomically


class Witness:
    """One witness file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        """Whether anything was ever seen."""
        return self.path.exists()

    def prepare(self) -> None:
        """Makes sure that it can be written, before anything depends on it.

        Raises:
            LedgerError: it cannot.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None

    def append(self, entries: Sequence[Entry]) -> None:
        """Remembers new entries.

        Raises:
            LedgerError: the file cannot be written.
        """
        lines = "".join(json.dumps(e.document(), sort_keys=True) + "\n" for e in entries)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            created = not self.path.exists()
            with self.path.open("ab") as file:
                if created:
                    self.path.chmod(0o600)
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None

    def replace(self, entries: Sequence[Entry]) -> None:
        """Begins anew with these entries; what was there before is kept beside it."""
        if self.path.exists():
            self.path.replace(self.path.with_name(f"{self.path.name}.before-{len(entries)}"))
        lines = "".join(json.dumps(e.document(), sort_keys=True) + "\n" for e in entries)
        write_atomically(self.path, lines.encode())

    def read(self) -> list[Entry]:
        """What it has seen, oldest first. A last line that was torn by a crash is dropped.

        Raises:
            LedgerError: the file is damaged.
        """
        try:
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                write_atomically(self.path, whole)
            return [parse_entry(json.loads(line)) for line in whole.splitlines()]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise LedgerError(
                str(self.path), str(error), "the witness that this site wrote",
                "Put it back from its own disk or a backup; a damaged one is not trusted.",
            ) from None  # fmt: skip

    def _unwritable(self, error: OSError) -> LedgerError:
        return LedgerError(
            str(self.path), error.strerror or str(error), "a file that can be written",
            "Look at the disk of the witness; nothing was computed and nothing was spent.",
        )  # fmt: skip
