"""Small objects that came before: what is named by its SHA-256 need not come twice.

The plan is the same for both exchanges of a round, and `ok` is the same for every site.
"""

from __future__ import annotations

from typing import Final

SMALL: Final = 64 * 1024
"""Bytes of an object that is worth it."""


class Remembered:
    """The newest small objects.

    Args:
        count: how many are kept.
    """

    def __init__(self, count: int = 64) -> None:
        self._count = count
        self._contents: dict[str, bytes] = {}

    def get(self, name: str) -> bytes | None:
        """The object of that name."""
        return self._contents.get(name)

    def keep(self, name: str, content: bytes) -> None:
        """Remembers an object whose SHA-256 was checked; the oldest one is forgotten."""
        if len(content) <= SMALL:
            while len(self._contents) >= self._count:
                self._contents.pop(next(iter(self._contents)))
            self._contents[name] = content
