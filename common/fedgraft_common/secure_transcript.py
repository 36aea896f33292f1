"""What an auditor checks: that a server was given the means to open sums, and nothing else.

Every answer carries a statement signed by the site: for this round it gave its share of the
self-mask secret of each survivor and of the round key of each other site. The server keeps them,
and each site keeps its own in its ledger. An auditor who has the server's transcript alone trusts
it to be complete; with statements from at least n - d sites as well, no opening that needed honest
sites can be missing (`fedgraft ledger transcript`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from fedgraft_common.errors import FedgraftError, MessageError
from fedgraft_common.secure_aggregation import ROSTER, STATEMENT, check_roster
from fedgraft_common.secure_messages import (
    Roster,
    Statement,
    Terms,
    from_bits,
    pack_list,
    unpack_list,
)
from fedgraft_common.site_signature import Trust, public_key, verify


class Fault(StrEnum):
    """What can be wrong with a transcript."""

    ROSTER = "roster"  # not one that all its sites signed, or unknown to the auditor
    STATEMENT = "statement"  # not signed by a site of the roster, for another roster or malformed
    TWO_ANSWERS = "two-answers"  # a site spoke of two sets of survivors in a round
    TWO_SETS = "two-sets"  # the server named different survivors to different sites
    BOTH_SECRETS = "both-secrets"  # enough shares were given for both secrets of a site
    LEDGER = "ledger"  # a site's ledger is not whole, or lacks an answer that the site gave
    TOO_FEW = "too-few-survivors"  # a sum over fewer than n - d sites


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        fault: its kind.
        round: 0 if it is about the set-up.
        sites: whom it concerns.
        text: for people.
    """

    fault: Fault
    round: int
    sites: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Transcript:
    """All that was signed under one set-up.

    Attributes:
        terms: of the set-up.
        roster: who took part, with which keys.
        signatures: each site's on the roster.
        statements: one for each answer of each site.
    """

    terms: Terms
    roster: Roster
    signatures: tuple[bytes, ...]
    statements: tuple[Statement, ...]

    def with_statements(self, statements: Iterable[Statement]) -> Self:
        """Also what others kept, such as the sites; the same statement is kept once."""
        merged = dict.fromkeys((*self.statements, *statements))
        return type(self)(self.terms, self.roster, self.signatures, tuple(merged))

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        return pack_list(
            [
                self.terms.to_bytes(), self.roster.to_bytes(), pack_list(self.signatures),
                pack_list([s.to_bytes() for s in self.statements]),
            ]
        )  # fmt: skip

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads what a server kept of one set-up: `set-up.bin` and `round-NNNNNN.bin`.

        Raises:
            MessageError: missing, or malformed.
        """
        try:
            begun = cls.from_bytes((folder / "set-up.bin").read_bytes())
            rounds = [path.read_bytes() for path in sorted(folder.glob("round-*.bin"))]
        except OSError as error:
            raise MessageError(
                str(folder), error.strerror or str(error), "a folder with set-up.bin",
                "Name a transcript-NNNNNN folder of the server's run.",
            ) from None  # fmt: skip
        said = [Statement.from_bytes(part) for content in rounds for part in unpack_list(content)]
        return begun.with_statements(said)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Reads what `to_bytes` made.

        Raises:
            MessageError: malformed.
        """
        terms, roster, signatures, statements = unpack_list(content, 4)
        return cls(
            Terms.from_bytes(terms),
            Roster.from_bytes(roster),
            tuple(unpack_list(signatures)),
            tuple(Statement.from_bytes(part) for part in unpack_list(statements)),
        )


