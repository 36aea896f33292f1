"""A bell between the gateway and the runs of one server: something has arrived, look now.

Flower's SuperLink tells nobody that a message came; whoever waits for one has to ask, and each
question costs it milliseconds. Two files beside the runs say when asking makes sense:

    <runs>/.asked      a run has sent requests: rung by runs, heard by the gateway for its sites
    <runs>/.answered   a site has sent a reply: rung by the gateway, heard by runs

Nothing depends on a bell: who does not hear it asks again after a while, as without one.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LISTEN: Final = 0.005  # seconds between two looks at a bell


class Bell:
    """One file. Its modification time is when the bell was last rung, to the nanosecond.

    Args:
        path: need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def ring(self) -> None:
        """Wakes whoever listens, in any process; where it cannot be written, nobody hears it."""
        now = time.time_ns()
        with suppress(OSError):
            self._path.touch(mode=0o600)
            os.utime(self._path, ns=(now, now))

    def rung(self) -> int:
        """Another number than before if it was rung in between; take it before you ask."""
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            return 0


@dataclass(frozen=True, slots=True)
class Bells:
    """Those of a server.

    Attributes:
        asked: a run has sent requests.
        answered: a site has sent a reply.
    """

    asked: Bell
    answered: Bell

    @classmethod
    def of(cls, runs: Path) -> Bells:
        """Beside the runs.

        Args:
            runs: the server's directory of runs.
        """
        return cls(Bell(runs / ".asked"), Bell(runs / ".answered"))
