"""A site's privacy ledger; long, because all that may write to it is in this one file.

The durable account of everything computed from one data set that may leave the site.

    reserve -> the round's first gradient ... its last -> commit, together with head and reply

Formal guarantee: whatever a site has ever sent was charged before it was computed. A reservation
is on the disk (SQLite, WAL, synchronous=FULL) before the first private record is sampled, so a
process that is killed at any instant has charged for what it may have computed; a reservation
that never commits counts as spent. The commit and the bytes that may leave are one transaction:
a reply is either not there, or whole, accounted for, and resent byte for byte.

Threats and what meets them:

    a changed or missing line   hash chain and signatures (`fedgraft_client.entry`)
    a deleted tail, an old      the witness, a second copy of the lines kept elsewhere; it is
    copy put back               never behind the ledger by more than one entry
    a changed reply             it is compared with the signed commit before it may leave
    a clock set back            entries keep the newest time seen
    a recovered ledger          its states of secure aggregation are given up: whether a newer one
                                gave a masked input or named survivors, nobody here knows
    two processes               a lock file; the second one is refused

Not met: whoever holds the signing key and both files can write a new history; and a restored
snapshot of the whole machine, witness included, looks like the past it is. Keep the witness on
another disk.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from filelock import FileLock, Timeout

from fedgraft_client.entry import (
    GENESIS,
    ROUNDS,
    SETUP,
    Charge,
    Entry,
    Kind,
    charges,
    event_of,
    find_faults,
    newest_commits,
    output_of,
    secure_state_of,
    spent,
)
from fedgraft_client.ledger_key import signing_key
from fedgraft_client.witness import Witness
from fedgraft_common.accounting import SamplingEvent, merge
from fedgraft_common.errors import LedgerError, SealedError
from fedgraft_common.secure_aggregation import SiteState

_TABLES = """
CREATE TABLE IF NOT EXISTS entries (
    seq INTEGER PRIMARY KEY, time INTEGER NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL,
    previous TEXT NOT NULL, signature BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS said ON entries (kind, json_extract(body, '$.plan'));
CREATE TABLE IF NOT EXISTS rounds (
    plan TEXT PRIMARY KEY, round INTEGER NOT NULL, digest TEXT NOT NULL, content BLOB NOT NULL,
    seq INTEGER NOT NULL
) STRICT;
"""


Approver = Literal["operator", "policy"]


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
        witness: file with a second copy of the lines; best on another disk. Default: beside it.
        durable: wait for the disk, and allow one process only. A simulation needs neither; its
            ledgers have no witness and are opened anew for each transaction.
        clock: seconds since 1970.
        recover: accept a ledger older than its witness, and put back what it lacks; or one that
            went on from an old copy, and charge what the witness knows besides; or a lost witness.

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
            self._key = signing_key(directory / "ledger.key", durable, self.path.exists())
            if durable:
                self._connection = self._connect()
            self._witness = Witness(witness or directory / "ledger.witness") if durable else None
            self._total: list[SamplingEvent] = []
            self._runs: dict[str, list[SamplingEvent]] = {}
            seen = self._seen()
            self._create(seen, recover)
            if recover and seen:
                self._put_back(seen)
            if durable:
                self._check()
                self._compare(self._seen(), recover)
                if recover and self._keeps_secure_states():
                    self._append(Kind.RECOVER, {"lost": [], "witness": self.entries()[-1].hash})
                self._check_rounds()
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
        if self._witness is not None:
            self._witness.prepare()
        nonce = secrets.token_hex(8)  # two branches of a history never hold the same line
        return self._append(Kind.RESERVE, charge.body() | {"nonce": nonce}).seq

    def commit(
        self,
        reservation: int,
        plan: str,
        number: int,
        digest: str,
        content: bytes,
        state: SiteState | None = None,
    ) -> None:
        """Stores a round's output and, in the same transaction, that it may leave.

        Args:
            reservation: what `reserve` returned.
            plan: hash of the plan.
            number: of the round.
            digest: SHA-256 of the reply, in hexadecimal.
            content: head and reply.
            state: in secure aggregation, what the site has given so far, this reply included.
        """
        body: dict[str, Any] = {"reserve": reservation, "reply": digest}
        outputs = [(plan, number, digest, content)]
        if state is not None:
            body[ROUNDS] = hashlib.sha256(state.rounds).hexdigest()
            outputs.append((secure_state_of(plan, ROUNDS), number, body[ROUNDS], state.rounds))
        self._append(Kind.COMMIT, body, outputs)

    def keep_secure(
        self,
        plan: str,
        number: int,
        step: str,
        reply: str,
        state: SiteState,
        said: Mapping[str, Any] | None = None,
    ) -> None:
        """Stores a state of secure aggregation and, with it, that its message may leave.

        Args:
            plan: hash of the plan.
            number: of the round.
            step: of the protocol.
            reply: SHA-256 of the message, in hexadecimal.
            state: after the step. Its set-up is written only if it has changed.
            said: what else an auditor may want to know of the message.
        """
        body: dict[str, Any] = {"plan": plan, "round": number, "step": step, "reply": reply}
        body |= said or {}
        outputs = []
        before = self.secure_state(plan)
        halves = [(SETUP, state.setup), (ROUNDS, state.rounds)]
        if before is not None and before.setup == state.setup:
            halves = halves[1:]
        for half, content in halves:
            body[half] = hashlib.sha256(content).hexdigest()
            outputs.append((secure_state_of(plan, half), number, body[half], content))
        self._append(Kind.SECURE, body, outputs)

    def secure_state(self, plan: str) -> SiteState | None:
        """The newest state of secure aggregation of a plan, held against the signed entries.

        None after a recovery: the state of an older copy would give a second masked input, or name
        other survivors, under masks that are in use.

        Raises:
            LedgerError: what is stored is not what was written down.
        """
        setup, rounds = (self._secure_half(plan, half) for half in (SETUP, ROUNDS))
        return None if setup is None or rounds is None else SiteState(setup, rounds)

    def _secure_half(self, plan: str, half: str) -> bytes | None:
        name = secure_state_of(plan, half)
        with self._reading() as connection:
            row = connection.execute(
                "SELECT digest, content, seq FROM rounds WHERE plan = ?", (name,)
            ).fetchone()
            if row is None:
                return None
            digest, content, seq = row
            found = read_entries(connection, f"WHERE seq = {int(seq)}")
            later = "SELECT 1 FROM entries WHERE kind = ? AND seq > ?"
            if connection.execute(later, (Kind.RECOVER.value, seq)).fetchone() is not None:
                return None
        said = found[0].body.get(half) if found and found[0].is_signed_by(self.public_key) else None
        if said != digest or hashlib.sha256(content).hexdigest() != digest:
            raise LedgerError(
                f"{self.path}: state of secure aggregation", "not what was written down",
                "the state that the signed entry names",
                "It is not used. Restore the ledger from a backup, then "
                "`fedgraft ledger recover`.",
            )  # fmt: skip
        return bytes(content)

    def may_leave(self, plan: str, reply: str) -> bool:
        """Whether a message of secure aggregation with this SHA-256 was written down."""
        query = (
            "SELECT 1 FROM entries WHERE kind = ? AND json_extract(body, '$.plan') = ? "
            "AND json_extract(body, '$.reply') = ?"
        )
        with self._reading() as connection:
            found = connection.execute(query, (Kind.SECURE.value, plan, reply)).fetchone()
        return found is not None

    def last_trained(self, plan: str) -> int:
        """The last round of a plan that was reserved for training; 0 if there is none.

        Those count that a recovery found in the witness alone.
        """
        query = (
            "SELECT max(json_extract(body, '$.round')) FROM entries WHERE kind = ? "
            "AND json_extract(body, '$.plan') = ? AND json_extract(body, '$.purpose') = 'train'"
        )
        with self._reading() as connection:
            (last,) = connection.execute(query, (Kind.RESERVE.value, plan)).fetchone()
            recovered = read_entries(connection, f"WHERE kind = '{Kind.RECOVER.value}'")
        lost = [body for entry in recovered for body in entry.body.get("lost", [])]
        rounds = [b["round"] for b in lost if (b["plan"], b["purpose"]) == (plan, "train")]
        return max(map(int, [last or 0, *rounds]))

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
            connection.execute(_STORE, (plan, number, digest, content, 0))

    def finished(self, plan: str) -> Finished | None:
        """The newest finished round of a plan, held against the signed commit.

        Raises:
            LedgerError: the stored round is not what was committed.
        """
        with self._reading() as connection:
            row = connection.execute(
                "SELECT round, digest, content, seq FROM rounds WHERE plan = ?", (plan,)
            ).fetchone()
            if row is None:
                return None
            number, digest, content, seq = row
            found = {e.seq: e for e in read_entries(connection, f"WHERE seq = {int(seq)}")}
            commit = found.get(seq)
            if commit is not None and commit.kind is Kind.COMMIT:
                where = f"WHERE seq = {int(commit.body['reserve'])}"
                found |= {e.seq: e for e in read_entries(connection, where)}
        if not (self._is_committed(plan, number, digest, seq, found) or (
            not self._durable and seq == 0
        )):  # fmt: skip
            raise LedgerError(
                f"{self.path}: stored round {number}", "not what was committed",
                "the round that the signed commit names",
                "It does not leave. Restore the ledger from a backup, then "
                "`fedgraft ledger recover`.",
            )  # fmt: skip
        return Finished(number, digest, content)

    def _is_committed(
        self, plan: str, number: int, digest: str, seq: int, entries: dict[int, Entry]
    ) -> bool:
        commit = entries.get(seq)
        if commit is None or commit.kind is not Kind.COMMIT or commit.body["reply"] != digest:
            return False
        reserve = entries.get(int(commit.body["reserve"]))
        if reserve is None or reserve.kind is not Kind.RESERVE:
            return False
        if (output_of(reserve.body), reserve.body["round"]) != (plan, number):
            return False
        return all(entry.is_signed_by(self.public_key) for entry in (commit, reserve))

    # -- what the operator says

    def approve(self, plan: str, name: str, by: Approver = "operator") -> None:
        """Writes down, once, that a plan is agreed to: by the operator, or by their policy."""
        if not self.approved(plan, by):
            self._append(Kind.APPROVE, {"plan": plan, "run": name, "by": by})

    def approved(self, plan: str, by: Approver = "operator") -> bool:
        """Whether a plan was agreed to."""
        query = (
            "SELECT 1 FROM entries WHERE kind = ? AND json_extract(body, '$.plan') = ? "
            "AND coalesce(json_extract(body, '$.by'), 'operator') = ?"
        )
        with self._reading() as connection:
            found = connection.execute(query, (Kind.APPROVE.value, plan, by)).fetchone()
        return found is not None

    def accept_peer(self, name: str, key: str) -> None:
        """Writes down that a peer's key, named by its fingerprint, is vouched for."""
        self._append(Kind.PEER, {"peer": name, "key": key})

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
        outputs: Sequence[tuple[str, int, str, bytes]] = (),
    ) -> Entry:
        entry = self._write(kind, body, outputs)
        if self._witness is not None:
            self._witness.append([entry])
        return entry

    def _write(
        self,
        kind: Kind,
        body: Mapping[str, Any],
        outputs: Sequence[tuple[str, int, str, bytes]] = (),
    ) -> Entry:
        """The next line, which the witness does not know yet."""
        with self._transaction() as connection:
            last = read_entries(connection, "ORDER BY seq DESC LIMIT 1")
            seq, previous, then = 0, GENESIS, 0
            for entry in last:
                seq, previous, then = entry.seq, entry.hash, entry.time
            now = max(int(self._clock()), then)
            entry = Entry.signed(seq + 1, now, kind, body, previous, self._key)
            _insert(connection, entry)
            connection.executemany(_STORE, [(*output, entry.seq) for output in outputs])
            if kind is Kind.RECOVER:
                _give_up_secure_states(connection)
        if self._durable:
            self._count(entry)
        return entry

    def _count(self, entry: Entry) -> None:
        """Follows the account in memory."""
        if entry.kind is Kind.RESERVE:
            kept = self._runs.setdefault(str(entry.body["plan"]), [])
            kept[:] = merge([*kept, event_of(entry.body)])
            self._total = merge([*self._total, event_of(entry.body)])
        elif entry.kind in (Kind.VOID, Kind.RECOVER):
            self._recount(self.entries())

    def _recount(self, entries: list[Entry]) -> None:
        bodies = [e.body for e in entries if e.kind is Kind.RESERVE]
        bodies += [b for e in entries if e.kind is Kind.RECOVER for b in e.body.get("lost", [])]
        self._runs = {plan: spent(entries, plan) for plan in {str(b["plan"]) for b in bodies}}
        self._total = spent(entries)

    def _seen(self) -> list[Entry]:
        return self._witness.read() if self._witness is not None and self._witness.exists() else []

    def _create(self, seen: list[Entry], recover: bool) -> None:
        """Makes the tables and the first line, in one transaction: actors of a simulation race."""
        opened: list[Entry] = []
        with self._transaction() as connection:
            for statement in filter(None, map(str.strip, _TABLES.split(";"))):
                connection.execute(statement)
            if not read_entries(connection, "ORDER BY seq DESC LIMIT 1"):
                if seen and not recover:
                    raise self._rolled_back("no entries", seen[-1].seq)
                if not seen:
                    public = self.public_key.public_bytes_raw().hex()
                    body = {"dataset": self.dataset, "unit": self.unit, "key": public}
                    now = int(self._clock())
                    opened = [Entry.signed(1, now, Kind.OPEN, body, GENESIS, self._key)]
                    _insert(connection, opened[0])
        if opened and self._witness is not None:
            self._witness.append(opened)

    def _check(self) -> None:
        """Compares the file with itself and with the site file."""
        entries = self.entries()
        if faults := find_faults(entries, self.public_key):
            raise LedgerError(
                str(self.path), f"{faults[0]} ({len(faults)} faults)",
                "the lines that this site wrote",
                "Put the newest backup back; `fedgraft ledger recover` then adds what it lacks.",
            )  # fmt: skip
        for name, mine in (("dataset", self.dataset), ("unit", self.unit)):
            found = str(entries[0].body.get(name))
            if found != mine:
                raise LedgerError(
                    f"{self.path}: {name}", found, f"{mine!r}, as the site file says",
                    "Every data set has a ledger of its own; name another directory.",
                )  # fmt: skip
        self._recount(entries)

    def _check_rounds(self) -> None:
        """Compares the stored rounds with the commits."""
        entries = self.entries()
        with self._reading() as connection:
            stored = dict(connection.execute("SELECT plan, seq FROM rounds").fetchall())
        for plan, seq in newest_commits(entries).items():
            if stored.get(plan) != seq:
                raise LedgerError(
                    f"{self.path}: stored round of {plan[:12]}", stored.get(plan, "nothing"),
                    f"the output of entry {seq}, the newest commit",
                    "Restore the ledger from a backup, then `fedgraft ledger recover`.",
                )  # fmt: skip
        for name in stored:
            plan, _, half = name.partition("/secure/")
            if half:
                self._secure_half(plan, half)
            else:
                self.finished(name)

    def _compare(self, seen: list[Entry], recover: bool) -> None:
        """Compares the file with what the witness remembers."""
        assert self._witness is not None  # noqa: S101 - durable
        entries = self.entries()
        common = sum(
            1 for _ in takewhile(lambda p: p[0].hash == p[1].hash, zip(entries, seen, strict=False))
        )
        behind = len(entries) - len(seen)
        if common == len(seen) and (behind <= 1 or (recover and seen)):
            self._witness.append(entries[common:])
            return
        if not recover:
            if not seen:
                raise LedgerError(
                    str(self._witness.path), "no such file", "the witness of this ledger",
                    "Put it back from its own disk. If it is lost, `fedgraft ledger recover` "
                    "starts another, and the ledger says so.",
                )  # fmt: skip
            if common == len(seen):
                raise LedgerError(
                    str(self._witness.path), f"{len(seen)} entries",
                    f"{len(entries)}, those of the ledger, or one less",
                    "An old copy of the witness was put back. Put the newest back, or go on with "
                    "`fedgraft ledger recover`.",
                )  # fmt: skip
            found = f"{len(entries)} entries" if len(entries) < len(seen) else "another history"
            raise self._rolled_back(found, seen[-1].seq)
        if faults := find_faults(seen, self.public_key):
            raise LedgerError(
                str(self._witness.path), faults[0], "the witness that this site wrote",
                "Put it back from its own disk or a backup.",
            )  # fmt: skip
        # Another history: everything that the witness alone knows is charged.
        lost = [dict(e.body) for e in charges(seen) if e.seq > common and e.kind is Kind.RESERVE]
        lost += [b for e in seen[common:] if e.kind is Kind.RECOVER for b in e.body.get("lost", [])]
        # Written before the witness is replaced: a crash in between charges twice, never not.
        self._write(Kind.RECOVER, {"lost": lost, "witness": seen[-1].hash if seen else None})
        self._witness.replace(self.entries())

    def _put_back(self, seen: list[Entry]) -> None:
        """Adds the lines that an old copy lacks, as they were; their replies are gone."""
        with self._transaction() as connection:
            known = len(read_entries(connection))
            faults = find_faults(seen, self.public_key)
            if faults or known >= len(seen):
                return
            mine = read_entries(connection, "ORDER BY seq DESC LIMIT 1")
            if mine and mine[0].hash != seen[known - 1].hash:
                return  # this copy went on alone: see `_compare`
            for entry in seen[known:]:
                _insert(connection, entry)
            for output, seq in newest_commits(seen).items():
                if seq > known:
                    connection.execute("DELETE FROM rounds WHERE plan = ?", (output,))
            _give_up_secure_states(connection)
            body = {"restored": len(seen) - known, "witness": seen[-1].hash}
            last = seen[-1]
            note = Entry.signed(last.seq + 1, last.time, Kind.RECOVER, body, last.hash, self._key)
            _insert(connection, note)

    def _keeps_secure_states(self) -> bool:
        with self._reading() as connection:
            query = "SELECT 1 FROM rounds WHERE plan LIKE ?"
            return connection.execute(query, (_SECURE_STATES,)).fetchone() is not None

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


_STORE = "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?)"
_SECURE_STATES = secure_state_of("%", "%")


def read_entries(connection: sqlite3.Connection, which: str = "ORDER BY seq") -> list[Entry]:
    """Lines of an open ledger file; `which` is the end of the SQL statement."""
    rows = connection.execute(
        f"SELECT seq, time, kind, body, previous, signature FROM entries {which}"  # noqa: S608
    )
    return [Entry(s, t, Kind(k), json.loads(b), p, sign) for s, t, k, b, p, sign in rows]


def _insert(connection: sqlite3.Connection, entry: Entry) -> None:
    connection.execute(
        "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)",
        (entry.seq, entry.time, entry.kind.value, _json(entry.body), entry.previous,
         entry.signature),
    )  # fmt: skip


def _give_up_secure_states(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM rounds WHERE plan LIKE ?", (_SECURE_STATES,))


def _json(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def _damaged(path: Path, error: sqlite3.DatabaseError) -> LedgerError:
    return LedgerError(
        str(path), str(error), "an undamaged ledger, and a disk with room",
        "Free some space if the disk is full; else restore the ledger, then "
        "`fedgraft ledger recover`.",
    )  # fmt: skip
