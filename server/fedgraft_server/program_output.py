"""What the server's other processes write, as log lines of its own: one place, one format.

Flower's programs write lines for people, in colour, into a pipe. The process of a run, whose output
Flower's SuperExec throws away, writes our own JSON into a file of the run. All leave through our
handler, with level, run and site where a line names them.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedgraft_common.logs import FIELDS, OURS, read_entry
from fedgraft_server.run_folder import LOG as RUN_LOG

LONGEST: Final = 16 * 1024
"""Bytes of a line; more of it are cut off."""
AT_ONCE: Final = 1 << 20
"""Bytes that are read of a file between two looks."""

_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")
_LEVEL: Final = re.compile(r"^(?:\S+Z )?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s*:?\s+(.*)$")
_RUN: Final = re.compile(r"\brun(?:_id)?[ =](\d{6,20})\b")
_NODE: Final = re.compile(r"\bnode_id=(\d{6,20})\b")


class RunLogs:
    """What is added to the log files of runs, from now on.

    Args:
        runs: one directory for each run.
    """

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._output = ProgramOutput("run")
        self._read = {file: file.stat().st_size for file in self._files()}

    def look(self) -> None:
        """Passes on the whole lines that have come since the last look."""
        for file in self._files():
            begin = self._read.get(file, 0)
            if file.stat().st_size <= begin:
                continue
            with file.open("rb") as opened:
                opened.seek(begin)
                content = opened.read(AT_ONCE)
            end = content.rfind(b"\n") + 1
            if end == 0 and len(content) == AT_ONCE:
                end = AT_ONCE  # no line is that long
            for line in content[:end].splitlines():
                self._output.write(line)
            self._read[file] = begin + end

    def _files(self) -> list[Path]:
        return sorted(self._runs.glob(f"*/{RUN_LOG}"))


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
