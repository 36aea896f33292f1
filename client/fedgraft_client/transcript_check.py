"""A server's transcript of secure aggregation, held against the ledgers of the sites.

A server can leave statements out of its transcript; a site's own are in its ledger, chained and
signed. With the ledgers of n - d sites no opening that needed honest sites can be missing.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedgraft_client.account import public_key
from fedgraft_client.entry import Entry, Kind, find_faults
from fedgraft_common.certificates import read_certificate
from fedgraft_common.errors import MessageError
from fedgraft_common.secure_messages import Statement
from fedgraft_common.secure_transcript import Fault, Finding, Transcript, check_transcript
from fedgraft_common.site_signature import Trust


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of it.

    Attributes:
        findings: what is wrong; nothing if only sums could be opened.
        sites: whose ledgers know this set-up.
        answers: statements in all, from server and ledgers.
        left_out: how many of them the server's transcript does not have.
    """

    findings: tuple[Finding, ...]
    sites: tuple[str, ...]
    answers: int
    left_out: int


def compare(
    transcript: Transcript, ledgers: Mapping[str, Sequence[Entry]], authority: Path
) -> Comparison:
    """Checks one set-up.

    Args:
        transcript: the server's.
        ledgers: lines of each site's ledger or export, by a name for the auditor.
        authority: the federation's CA certificate, a PEM file.

    Raises:
        LedgerError: a ledger does not begin with its key.
        IdentityError: there is no certificate.
    """
    findings: list[Finding] = []
    sites: list[str] = []
    known: list[Statement] = []
    moment = dt.datetime.now(dt.UTC)
    for label, entries in ledgers.items():
        faults = find_faults(entries, public_key(entries))
        findings += [Finding(Fault.LEDGER, 0, (), f"{label}: {fault}") for fault in faults]
        share = _signed_roster(entries, transcript)
        if share is None:
            text = f"{label}: never signed this roster, {transcript.roster.digest.hex()[:16]}"
            findings.append(Finding(Fault.ROSTER, 0, (), text))
            continue
        site = str(share.body["site"])
        moment = dt.datetime.fromtimestamp(share.time, dt.UTC)
        own, unreadable = _statements(entries, transcript)
        findings += [Finding(Fault.STATEMENT, 0, (site,), f"{label}: {u}") for u in unreadable]
        findings += [
            Finding(
                Fault.LEDGER, s.round, (site,),
                f"round {s.round}: {label} does not have an answer of {site} that the server has",
            )
            for s in transcript.statements
            if s.site == site and s not in own
        ]  # fmt: skip
        sites.append(site)
        known += own
    whole = transcript.with_statements(known)
    trust = Trust(read_certificate(authority), moment)
    findings += check_transcript(whole, trust)
    left_out = len(whole.statements) - len(dict.fromkeys(transcript.statements))
    return Comparison(tuple(findings), tuple(sites), len(whole.statements), left_out)


def _signed_roster(entries: Sequence[Entry], transcript: Transcript) -> Entry | None:
    """The line with which the site signed the transcript's roster."""
    digest = transcript.roster.digest.hex()
    return next(
        (e for e in entries if e.kind is Kind.SECURE and e.body.get("roster") == digest), None
    )


def _statements(
    entries: Sequence[Entry], transcript: Transcript
) -> tuple[list[Statement], list[str]]:
    """The site's own under the transcript's roster, and what could not be read."""
    found, unreadable = [], []
    for entry in entries:
        if entry.kind is not Kind.SECURE or "statement" not in entry.body:
            continue
        try:
            statement = Statement.from_bytes(bytes.fromhex(entry.body["statement"]))
        except (MessageError, ValueError) as error:
            unreadable.append(f"entry {entry.seq}: {error}")
            continue
        if statement.roster == transcript.roster.digest:
            found.append(statement)
    return found, unreadable