def check_transcript(
    transcript: Transcript, trust: Trust, known_roster: bytes | None = None
) -> list[Finding]:
    """Looks for anything but one sum a round.

    Args:
        transcript: from the server, from sites or merged.
        trust: whose certificates count, at the time of the set-up.
        known_roster: digest that a site wrote down in its own ledger; None if there is none.

    Returns:
        What is wrong, nothing if only sums could be opened.
    """
    findings = _check_setup(transcript, trust, known_roster)
    rounds: dict[int, dict[str, set[frozenset[int]]]] = defaultdict(lambda: defaultdict(set))
    for statement in transcript.statements:
        try:
            survivors = _read(statement, transcript)
        except MessageError as error:
            where = (statement.site,)
            findings.append(Finding(Fault.STATEMENT, statement.round, where, str(error)))
            continue
        rounds[statement.round][statement.site].add(survivors)
    for number in sorted(rounds):
        findings += _check_round(transcript, number, rounds[number])
    return findings


def _check_setup(transcript: Transcript, trust: Trust, known_roster: bytes | None) -> list[Finding]:
    roster = transcript.roster
    texts = []
    if known_roster is not None and known_roster != roster.digest:
        texts.append(f"roster {roster.digest.hex()[:16]}, not the {known_roster.hex()[:16]} known")
    try:
        check_roster(roster, transcript.terms, trust)
        if len(transcript.signatures) != len(roster):
            texts.append(f"{len(transcript.signatures)} signatures for {len(roster)} sites")
        for advertisement, signature in zip(
            roster.advertisements, transcript.signatures, strict=False
        ):
            key = public_key(advertisement.certificate)
            verify(key, ROSTER, roster.digest, signature, advertisement.site)
    except FedgraftError as error:
        texts.append(str(error))
    return [Finding(Fault.ROSTER, 0, (), text) for text in texts]


def _read(statement: Statement, transcript: Transcript) -> frozenset[int]:
    """The survivors a site speaks of, after its signature is checked."""
    roster, terms = transcript.roster, transcript.terms
    number = roster.number(statement.site)
    if statement.roster != roster.digest:
        raise MessageError(
            "statement", "for another roster", "for this one", "It belongs elsewhere."
        )
    if not terms.first_round <= statement.round <= terms.last_round:
        raise MessageError(
            "statement", f"round {statement.round}",
            f"{terms.first_round} to {terms.last_round}", "It belongs elsewhere.",
        )  # fmt: skip
    key = public_key(roster.advertisements[number].certificate)
    verify(key, STATEMENT, statement.signed, statement.signature, statement.site)
    return from_bits(statement.survivors, len(roster))


def _check_round(
    transcript: Transcript, number: int, said: dict[str, set[frozenset[int]]]
) -> list[Finding]:
    terms, names = transcript.terms, transcript.roster.names
    findings = []
    if doubles := sorted(site for site, sets in said.items() if len(sets) > 1):
        text = f"round {number}: {', '.join(doubles)} answered for two sets of survivors"
        findings.append(Finding(Fault.TWO_ANSWERS, number, tuple(doubles), text))
    every = {survivors for sets in said.values() for survivors in sets}
    if len(every) > 1:
        text = f"round {number}: {len(every)} different sets of survivors were named"
        findings.append(Finding(Fault.TWO_SETS, number, tuple(sorted(said)), text))
    fewest = min(map(len, every))
    if fewest < terms.needed:
        text = f"round {number}: {fewest} survivors, fewer than {terms.needed}"
        findings.append(Finding(Fault.TOO_FEW, number, tuple(sorted(said)), text))
    enough = terms.needed - terms.colluders
    given: Counter[tuple[int, bool]] = Counter()
    for sets in said.values():
        for dealer in range(len(names)):
            given.update({(dealer, dealer in survivors) for survivors in sets})
    both = [
        names[dealer]
        for dealer in range(len(names))
        if min(given[dealer, True], given[dealer, False]) >= enough
    ]
    if both:
        text = f"round {number}: shares of both secrets of {', '.join(both)} were given"
        findings.append(Finding(Fault.BOTH_SECRETS, number, tuple(both), text))
    return findings
