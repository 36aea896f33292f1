"""Whose keys a site knows among its peers in secure aggregation, and who counts as a stranger.

The federation's CA vouches for peers, and whoever runs the server holds its key: it could invite
sites that do not exist, or certify keys of its own in other sites' names, and would then learn what
the one real site sent. So a site remembers in its ledger whom it met, by name and key. An unknown
name, or a known name with another key, counts as a colluder from then on; a roster with more of
them than the plan tolerates is not signed.

    rule "first"      the peers of the first roster are known; who comes later is a stranger
    rule "approved"   only those are known whom the operator accepted

    <directory>/strangers.json   the strangers of the newest roster, name to fingerprint
    <directory>/NAME.accepted    the operator's word: a fingerprint; goes into the ledger when seen
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from fedgraft_client.entry import Entry, Kind
from fedgraft_client.ledger import Ledger
from fedgraft_common.atomic import write_atomically
from fedgraft_common.errors import IdentityError
from fedgraft_common.secure_messages import NAME, Roster
from fedgraft_common.site_signature import key_fingerprint, public_key

log = logging.getLogger(__name__)
Rule = Literal["first", "approved"]
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def known_peers(entries: Iterable[Entry]) -> dict[str, str]:
    """Key fingerprints of the peers that a ledger vouches for, by name; the newest counts."""
    known: dict[str, str] = {}
    for entry in entries:
        if entry.kind is Kind.PEER:
            known[entry.body["peer"]] = entry.body["key"]
        elif entry.kind is Kind.SECURE and "peers" in entry.body:
            strangers = entry.body["strangers"]
            known |= {n: k for n, k in entry.body["peers"].items() if n not in strangers}
    return known


class Peers:
    """A site's peers.

    Args:
        ledger: of the site.
        directory: where the operator's word and the newest strangers are.
        rule: see the module; None, in a simulation: all are known.
    """

    def __init__(self, ledger: Ledger, directory: Path, rule: Rule | None) -> None:
        self._ledger = ledger
        self._directory = directory
        self._rule = rule

    def meet(self, roster: Roster, me: str, tolerated: int) -> dict[str, Any]:
        """Holds a roster, whose certificates have been checked, against whom the site knows.

        Args:
            roster: that the server sent.
            me: this site's name.
            tolerated: colluders that the plan allows for.

        Returns:
            For the ledger: who signs, the roster's digest, the peers' keys, and the strangers
            among them.

        Raises:
            IdentityError: more strangers than that.
        """
        met = {
            advertisement.site: key_fingerprint(public_key(advertisement.certificate))
            for advertisement in roster.advertisements
            if advertisement.site != me
        }
        strangers = self._strangers(met)
        if strangers:
            text = json.dumps({name: met[name] for name in strangers}, indent=2)
            write_atomically(self._directory / "strangers.json", text.encode(), durable=False)
            log.warning(
                "strangers in secure aggregation, counted as colluders: %s", ", ".join(strangers),
                extra={"action": "peers"},
            )  # fmt: skip
        if len(strangers) > tolerated:
            raise IdentityError(
                "peers in secure aggregation",
                f"{len(strangers)} that this site does not know ({', '.join(strangers[:8])})",
                f"at most {tolerated}, the colluders that the plan tolerates (policy.peers = "
                f"{self._rule!r})",
                "Compare fingerprints with those sites, by telephone: `fedgraft site peers`; then "
                "`fedgraft site accept-peer NAME FINGERPRINT`.",
            )  # fmt: skip
        return {
            "site": me, "roster": roster.digest.hex(), "peers": met, "strangers": strangers
        }  # fmt: skip

    def _strangers(self, met: Mapping[str, str]) -> list[str]:
        if self._rule is None:
            return []
        entries = self._ledger.entries()
        known = known_peers(entries)
        for name, key in accepted(self._directory).items():
            if known.get(name) != key:
                self._ledger.accept_peer(name, key)
                known[name] = key
        first = self._rule == "first" and not any("peers" in e.body for e in entries)
        return [name for name, key in met.items() if known.get(name, key if first else None) != key]


def accepted(directory: Path) -> dict[str, str]:
    """Fingerprints that the operator accepted, by name."""
    return {path.stem: path.read_text().strip() for path in sorted(directory.glob("*.accepted"))}


def strangers(directory: Path) -> dict[str, str]:
    """Fingerprints of the newest roster's strangers, by name."""
    path = directory / "strangers.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def accept(directory: Path, name: str, fingerprint: str) -> None:
    """Leaves the operator's word for the daemon, which alone writes to the ledger.

    Raises:
        IdentityError: not a site's name, or not a fingerprint.
    """
    key = fingerprint.lower().replace(":", "")
    if not NAME.fullmatch(name.encode()):
        raise IdentityError(
            "NAME", name, "a site's name: lower-case letters, digits, hyphens",
            "List the peers with `fedgraft site peers`.",
        )  # fmt: skip
    if not _FINGERPRINT.fullmatch(key):
        raise IdentityError(
            "FINGERPRINT", fingerprint, "64 hexadecimal digits",
            "It is what `fedgraft site peers` prints at that site, as its own.",
        )  # fmt: skip
    write_atomically(directory / f"{name}.accepted", f"{key}\n".encode())
