"""What a site daemon is doing, for `fedgraft site status` and whoever watches the machine.

The file stays at the site: it may say why something failed. Nothing in it is measured on records.
A heartbeat writes it again and again: a round may take hours, in which the daemon writes nothing,
and in which it may be told to stop.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from fedgraft_common.atomic import write_atomically

BEAT: Final = 10.0  # seconds between two heartbeats
STALE: Final = 60.0  # seconds without one, after which the daemon counts as dead


class State(StrEnum):
    """Where the daemon stands."""

    CONNECTING = "connecting"
    WAITING = "waiting"
    WORKING = "working"
    SENDING = "sending"
    STOPPED = "stopped"


@dataclass(slots=True)
class Health:
    """The daemon's own account of itself; times are seconds since the epoch.

    Attributes:
        state: what it does now.
        connected: whether the last call reached the server.
        draining: whether it will stop after the round under way.
        since: when `state` was entered.
        run: Flower's number of the run of the last request, as text: it does not fit JSON's
            numbers.
        round: number of the last answered round; 0 before the first.
        status: what the last reply said: a word of `fedgraft_common.messages.Status`; empty before
            the first.
        answered: requests answered since the daemon started.
        connections: how often it connected.
        last_answer: when the last reply reached the server; 0 before the first.
        last_error: what last went wrong, for the site's operator; empty if nothing did.
    """

    state: State = State.CONNECTING
    connected: bool = False
    draining: bool = False
    since: float = 0.0
    run: str = ""
    round: int = 0
    status: str = ""
    answered: int = 0
    connections: int = 0
    last_answer: float = 0.0
    last_error: str = ""

    def write(self, path: Path) -> None:
        """Writes it as JSON, in one step; not waiting for the disk."""
        write_atomically(path, json.dumps(asdict(self), indent=1).encode(), durable=False)


def read_health(path: Path) -> Health:
    """Reads what `Health.write` wrote.

    Raises:
        OSError: there is no such file.
        ValueError: it is something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return Health(**document | {"state": State(document["state"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a status file: {error}") from None


@contextlib.contextmanager
def heartbeat(beat: Callable[[], None], seconds: float = BEAT) -> Iterator[None]:
    """Calls `beat` from a thread, while the context lasts."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(seconds):
            with contextlib.suppress(OSError):  # the disk is gone for a while
                beat()

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True, slots=True)
class Sighting:
    """What a status file says about the daemon.

    Attributes:
        word: `running`, `stopped`, `stale` (it died or hangs) or `absent` (it never ran here).
        age: seconds since its last sign of life; infinite if there is no file.
        health: its own account; None if there is none.
    """

    word: str
    age: float
    health: Health | None

    @property
    def is_running(self) -> bool:
        """Whether the daemon is alive."""
        return self.word == "running"


def sight(path: Path, now: float) -> Sighting:
    """Looks at a status file.

    Args:
        path: the file.
        now: seconds since the epoch.

    Raises:
        ValueError: it is something else.
    """
    try:
        health = read_health(path)
        age = max(0.0, now - path.stat().st_mtime)
    except OSError:
        return Sighting("absent", float("inf"), None)
    if health.state is State.STOPPED:
        return Sighting("stopped", age, health)
    return Sighting("running" if age < STALE else "stale", age, health)
