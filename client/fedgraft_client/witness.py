"""The witness: a small signed file that remembers the newest entry of a ledger, and the total.

It is kept apart from the ledger, best on another disk, so that an old copy of the ledger, or one
whose end was cut off, is noticed. It is written after every entry, so it lags by at most one.
Because it knows the total spent, a site that had to restore an old ledger can charge exactly
what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedgraft_client.entry import Entry
from fedgraft_common.accounting import SamplingEvent
from fedgraft_common.errors import LedgerError
from fedgraft_common.files import write_atomically


@dataclass(frozen=True, slots=True)
class Seen:
    """What a witness saw last.

    Attributes:
        seq: number of the newest entry.
        hash: its hash, in hexadecimal.
        spent: everything charged up to it.
    """

    seq: int
    hash: str
    spent: tuple[SamplingEvent, ...]


class Witness:
    """One witness file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        """Whether anything was ever seen."""
        return self.path.exists()

    def write(self, entry: Entry, spent: Sequence[SamplingEvent], key: Ed25519PrivateKey) -> None:
        """Remembers a new entry."""
        seen = {
            "seq": entry.seq,
            "hash": entry.hash,
            "spent": [[e.sample_rate, e.noise_multiplier, e.steps] for e in spent],
        }
        text = json.dumps(seen, sort_keys=True)
        signed = {"seen": text, "signature": key.sign(text.encode()).hex()}
        write_atomically(self.path, (json.dumps(signed) + "\n").encode())

    def read(self, key: Ed25519PublicKey) -> Seen:
        """What it saw last.

        Raises:
            LedgerError: the file is damaged, or another site's.
        """
        try:
            signed = json.loads(self.path.read_text(encoding="utf-8"))
            key.verify(bytes.fromhex(signed["signature"]), signed["seen"].encode())
            seen = json.loads(signed["seen"])
            events = tuple(SamplingEvent(q, sigma, steps) for q, sigma, steps in seen["spent"])
            return Seen(int(seen["seq"]), str(seen["hash"]), events)
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OSError,
            InvalidSignature,
        ) as error:
            raise LedgerError(
                str(self.path), str(error) or "a signature that is not this site's",
                "the witness that this site wrote",
                "Put it back from its own disk or a backup; a damaged ledger is not trusted.",
            ) from None  # fmt: skip
