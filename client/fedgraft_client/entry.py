"""One line of a site's ledger: what it says, its place in the chain, and the site's signature.

Entry n holds the SHA-256 of entry n - 1, so a changed, missing or inserted line breaks the chain
from there on; and it is signed with the site's Ed25519 key, so nobody without that key can write
a chain of their own. An entry never says anything about a record: it holds public parameters of
mechanisms, hashes and times.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedgraft_common.accounting import SamplingEvent, merge

GENESIS = "0" * 64
FORMAT = 1

Purpose = Literal["train", "evaluate", "start"]


class Kind(StrEnum):
    """What an entry is about."""

    OPEN = "open"  # the first: data set, unit and public key
    RESERVE = "reserve"  # a mechanism is about to see private data; spent from here on
    COMMIT = "commit"  # its output is stored and may leave, as often as it is asked for
    VOID = "void"  # it never saw any; nothing is spent
    APPROVE = "approve"  # a plan is agreed to, by the operator or by the policy
    SEAL = "seal"  # the head was refitted without noise: this run is over for good
    SECURE = "secure"  # a message of secure aggregation may leave; its state is stored with it
    PEER = "peer"  # the operator vouches for a peer's key in secure aggregation
    RECOVER = "recover"  # entries were lost and put back, or charged, from the witness


@dataclass(frozen=True, slots=True)
class Charge:
    """What one round costs: the body of a `reserve` entry.

    Attributes:
        run: the plan's name.
        plan: its hash.
        round: from 1.
        purpose: training, a released evaluation, or the class means that a head starts with.
        mechanism: `local` or `distributed`.
        unit: what the promise protects: `record`, or a column.
        event: sample rate, noise multiplier and steps of this round.
        shares: h, the noise shares that the promise rests on; 1 for `local`.
        colluders: how many other sites may side with the server.
    """

    run: str
    plan: str
    round: int
    purpose: Purpose
    mechanism: str
    unit: str
    event: SamplingEvent
    shares: int = 1
    colluders: int = 0

    def body(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "run": self.run,
            "plan": self.plan,
            "round": self.round,
            "purpose": self.purpose,
            "mechanism": self.mechanism,
            "unit": self.unit,
            "shares": self.shares,
            "colluders": self.colluders,
            "sample_rate": self.event.sample_rate,
            "noise_multiplier": self.event.noise_multiplier,
            "steps": self.event.steps,
        }


def event_of(body: Mapping[str, Any]) -> SamplingEvent:
    """The mechanism that a `reserve` entry charges for."""
    return SamplingEvent(body["sample_rate"], body["noise_multiplier"], body["steps"])


@dataclass(frozen=True, slots=True)
class Entry:
    """A signed line.

    Attributes:
        seq: 1, 2, 3, ... without gaps.
        time: seconds since 1970, UTC; never less than the entry before.
        kind: what it is about.
        body: what it says.
        previous: hash of the entry before it, in hexadecimal; zeros for the first.
        signature: Ed25519 over the hash.
    """

    seq: int
    time: int
    kind: Kind
    body: Mapping[str, Any]
    previous: str
    signature: bytes

    @property
    def hash(self) -> str:
        """SHA-256 of everything but the signature, in hexadecimal."""
        return _digest(self.seq, self.time, self.kind, self.body, self.previous)

    @classmethod
    def signed(
        cls,
        seq: int,
        time: int,
        kind: Kind,
        body: Mapping[str, Any],
        previous: str,
        key: Ed25519PrivateKey,
    ) -> Entry:
        """The next line of a ledger."""
        digest = _digest(seq, time, kind, body, previous)
        return cls(seq, time, kind, body, previous, key.sign(bytes.fromhex(digest)))

    def is_signed_by(self, key: Ed25519PublicKey) -> bool:
        """Whether the signature is this key's."""
        try:
            key.verify(self.signature, bytes.fromhex(self.hash))
        except InvalidSignature:
            return False
        return True

    def document(self) -> dict[str, Any]:
        """As it is exported."""
        return {
            "seq": self.seq,
            "time": self.time,
            "kind": self.kind.value,
            "body": dict(self.body),
            "previous": self.previous,
            "signature": self.signature.hex(),
        }


def parse_entry(document: Mapping[str, Any]) -> Entry:
    """What `Entry.document` gave.

    Raises:
        ValueError, KeyError, TypeError: it is something else.
    """
    return Entry(
        int(document["seq"]),
        int(document["time"]),
        Kind(document["kind"]),
        dict(document["body"]),
        str(document["previous"]),
        bytes.fromhex(document["signature"]),
    )


