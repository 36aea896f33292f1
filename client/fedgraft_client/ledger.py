"""A site's durable account of everything computed from one data set that may leave it.

    reserve -> the round's first gradient ... its last -> commit, together with head and reply

Formal guarantee: whatever a site has ever sent was charged before it was computed. A reservation
is on the disk (SQLite, WAL, synchronous=FULL) before the first private record is sampled, so a
process that is killed at any instant has charged for what it may have computed; a reservation
that never commits counts as spent. The commit and the bytes that may leave are one transaction:
a reply is either not there, or whole, accounted for, and resent byte for byte.

Threats and what meets them:

    a changed or missing line   hash chain and signatures (`fedgraft_client.entry`)
    a deleted tail, an old      the witness, a signed file kept elsewhere that knows the newest
    copy put back               entry; it is never older than the ledger by more than one entry
    a clock set back            entries keep the newest time seen
    two processes               a lock file; the second one is refused

Not met: whoever holds the signing key and both files can write a new history; and a restored
snapshot of the whole machine, witness included, looks like the past it is. Keep the witness on
another disk.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from filelock import FileLock, Timeout

from fedgraft_client.entry import GENESIS, Charge, Entry, Kind, event_of, find_faults, spent
from fedgraft_client.witness import Seen, Witness
from fedgraft_common.accounting import SamplingEvent, merge
from fedgraft_common.errors import LedgerError, SealedError
from fedgraft_common.files import write_atomically

_TABLES = """
CREATE TABLE IF NOT EXISTS entries (
    seq INTEGER PRIMARY KEY, time INTEGER NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL,
    previous TEXT NOT NULL, signature BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS said ON entries (kind, json_extract(body, '$.plan'));
CREATE TABLE IF NOT EXISTS rounds (
    plan TEXT PRIMARY KEY, round INTEGER NOT NULL, digest TEXT NOT NULL, content BLOB NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Finished:
    """The newest finished round of a plan.

    Attributes:
        round: its number.
        digest: SHA-256 of the reply that may leave, in hexadecimal.
        content: head and reply, as the site's store wrote them.
    """

    round: int
    digest: str
    content: bytes


class Ledger:
    """The ledger of one data set.

    Args:
        directory: private to the site; holds `ledger.sqlite3` and `ledger.key`.
        dataset: the site's own name for the data; an entry in another ledger is refused.
        unit: what the promise protects: `record`, or a column.
        witness: file that remembers the newest entry; best on another disk. Default: beside it.
        durable: wait for the disk, and allow one process only. A simulation needs neither; its
            ledgers have no witness and are opened anew for each transaction.
        clock: seconds since 1970.
        recover: accept a ledger older than its witness, or a lost witness, and charge in a new
            entry what the witness knows and the ledger does not.

    Raises:
        LedgerError: another process has it; it was changed, cut or rolled back; or it belongs to
            another data set or unit.
    """

    def __init__(
        self,
        directory: Path,
        dataset: str,
        unit: str = "record",
        witness: Path | None = None,
        durable: bool = True,
        clock: Callable[[], float] = time.time,
        recover: bool = False,
    ) -> None:
        self.path = directory / "ledger.sqlite3"
        self.dataset = dataset
        self.unit = unit
        self._durable = durable
        self._clock = clock
        self._connection: sqlite3.Connection | None = None
        self._lock = FileLock(directory / "ledger.lock")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if durable:
            self._take_lock()
        try:
            self._key = _signing_key(directory / "ledger.key", durable, self.path.exists())
            if durable:
                self._connection = self._connect()
            self._witness = Witness(witness or directory / "ledger.witness") if durable else None
            self._total: list[SamplingEvent] = []
            self._runs: dict[str, list[SamplingEvent]] = {}
            seen = self._seen()
            self._create(seen if not recover else None)
            if durable:
                self._check()
                self._compare(seen, recover)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets another process have it."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._lock.release()

    @property
    def public_key(self) -> Ed25519PublicKey:
        """What its signatures are checked with."""
        return self._key.public_key()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what a round needs

    def reserve(self, charge: Charge) -> int:
        """Charges a round, for good, before it looks at the data.

        Returns:
            The entry's number.

        Raises:
            SealedError: the run is sealed.
            LedgerError: the unit is another.
        """
        if charge.unit != self.unit:
            raise LedgerError(
                f"{self.path}: unit", charge.unit, f"{self.unit}, the unit of this ledger",
                "One ledger accounts for one unit; name the unit of the site file in the plan.",
            )  # fmt: skip
        if self.sealed(charge.plan):
            raise SealedError(
                f"run {charge.run}", "sealed",
                "a run whose head was not refitted at home",
                "A head fitted without noise never takes part again; start a new run.",
            )  # fmt: skip
        return self._append(Kind.RESERVE, charge.body()).seq

    def commit(self, reservation: int, plan: str, number: int, digest: str, content: bytes) -> None:
        """Stores a round's output and, in the same transaction, that it may leave.

        Args:
            reservation: what `reserve` returned.
            plan: hash of the plan.
            number: of the round.
            digest: SHA-256 of the reply, in hexadecimal.
            content: head and reply.
        """
        body = {"reserve": reservation, "reply": digest}
        self._append(Kind.COMMIT, body, (plan, number, digest, content))

    def void(self, reservation: int) -> None:
        """Takes a reservation back. Only for one whose round never sampled a private record."""
        self._append(Kind.VOID, {"reserve": reservation})

    def keep(self, plan: str, number: int, digest: str, content: bytes) -> None:
        """Stores the output of a round without DP, which is never charged; simulations only."""
        if self._durable:
            raise LedgerError(
                str(self.path), "a round without a charge", "a mechanism with noise",
                "Only a simulation runs without DP.",
            )  # fmt: skip
        with self._transaction() as connection:
            connection.execute(_STORE, (plan, number, digest, content))

    def finished(self, plan: str) -> Finished | None:
        """The newest finished round of a plan."""
        with self._reading() as connection:
            row = connection.execute(
                "SELECT round, digest, content FROM rounds WHERE plan = ?", (plan,)
            ).fetchone()
        return Finished(*row) if row else None

    # -- what the operator says

    def approve(self, plan: str, name: str) -> None:
        """Writes down that the operator agrees to a plan."""
        self._append(Kind.APPROVE, {"plan": plan, "run": name})

    def approved(self, plan: str) -> bool:
        """Whether a plan was approved."""
        return self._said(Kind.APPROVE, plan)

    def seal(self, plan: str) -> None:
        """Ends a run at this site: its head has been fitted without noise."""
        if not self.sealed(plan):
            self._append(Kind.SEAL, {"plan": plan})

    def sealed(self, plan: str) -> bool:
        """Whether a run is over for good."""
        return self._said(Kind.SEAL, plan)

    def _said(self, kind: Kind, plan: str) -> bool:
        query = "SELECT 1 FROM entries WHERE kind = ? AND json_extract(body, '$.plan') = ?"
        with self._reading() as connection:
            return connection.execute(query, (kind.value, plan)).fetchone() is not None

    # -- what the account is

    def entries(self) -> list[Entry]:
        """Every line, oldest first."""
        with self._reading() as connection:
            return read_entries(connection)

    def spent(self, plan: str | None = None) -> list[SamplingEvent]:
        """Everything charged so far, by one run or by all; equal mechanisms added up.

        The mechanism that grew last comes last, which lets the accountant reuse the rest.
        """
        if not self._durable:  # other processes may have written since
            return spent(self.entries(), plan)
        return list(self._total if plan is None else self._runs.get(plan, []))

    # -- storage

    def _append(
        self,
        kind: Kind,
        body: Mapping[str, Any],
        output: tuple[str, int, str, bytes] | None = None,
        seen: bool = True,
    ) -> Entry:
        with self._transaction() as connection:
            last = read_entries(connection, newest=True)
            seq, previous, then = 0, GENESIS, 0
            for entry in last:
                seq, previous, then = entry.seq, entry.hash, entry.time
            now = max(int(self._clock()), then)
            entry = Entry.signed(seq + 1, now, kind, body, previous, self._key)
            connection.execute(
                "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)",
                (entry.seq, entry.time, kind.value, _json(body), previous, entry.signature),
            )
            if output is not None:
                connection.execute(_STORE, output)
        if self._durable:
            self._count(entry, seen)
        return entry

    def _count(self, entry: Entry, seen: bool) -> None:
        """Follows the account in memory and in the witness."""
        if entry.kind in (Kind.RESERVE, Kind.VOID, Kind.RECOVER):
            kept = self._runs.setdefault(str(entry.body.get("plan", "")), [])
            if entry.kind is Kind.RESERVE:
                kept.append(event_of(entry.body))
                kept[:] = merge(kept)
                self._total = merge([*self._total, event_of(entry.body)])
            else:
                self._recount(self.entries())
        if seen and self._witness is not None:
            self._witness.write(entry, self._total, self._key)

    def _recount(self, entries: list[Entry]) -> None:
        plans = {str(e.body["plan"]) for e in entries if e.kind is Kind.RESERVE}
        self._runs = {plan: spent(entries, plan) for plan in plans}
        self._total = spent(entries)

    def _seen(self) -> Seen | None:
        if self._witness is None or not self._witness.exists():
            return None
        return self._witness.read(self.public_key)

    def _create(self, seen: Seen | None) -> None:
        with self._transaction() as connection:
            for statement in filter(None, map(str.strip, _TABLES.split(";"))):
                connection.execute(statement)
            empty = not read_entries(connection, newest=True)
        if empty and seen is not None:
            raise self._rolled_back("no entries", seen.seq)
        if empty:
            public = self._key.public_key().public_bytes_raw().hex()
            self._append(
                Kind.OPEN, {"dataset": self.dataset, "unit": self.unit, "key": public}, seen=False
            )

    def _check(self) -> None:
        """Compares the file with itself and with the site file."""
        entries = self.entries()
        if faults := find_faults(entries, self.public_key):
            raise LedgerError(
                str(self.path), f"{faults[0]} ({len(faults)} faults)",
                "the lines that this site wrote",
                "Put the newest backup back; `fedgraft ledger recover` then charges what it lacks.",
            )  # fmt: skip
        for name, mine in (("dataset", self.dataset), ("unit", self.unit)):
            found = str(entries[0].body.get(name))
            if found != mine:
                raise LedgerError(
                    f"{self.path}: {name}", found, f"{mine!r}, as the site file says",
                    "Every data set has a ledger of its own; name another directory.",
                )  # fmt: skip
        self._recount(entries)

    def _compare(self, seen: Seen | None, recover: bool) -> None:
        """Compares the file with what the witness remembers."""
        assert self._witness is not None  # noqa: S101 - durable
        entries = self.entries()
        newest = entries[-1]
        if seen is None:
            if len(entries) > 1 and not recover:
                raise LedgerError(
                    str(self._witness.path), "no such file", "the witness of this ledger",
                    "Put it back from its own disk. If it is lost, `fedgraft ledger recover` "
                    "starts another, and the ledger says so.",
                )  # fmt: skip
            self._witness.write(newest, self.spent(), self._key)
            if len(entries) > 1:
                self._append(Kind.RECOVER, {"lost": [], "witness": None})
        elif seen.seq <= newest.seq and entries[seen.seq - 1].hash == seen.hash:
            if seen.seq < newest.seq:  # killed between the entry and the witness
                self._witness.write(newest, self.spent(), self._key)
        elif recover:
            self._append(Kind.RECOVER, {"lost": self._missing(seen), "witness": seen.hash})
        else:
            found = f"{newest.seq} entries" if seen.seq > newest.seq else "another history"
            raise self._rolled_back(found, seen.seq)

    def _missing(self, seen: Seen) -> list[dict[str, Any]]:
        """What the witness knows to be spent and this ledger does not."""
        known = {(e.sample_rate, e.noise_multiplier): e.steps for e in self._total}
        lost = []
        for event in seen.spent:
            steps = event.steps - known.get((event.sample_rate, event.noise_multiplier), 0)
            if steps > 0:
                lost.append(
                    {
                        "sample_rate": event.sample_rate,
                        "noise_multiplier": event.noise_multiplier,
                        "steps": steps,
                    }
                )
        return lost

    def _rolled_back(self, found: str, seq: int) -> LedgerError:
        return LedgerError(
            str(self.path), found, f"entry {seq}, the newest that the witness has seen",
            "An old copy was put back, or the end was cut off. Put the newest ledger back, or "
            "charge what is missing with `fedgraft ledger recover`.",
        )  # fmt: skip

    def _take_lock(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise LedgerError(
                str(self.path), "in use by another process", "one process at a time",
                "Stop the other one; the site daemon holds the ledger while it runs.",
            ) from None  # fmt: skip

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=30)
        try:
            if self._durable:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
                self.path.chmod(0o600)
            else:
                connection.execute("PRAGMA synchronous=OFF")
        except sqlite3.DatabaseError as error:
            connection.close()
            raise _damaged(self.path, error) from None
        return connection

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            if self._connection is not None:
                yield self._connection
            elif self._durable:
                raise LedgerError(str(self.path), "closed", "an open ledger", "Open it again.")
            else:
                with closing(self._connect()) as connection:
                    yield connection
        except sqlite3.DatabaseError as error:
            raise _damaged(self.path, error) from None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise


_STORE = "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?)"


def read_entries(connection: sqlite3.Connection, newest: bool = False) -> list[Entry]:
    """The lines of an open ledger file, oldest first; or the newest line alone."""
    order = "DESC LIMIT 1" if newest else "ASC"
    rows = connection.execute(
        f"SELECT seq, time, kind, body, previous, signature FROM entries ORDER BY seq {order}"  # noqa: S608
    )
    return [Entry(s, t, Kind(k), json.loads(b), p, sign) for s, t, k, b, p, sign in rows]


def _json(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def _damaged(path: Path, error: sqlite3.DatabaseError) -> LedgerError:
    return LedgerError(
        str(path), str(error), "an undamaged ledger, and a disk with room",
        "Free some space if the disk is full; else restore the ledger, then "
        "`fedgraft ledger recover`.",
    )  # fmt: skip


def _signing_key(path: Path, durable: bool, existing: bool) -> Ed25519PrivateKey:
    if not path.exists():
        if existing and durable:
            raise LedgerError(
                str(path), "no such file", "the key that signed this ledger",
                "Put it back from a backup; a ledger cannot be continued without it.",
            )  # fmt: skip
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_atomically(path, pem, durable)
        return key
    try:
        found = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, OSError) as error:
        raise LedgerError(
            str(path), str(error), "an Ed25519 key in PEM", "Put it back from a backup."
        ) from None
    if not isinstance(found, Ed25519PrivateKey):
        raise LedgerError(
            str(path), type(found).__name__, "an Ed25519 key in PEM", "Put it back from a backup."
        )
    return found
