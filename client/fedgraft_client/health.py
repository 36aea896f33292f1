"""What a site daemon is doing, for `fedgraft site status` and whoever watches the machine.

The file stays at the site: it may say why something failed. Nothing in it is measured on records.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from fedgraft_common.files import write_atomically


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