def _digest(seq: int, time: int, kind: Kind, body: Mapping[str, Any], previous: str) -> str:
    line = json.dumps(
        [FORMAT, seq, time, kind.value, body, previous], sort_keys=True, separators=(",", ":")
    )
    return hashlib.sha256(line.encode()).hexdigest()


def find_faults(entries: Iterable[Entry], key: Ed25519PublicKey) -> list[str]:
    """Everything that is wrong with a chain, in words; empty if it is whole.

    Checks numbering, hashes, signatures, times, and that commits and voids refer to one earlier
    reservation each, which had neither yet.
    """
    faults: list[str] = []
    previous, last, clock = GENESIS, 0, 0
    pending: set[int] = set()
    for entry in entries:
        where = f"entry {entry.seq}"
        if entry.seq != last + 1:
            faults.append(f"{where}: follows entry {last}; entries between are missing")
        if entry.previous != previous:
            faults.append(f"{where}: does not continue the chain; the line before it was changed")
        if entry.time < clock:
            faults.append(f"{where}: is dated before the one it follows")
        if not entry.is_signed_by(key):
            faults.append(f"{where}: the signature is not this site's; the line was changed")
        if (entry.kind is Kind.OPEN) != (entry.seq == 1):
            faults.append(f"{where}: {entry.kind.value} is out of place")
        if entry.kind is Kind.RESERVE:
            pending.add(entry.seq)
        elif entry.kind in (Kind.COMMIT, Kind.VOID):
            reservation = entry.body.get("reserve")
            if reservation in pending:
                pending.remove(reservation)
            else:
                faults.append(f"{where}: {entry.kind.value} of entry {reservation}, not reserved")
        previous, last, clock = entry.hash, entry.seq, max(clock, entry.time)
    return faults


def charges(entries: Iterable[Entry]) -> list[Entry]:
    """The entries that count as spent: reservations that are not void, and recovered losses.

    A reservation that was committed is spent, whatever else is said about it.
    """
    lines = list(entries)
    committed = {e.body["reserve"] for e in lines if e.kind is Kind.COMMIT}
    void = {e.body["reserve"] for e in lines if e.kind is Kind.VOID} - committed
    return [
        e for e in lines if e.kind is Kind.RECOVER or (e.kind is Kind.RESERVE and e.seq not in void)
    ]


def spent(entries: Iterable[Entry], plan: str | None = None) -> list[SamplingEvent]:
    """The mechanisms behind those entries, equal ones added up; of one plan, or of all."""
    events: list[SamplingEvent] = []
    for entry in charges(entries):
        bodies = entry.body.get("lost", []) if entry.kind is Kind.RECOVER else [entry.body]
        events += [event_of(b) for b in bodies if plan is None or b.get("plan") == plan]
    return merge(events)


def output_of(body: Mapping[str, Any]) -> str:
    """What a `reserve` entry pays for, as the stored rounds are named: plan, or part of it."""
    plan = str(body["plan"])
    names = {"evaluate": evaluation_of, "start": start_of}
    return names[body["purpose"]](plan) if body["purpose"] in names else plan


def start_of(plan: str) -> str:
    """The name of the head that a plan starts with among the stored rounds."""
    return f"{plan}/start"


def evaluation_of(plan: str) -> str:
    """The name of a plan's released counts among the stored rounds."""
    return f"{plan}/evaluate"


SETUP, ROUNDS = "setup", "rounds"
"""The two halves of a site's state in secure aggregation, as entries that store them call them."""


def secure_state_of(plan: str, half: str) -> str:
    """The name of half of a plan's state in secure aggregation among the stored rounds."""
    return f"{plan}/secure/{half}"


def newest_commits(entries: Sequence[Entry]) -> dict[str, int]:
    """Entry that committed the newest output of each plan; none where lines were put back.

    States of secure aggregation end with any recovery.
    """
    known = {e.seq: e for e in entries}
    newest: dict[str, int] = {}
    for entry in entries:
        if entry.kind is Kind.COMMIT and (reserve := known.get(int(entry.body["reserve"]))):
            newest[output_of(reserve.body)] = entry.seq
            if ROUNDS in entry.body:
                newest[secure_state_of(str(reserve.body["plan"]), ROUNDS)] = entry.seq
        elif entry.kind is Kind.SECURE:
            for half in {SETUP, ROUNDS} & entry.body.keys():
                newest[secure_state_of(str(entry.body["plan"]), half)] = entry.seq
        elif entry.kind is Kind.RECOVER:
            first = entry.seq - int(entry.body.get("restored", 0))
            newest = {
                output: seq
                for output, seq in newest.items()
                if seq < first and secure_state_of("", "") not in output
            }
    return newest
