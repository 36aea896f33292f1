"""What has gone wrong in a run's secure aggregation: lost rounds, and who is left out for it.

    <directory>/secure-faults.json

It is written before anything follows from it, so that a server that is killed in between neither
asks for a lost round again nor forgets how many were lost in a row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from fedgraft_common.errors import AggregationError, CheckpointError
from fedgraft_common.files import write_atomically

FILE: Final = "secure-faults.json"
IN_A_ROW: Final = 2
"""Lost rounds after which a run ends: each has cost the sites privacy, and nothing was learnt."""


class RoundLostError(AggregationError):
    """A round that can never be had: its adapter stays as it was, the next gets a new set-up.

    Args:
        reason: for people; names the sites.
        dealer: the site that dealt what could not be used; empty if there is none.
    """

    def __init__(self, reason: str, dealer: str = "") -> None:
        super().__init__("secure aggregation", reason, "a round that can be finished", "")
        self.reason = reason
        self.dealer = dealer


@dataclass(slots=True)
class SecureFaults:
    """Of one run.

    Attributes:
        directory: of the run.
        durable: whether a write waits for the disk.
        lost: the newest lost round; 0 if none was lost.
        reasons: why it was lost, and why those before it were, as far as they are in a row.
        out: sites that later set-ups do without, and why.
    """

    directory: Path
    durable: bool = True
    lost: int = 0
    reasons: list[str] = field(default_factory=list)
    out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path, durable: bool = True) -> Self:
        """What `write` wrote; none if there is no file.

        Raises:
            CheckpointError: it is damaged.
        """
        path = directory / FILE
        if not path.exists():
            return cls(directory, durable)
        try:
            return cls(directory, durable, **json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                str(path), str(error), "what the server wrote",
                "Delete the file: the run then tries every site and its last round again.",
            ) from None  # fmt: skip

    def write(self) -> None:
        """Keeps it."""
        kept = {"lost": self.lost, "reasons": self.reasons, "out": self.out}
        content = json.dumps(kept, indent=2).encode()
        write_atomically(self.directory / FILE, content, self.durable)

    def lose(self, number: int, lost: RoundLostError) -> None:
        """Notes a lost round, and leaves its dealer out from now on."""
        self.reasons = [*self.reasons, lost.reason] if self.lost == number - 1 else [lost.reason]
        self.lost = number
        if lost.dealer:
            self.out[lost.dealer] = lost.reason

    def check(self, dropouts: int) -> None:
        """Ends the run after too many lost rounds in a row.

        Args:
            dropouts: sites that the plan can do without.

        Raises:
            AggregationError: says what became of each round, and what can be done.
        """
        if len(self.reasons) < IN_A_ROW:
            return
        first = self.lost - len(self.reasons) + 1
        told = "; ".join(f"round {n}: {why}" for n, why in enumerate(self.reasons, first))
        way = (
            "`fedgraft server revoke NAME` leaves it out for good, then `fedgraft resume`"
            if dropouts
            else "the plan tolerates no dropouts, so leaving it out takes a new plan without it"
        )
        raise AggregationError(
            f"secure aggregation, rounds {first} to {self.lost}", f"all lost ({told})",
            f"fewer than {IN_A_ROW} lost rounds in a row, because each costs the sites privacy",
            f"Look into the log of the site named here. If it cannot be mended, {way}. "
            f"`fedgraft resume` goes on at round {self.lost + 1}.",
        )  # fmt: skip
