"""What a ledger says, in figures: for the operator's screen and for an auditor.

Reads the file without locking it, so that it can be asked while the daemon runs.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedgraft_client.entry import Entry, Kind, charges, find_faults, parse_entry, spent
from fedgraft_client.ledger import read_entries
from fedgraft_client.witness import Witness
from fedgraft_common.accounting import epsilon, epsilon_bound, second_opinion
from fedgraft_common.errors import LedgerError

EXPORT = "fedgraft-ledger-1"
MANY = 8
"""Mechanisms beyond which the accountants work on coarser grids, so that they answer in seconds."""


@dataclass(frozen=True, slots=True)
class RunAccount:
    """One run on the data set.

    Attributes:
        run: the plan's name; `recovered` for what a lost ledger had spent.
        plan: its hash.
        rounds: rounds charged, repeated ones included.
        steps: DP-SGD steps charged.
        epsilon: of this run alone.
        lifetime: of this run and all before it, at the same delta.
        sealed: whether the run is over here.
    """

    run: str
    plan: str
    rounds: int
    steps: int
    epsilon: float
    lifetime: float
    sealed: bool


@dataclass(frozen=True, slots=True)
class Check:
    """What `verify` found.

    Attributes:
        entries: how many lines there are.
        faults: everything wrong with them, in words.
        reserved: reservations that never committed; they count as spent.
        epsilon: by the accountant that decides (PLD, rounded up on a long history).
        second: by an independent one (Opacus' PRV).
        tolerance: how far the two may lie apart.
        delta: both are for.
        key: the public key that signed, in hexadecimal.
        witnessed: whether a witness was compared.
    """

    entries: int
    faults: tuple[str, ...]
    reserved: int
    epsilon: float
    second: float
    tolerance: float
    delta: float
    key: str
    witnessed: bool


def read_ledger(path: Path) -> list[Entry]:
    """The lines of a ledger file, or of an export of one.

    Raises:
        LedgerError: it is neither.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
        if not head.startswith(b"SQLite format 3"):
            return _read_export(path)
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            return read_entries(connection)
    except (OSError, sqlite3.DatabaseError, ValueError, KeyError, TypeError) as error:
        raise LedgerError(
            str(path), str(error), "a ledger.sqlite3, or what `fedgraft ledger export` wrote",
            "Check the path.",
        ) from None  # fmt: skip


def export(entries: Sequence[Entry]) -> str:
    """A ledger as text, for an auditor: one JSON document per line, no record and no reply."""
    lines: list[dict[str, Any]] = [{"format": EXPORT}, *(entry.document() for entry in entries)]
    return "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)


def _read_export(path: Path) -> list[Entry]:
    header, *lines = path.read_text(encoding="utf-8").splitlines() or ["{}"]
    if json.loads(header).get("format") != EXPORT:
        raise ValueError("another format")
    return [parse_entry(json.loads(line)) for line in lines]


def public_key(entries: Sequence[Entry]) -> Ed25519PublicKey:
    """The key that the first line names.

    Raises:
        LedgerError: there is no such line.
    """
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(entries[0].body["key"]))
    except (IndexError, KeyError, ValueError, TypeError):
        raise LedgerError(
            "ledger", f"{len(entries)} lines without a key", "a first line with the site's key",
            "The beginning is missing: ask the site for a whole export.",
        ) from None  # fmt: skip


def verify(
    entries: Sequence[Entry],
    delta: float,
    witness: Path | None = None,
    expected_key: str | None = None,
) -> Check:
    """Checks every line and recomputes the total with two accountants.

    Args:
        entries: oldest first.
        delta: for both epsilons.
        witness: the witness file, if it is at hand.
        expected_key: the site's public key as the auditor knows it, in hexadecimal. Without it
            the key is the one that the ledger itself names.

    Raises:
        LedgerError: there is no key to check against, or the witness is damaged.
    """
    key = public_key(entries)
    faults = find_faults(entries, key)
    found_key = key.public_bytes_raw().hex()
    if expected_key not in (None, found_key):
        faults.append(f"the ledger names the key {found_key}, not {expected_key}")
    if witness is not None and witness.exists():
        seen = Witness(witness).read()
        if len(seen) > len(entries):
            faults.append(f"the witness has seen entry {seen[-1].seq}; the end is missing")
        elif [e.hash for e in seen] != [e.hash for e in entries[: len(seen)]]:
            faults.append("the witness has seen another history")
        elif len(entries) - len(seen) > 1:
            faults.append(f"the witness ends at entry {len(seen)}; an old copy was put back")
    events = spent(entries)
    done = {int(e.body["reserve"]) for e in entries if e.kind in (Kind.COMMIT, Kind.VOID)}
    open_ones = [e for e in entries if e.kind is Kind.RESERVE and e.seq not in done]
    long = len(events) > MANY
    decided = epsilon_bound(events, delta) if long else epsilon(events, delta)
    error = 0.1 if long else 0.01
    # Opacus reports the upper end of its interval; rounding grows with epsilon on both sides, on
    # the coarse grid by up to a hundredth of it.
    second, tolerance = second_opinion(events, delta, error), 2 * error + long * decided / 100
    if not abs(decided - second) <= tolerance:
        faults.append(f"the accountants disagree: PLD {decided:.4f}, PRV {second:.4f}")
    return Check(
        len(entries), tuple(faults), len(open_ones), decided, second, tolerance, delta,
        found_key, witness is not None and witness.exists(),
    )  # fmt: skip


def runs(entries: Sequence[Entry], delta: float) -> list[RunAccount]:
    """What each run cost, in the order in which they began; the last `lifetime` is the total."""
    sealed = {str(e.body["plan"]) for e in entries if e.kind is Kind.SEAL}
    grouped: dict[str, list[Entry]] = {}
    for entry in charges(entries):
        if not spent([entry]):
            continue  # lines that were put back say themselves what they cost
        grouped.setdefault(str(entry.body.get("plan", "")), []).append(entry)
    accounts: list[RunAccount] = []
    before: list[Entry] = []
    for plan, members in grouped.items():
        before += members
        own = spent(members)
        accounts.append(
            RunAccount(
                run=str(members[0].body.get("run", "recovered")),
                plan=plan,
                rounds=sum(e.body.get("purpose") == "train" for e in members),
                steps=sum(event.steps for event in own),
                epsilon=epsilon(own, delta),
                lifetime=epsilon(spent(before), delta),
                sealed=plan in sealed,
            )
        )
    return accounts


def document(check: Check) -> dict[str, Any]:
    """For machines."""
    return {**asdict(check), "faults": list(check.faults), "whole": not check.faults}
