"""SIGKILLs to the processes of a real federation, at random moments: a rehearsal of the worst.

Five kinds of process can be hit: `server` (gateway, joining port and backbone service are in it;
its children die with it), `superlink`, `superexec`, `serverapp` and `site`. What a service manager
would start again (the server, a site) is started again after a moment; the rest is the server's
own business.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import psutil

from fedgraft_simulations.federation.processes import Federation

KINDS: Final = ("server", "superlink", "superexec", "serverapp", "site")
_PROGRAMS: Final = {
    "superlink": "flower-superlink", "superexec": "flower-superexec", "serverapp": "flwr-serverapp",
}  # fmt: skip


@dataclass
class Kills:
    """A schedule of SIGKILLs. The same seed gives the same kinds and pauses.

    Attributes:
        federation: what is hit.
        start_site: starts a site again.
        seed: of the schedule.
        count: kills in all; each kind at least once.
        pause: mean seconds between the moment when the run has got on and the next kill.
        patience: seconds after which a kill is made though the run has not got on since the last.
        done: those that were made: seconds since the start, and who.
    """

    federation: Federation
    start_site: Callable[[str], None]
    seed: int
    count: int
    pause: float
    patience: float
    done: list[tuple[float, str]] = field(default_factory=list)
    _restarts: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)  # noqa: S311 - a schedule, not a secret
        self._began = self._last = time.monotonic()
        self._progress: object = None
        self._next: float | None = None
        self._kinds = list(KINDS) + self._random.choices(KINDS, k=self.count - len(KINDS))
        self._random.shuffle(self._kinds)

    def step(self, progress: object = None) -> None:
        """Starts again what is due, and kills if it is time.

        Args:
            progress: changes when the run gets on, such as its newest round.
        """
        now = time.monotonic()
        for due in [restart for restart in self._restarts if restart[0] <= now]:
            self._restarts.remove(due)
            due[1]()
        if len(self.done) >= self.count:
            return
        if self._next is None:
            if progress == self._progress and now < self._last + self.patience:
                return
            self._next = now + self._random.expovariate(1 / self.pause)
        if now < self._next:
            return
        for kind in dict.fromkeys(self._kinds):  # the next one of which a process is alive
            if (name := self._kill(kind)) is not None:
                self._kinds.remove(kind)
                self.done.append((now - self._began, name))
                self._last, self._progress, self._next = now, progress, None
                return

    @property
    def is_over(self) -> bool:
        """Whether all were made and everything was started again."""
        return len(self.done) >= self.count and not self._restarts

    def _kill(self, kind: str) -> str | None:
        """Kills one process of a kind and says which; None if there is none now."""
        if kind in _PROGRAMS:
            found = [p.pid for p in self._servers() if _PROGRAMS[kind] in words(p)]
            if not found:
                return None
            os.kill(self._random.choice(found), signal.SIGKILL)
            return kind
        names = [
            name for name, process in self.federation.processes.items()
            if (name == "server") == (kind == "server") and process.poll() is None
        ]  # fmt: skip
        if not names:
            return None
        name = self._random.choice(sorted(names))
        self.federation.processes[name].kill()
        self.federation.processes[name].wait()
        self._restarts.append((time.monotonic() + self._random.random(), self._starter(name)))
        return name

    def _starter(self, name: str) -> Callable[[], None]:
        if name == "server":
            return self.federation.start_server
        return lambda: self.start_site(name)

    def _servers(self) -> Iterator[psutil.Process]:
        process = self.federation.processes["server"]
        if process.poll() is None:
            yield from psutil.Process(process.pid).children(recursive=True)

    def counts(self) -> dict[str, int]:
        """How many of each kind were made."""
        kinds = Counter(name if name in KINDS else "site" for _, name in self.done)
        return {kind: kinds[kind] for kind in KINDS}


def words(process: psutil.Process) -> str:
    """A process' command line; empty if it is gone."""
    try:
        return " ".join(process.cmdline()) if process.status() != psutil.STATUS_ZOMBIE else ""
    except psutil.NoSuchProcess:
        return ""
