"""Who may connect: invites, sites and their certificates, in one SQLite file.

The commands (`fedgraft server invite`, `revoke`) and the running server share it; a change shows
at the next request. A site's certificates are all its own until they expire, because a site that
renews may crash before it has stored the new one.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509

from fedgraft_common.certificates import fingerprint
from fedgraft_common.errors import IdentityError

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS invites (
    secret_sha256 TEXT PRIMARY KEY, name TEXT NOT NULL, groups TEXT NOT NULL,
    created REAL NOT NULL, expires REAL NOT NULL, used REAL);
CREATE TABLE IF NOT EXISTS sites (
    name TEXT PRIMARY KEY, groups TEXT NOT NULL, node_key TEXT NOT NULL UNIQUE, node_id TEXT,
    joined REAL NOT NULL, revoked REAL);
CREATE TABLE IF NOT EXISTS certificates (
    fingerprint TEXT PRIMARY KEY, site TEXT NOT NULL, serial TEXT NOT NULL,
    issued REAL NOT NULL, expires REAL NOT NULL, revoked REAL);
"""


@dataclass(frozen=True, slots=True)
class Site:
    """A site that joined.

    Attributes:
        name: unique.
        groups: what a plan may name instead of sites.
        node_key: public key of its Flower node, PEM.
        node_id: Flower's number for that key; None until the SuperLink has seen it.
        joined: UTC.
        revoked: UTC, or None.
        expires: end of its newest certificate, UTC.
        serial: of its newest certificate, hexadecimal.
        fingerprint: SHA-256 of its newest certificate, hexadecimal.
    """

    name: str
    groups: tuple[str, ...]
    node_key: str
    node_id: int | None
    joined: dt.datetime
    revoked: dt.datetime | None
    expires: dt.datetime
    serial: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class _Known:
    site: str
    expires: dt.datetime
    revoked: dt.datetime | None


def utc_now() -> dt.datetime:
    """The clock."""
    return dt.datetime.now(dt.UTC)


