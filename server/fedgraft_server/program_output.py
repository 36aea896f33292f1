"""What Flower's programs print, as log lines of ours: one format for all that the server writes.

A SuperLink writes lines for people, in colour; the process of a run, which the SuperExec starts,
writes our own JSON. Both come through a pipe and leave through our handler, with level, run and
site where a line names them.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Final

from fedgraft_common.logs import FIELDS, OURS, read_entry

LONGEST: Final = 16 * 1024
"""Bytes of a line; more of it are cut off."""

_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")
_LEVEL: Final = re.compile(r"^(?:\S+Z )?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s*:?\s+(.*)$")
_RUN: Final = re.compile(r"\brun(?:_id)?[ =](\d{6,20})\b")
_NODE: Final = re.compile(r"\bnode_id=(\d{6,20})\b")


class ProgramOutput:
    """Reads one program's output.

    Args:
        name: of the program; becomes the action.
        site_of: the site with this node number, if there is one.
    """

    def __init__(self, name: str, site_of: Callable[[int], str | None] = lambda _: None) -> None:
        self._action = name.lower()
        self._log = logging.getLogger(f"{__name__}.{self._action}")
        self._site_of = site_of
        self._level = logging.INFO

    async def follow(self, stream: asyncio.StreamReader) -> None:
        """Until its end."""
        begun = b""
        while chunk := await stream.read(1 << 16):
            *lines, begun = (begun + chunk).split(b"\n")
            for line in lines:
                self.write(line)
            if len(begun) > LONGEST:
                begun = begun[:LONGEST]
        self.write(begun)

    def write(self, line: bytes) -> None:
        """One line of its output."""
        text = _COLOUR.sub("", line[:LONGEST].decode("utf-8", "replace")).rstrip()
        if not text:
            return
        if (entry := read_entry(text)) is not None:
            self._pass_on(entry)
            return
        if found := _LEVEL.match(text):
            self._level, text = logging.getLevelNamesMapping()[found[1]], found[2]
        run, node = _RUN.search(text), _NODE.search(text)
        facts = {
            "action": self._action,
            "run": run[1] if run else None,
            "site": self._site_of(int(node[1])) if node else None,
        }
        self._log.log(self._level, "%s", text, extra=facts)

    def _pass_on(self, entry: dict[str, object]) -> None:
        """A line of ours from another process."""
        name = str(entry["logger"])
        logger = logging.getLogger(name) if name.startswith(OURS) else self._log
        level = logging.getLevelNamesMapping().get(str(entry["level"]).upper(), logging.INFO)
        if not logger.isEnabledFor(level):
            return
        facts = {field: entry.get(field) for field in FIELDS}
        record = logger.makeRecord(name, level, "", 0, "%s", (entry["message"],), None, extra=facts)
        if "exception" in entry:
            record.exc_text = str(entry["exception"])
        logger.handle(record)