class Registry:
    """One file; safe to use from several threads and processes.

    Args:
        path: made if it does not exist, by one process alone: `fedgraft server init` does it.
        now: the clock, with time zone.

    Raises:
        IdentityError: the file is damaged or cannot be opened.
    """

    def __init__(self, path: Path, now: Callable[[], dt.datetime] = utc_now) -> None:
        self._now = now
        self._lock = threading.RLock()
        if not path.exists():
            path.touch(mode=0o600)  # SQLite gives its other files the same mode
        self._database = sqlite3.connect(
            path, timeout=10, isolation_level=None, check_same_thread=False
        )
        try:
            with closing(self._database.cursor()) as cursor:
                if cursor.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                    cursor.execute("PRAGMA journal_mode=WAL")
                    cursor.executescript(_SCHEMA)
                cursor.execute("PRAGMA synchronous=FULL")
                cursor.execute("SELECT 1 FROM certificates LIMIT 1")
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise IdentityError(
                str(path), str(error), "a registry written by fedgraft",
                "Restore the server's directory from a backup.",
            ) from None  # fmt: skip
        self._version = -1
        self._sites: dict[str, Site] = {}
        self._certificates: dict[str, _Known] = {}

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._database.close()

    def __enter__(self) -> Registry:
        """Closed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """See `close`."""
        self.close()

    # --- joining

    def invite(self, name: str, groups: tuple[str, ...], valid: dt.timedelta) -> str:
        """A one-time secret for a new site; an older, unused one for the same name ends.

        Raises:
            IdentityError: the site has joined already.
        """
        secret = secrets.token_urlsafe(32)
        now = self._now()
        with self._transaction() as cursor:
            site = self._sites.get(name)
            if site is not None and site.revoked is None:
                raise IdentityError(
                    "site name", name, "a name no present site has",
                    f"Choose another, or `fedgraft server revoke {name}` first.",
                )  # fmt: skip
            cursor.execute("DELETE FROM invites WHERE name = ? AND used IS NULL", (name,))
            cursor.execute(
                "INSERT INTO invites VALUES (?, ?, ?, ?, ?, NULL)",
                (
                    _digest(secret), name, json.dumps(groups), now.timestamp(),
                    (now + valid).timestamp(),
                ),
            )  # fmt: skip
        return secret

    def join(
        self, secret: str, node_key: str, issue: Callable[[str], x509.Certificate]
    ) -> tuple[Site, x509.Certificate]:
        """Uses up an invite: a secret makes one site, once.

        Args:
            secret: of the invite.
            node_key: public, PEM as `public_pem` writes it.
            issue: makes the certificate for a name.

        Raises:
            IdentityError: unknown, used or expired invite; or the node key is another site's.
        """
        now = self._now()
        with self._transaction() as cursor:
            row = cursor.execute(
                "SELECT name, groups, expires, used FROM invites WHERE secret_sha256 = ?",
                (_digest(secret),),
            ).fetchone()
            action = "Ask the federation's operator for a new invite."
            if row is None:
                raise IdentityError(
                    "invite", "a secret this server did not give out or has replaced",
                    "the newest invite of this federation", action,
                )  # fmt: skip
            name, groups, expires, used = row
            if used is not None:
                raise IdentityError(
                    "invite", f"one used on {_date(used):%Y-%m-%d %H:%M} UTC", "an unused invite",
                    f"{action} If you did not use it, tell them: somebody else did.",
                )  # fmt: skip
            if now.timestamp() > expires:
                raise IdentityError(
                    "invite", f"one that expired on {_date(expires):%Y-%m-%d %H:%M} UTC",
                    "an invite within its time", action,
                )  # fmt: skip
            owner = next((s for s in self._sites.values() if s.node_key == node_key), None)
            if owner is not None:
                raise IdentityError(
                    "node key", "a key that is in the registry already",
                    "a key of this site alone", "Join with an empty directory.",
                )  # fmt: skip
            certificate = issue(name)
            cursor.execute(
                "UPDATE invites SET used = ? WHERE secret_sha256 = ?",
                (now.timestamp(), _digest(secret)),
            )
            cursor.execute(
                "INSERT OR REPLACE INTO sites VALUES (?, ?, ?, NULL, ?, NULL)",
                (name, groups, node_key, now.timestamp()),
            )
            _insert_certificate(cursor, name, certificate, now)
        with self._lock:
            self._refresh()
            return self._sites[name], certificate

    def add_certificate(self, site: Site, certificate: x509.Certificate) -> None:
        """Records a renewed certificate; the older ones stay valid until they expire."""
        with self._transaction() as cursor:
            _insert_certificate(cursor, site.name, certificate, self._now())

    def revoke(self, name: str) -> None:
        """Shuts a site out, with every certificate it has; or takes an unused invite back.

        Raises:
            IdentityError: there is no such site or invite, or it is revoked already.
        """
        now = self._now().timestamp()
        with self._transaction() as cursor:
            site = self._sites.get(name)
            if site is None or site.revoked is not None:
                invites = "DELETE FROM invites WHERE name = ? AND used IS NULL"
                if cursor.execute(invites, (name,)).rowcount:
                    return
                present = ", ".join(s.name for s in self._sites.values() if s.revoked is None)
                raise IdentityError(
                    "site name", name, f"one of: {present or '(no site has joined)'}",
                    "List them with `fedgraft server sites`.",
                )  # fmt: skip
            cursor.execute("UPDATE sites SET revoked = ? WHERE name = ?", (now, name))
            cursor.execute(
                "UPDATE certificates SET revoked = ? WHERE site = ? AND revoked IS NULL",
                (now, name),
            )

    # --- looking up

    def sites(self) -> tuple[Site, ...]:
        """All that ever joined, by name; a name invited again after revocation shows once."""
        with self._lock:
            self._refresh()
            return tuple(self._sites.values())

    def members(
        self, names: Iterable[str] | None = None, group: str | None = None
    ) -> tuple[Site, ...]:
        """The sites a run addresses.

        Args:
            names: exactly these; or
            group: every present site of this group; neither: every present site.

        Raises:
            IdentityError: a name that is unknown or revoked, or a group without a site.
        """
        present = {site.name: site for site in self.sites() if site.revoked is None}
        if names is not None:
            wanted = tuple(dict.fromkeys(names))
            for name in wanted:
                if name not in present:
                    raise IdentityError(
                        "site name", name, f"one of: {', '.join(present) or '(none)'}",
                        "Correct the plan, or invite the site.",
                    )  # fmt: skip
            return tuple(present[name] for name in wanted)
        chosen = tuple(s for s in present.values() if group is None or group in s.groups)
        if not chosen:
            groups = sorted({g for s in present.values() for g in s.groups})
            raise IdentityError(
                "group", group or "(every site)", f"one of: {', '.join(groups) or '(none)'}",
                "Invite sites with `fedgraft server invite NAME --group GROUP`.",
            )  # fmt: skip
        return chosen

    def node_keys(
        self, names: Iterable[str] | None = None, group: str | None = None
    ) -> dict[str, str]:
        """Site name -> public key of its Flower node (PEM); see `members`."""
        return {site.name: site.node_key for site in self.members(names, group)}

    def node_ids(
        self, names: Iterable[str] | None = None, group: str | None = None
    ) -> dict[str, int]:
        """Site name -> Flower's node id; see `members`. A site the SuperLink lacks is left out."""
        found = self.members(names, group)
        return {site.name: site.node_id for site in found if site.node_id is not None}

    def site_of(self, certificate_sha256: str) -> Site:
        """The site that holds a certificate.

        Args:
            certificate_sha256: of its DER form, hexadecimal; the signature was verified by TLS.

        Raises:
            IdentityError: not in the registry, revoked, or expired.
        """
        with self._lock:
            self._refresh()
            known = self._certificates.get(certificate_sha256)
            now = self._now()
            if known is None:
                raise IdentityError(
                    "certificate", "one this server's registry does not know",
                    "a certificate from `fedgraft site join`", "Join this federation.",
                )  # fmt: skip
            if known.revoked is not None:
                raise IdentityError(
                    "certificate",
                    f"one of site {known.site}, revoked on {known.revoked:%Y-%m-%d %H:%M} UTC",
                    "a certificate that is not revoked",
                    "Talk to the federation's operator.",
                )  # fmt: skip
            if now > known.expires:
                raise IdentityError(
                    "certificate",
                    f"one of site {known.site}, expired on {known.expires:%Y-%m-%d %H:%M} UTC",
                    "a certificate within its time",
                    "Ask the federation's operator to revoke and invite the site again.",
                )  # fmt: skip
            return self._sites[known.site]

    def set_node_ids(self, ids: Mapping[str, int]) -> None:
        """Records Flower's node ids, by public key (PEM)."""
        with self._transaction() as cursor:
            for site in self._sites.values():
                if site.node_id != ids.get(site.node_key):
                    number = ids.get(site.node_key)
                    cursor.execute(
                        "UPDATE sites SET node_id = ? WHERE name = ?",
                        (None if number is None else str(number), site.name),
                    )

    @property
    def version(self) -> int:
        """Changes whenever another process changed the file."""
        with self._lock:
            return int(self._database.execute("PRAGMA data_version").fetchone()[0])

    # --- the file

    def _transaction(self) -> _Transaction:
        return _Transaction(self)

    def _refresh(self) -> None:
        """Reads everything again if another connection changed the file."""
        if self.version == self._version:
            return
        if self._database.in_transaction:
            self._read()
            return
        with closing(self._database.cursor()) as cursor:
            cursor.execute("BEGIN")  # one state of the file for all the statements
            try:
                self._read()
            finally:
                cursor.execute("COMMIT")

    def _read(self) -> None:
        rows = self._database.execute(
            "SELECT fingerprint, site, serial, expires, revoked FROM certificates ORDER BY rowid"
        ).fetchall()
        self._certificates = {
            row[0]: _Known(row[1], _date(row[3]), None if row[4] is None else _date(row[4]))
            for row in rows
        }
        newest = {row[1]: row for row in rows}
        self._sites = {}
        for name, groups, key, number, joined, revoked in self._database.execute(
            "SELECT name, groups, node_key, node_id, joined, revoked FROM sites ORDER BY name"
        ):
            digest, _, serial, expires, _ = newest[name]
            self._sites[name] = Site(
                name, tuple(json.loads(groups)), key, None if number is None else int(number),
                _date(joined), None if revoked is None else _date(revoked), _date(expires),
                serial, digest,
            )  # fmt: skip
        self._version = self.version


class _Transaction:
    """One write, whole or not at all, with what it decides on read inside it."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._cursor = registry._database.cursor()

    def __enter__(self) -> sqlite3.Cursor:
        registry = self._registry
        registry._lock.acquire()
        try:
            self._cursor.execute("BEGIN IMMEDIATE")
            registry._version = -1
            registry._refresh()
        except BaseException:
            registry._lock.release()
            raise
        return self._cursor

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        registry = self._registry
        try:
            self._cursor.execute("COMMIT" if kind is None else "ROLLBACK")
            self._cursor.close()
        finally:
            registry._version = -1  # data_version does not show a connection its own writes
            registry._lock.release()


def _insert_certificate(
    cursor: sqlite3.Cursor, name: str, certificate: x509.Certificate, now: dt.datetime
) -> None:
    cursor.execute(
        "INSERT INTO certificates VALUES (?, ?, ?, ?, ?, NULL)",
        (
            fingerprint(certificate), name, f"{certificate.serial_number:x}", now.timestamp(),
            certificate.not_valid_after_utc.timestamp(),
        ),
    )  # fmt: skip


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _date(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, dt.UTC)
