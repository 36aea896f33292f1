"""An auditor finds every opening but that of one sum a round."""

from __future__ import annotations

import datetime as dt
import hashlib
from dataclasses import replace

import numpy as np
import pytest

from fedgraft_common.errors import MessageError
from fedgraft_common.secure_aggregation import STATEMENT
from fedgraft_common.secure_messages import Statement, Terms, to_bits
from fedgraft_common.secure_transcript import Fault, Transcript, check_transcript
from fedgraft_simulations.secure_rounds import SecureRounds, Step
from fedgraft_simulations.throwaway_keys import throwaway_keys

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
NAMES = [f"site-{i}" for i in range(5)]
KEYS, TRUST = throwaway_keys(NAMES, NOW)
TERMS = Terms(bytes(32), bytes(16), 1, 3, 4, 32, 5, 1, 1)


def run(seed: int = 0) -> SecureRounds:
    rounds = SecureRounds(
        TERMS, KEYS, TRUST, lambda name: hashlib.sha256(f"{seed}{name}".encode()).digest()
    )
    for number, absent in ((1, {}), (2, {NAMES[1]: Step.MASK}), (3, {NAMES[2]: Step.UNMASK})):
        rounds.sum(number, {name: np.ones(4, np.uint32) for name in NAMES}, b"", absent)
    return rounds


ROUNDS = run()
HONEST = ROUNDS.transcript()


def stated(name: str, number: int, survivors: set[int], signer: str = "") -> Statement:
    """What a site, or somebody in its name, might have signed."""
    bits = to_bits(sorted(survivors), 5)
    unsigned = Statement(name, HONEST.roster.digest, number, bits, bytes(32))
    signature = KEYS[signer or name].sign(STATEMENT, unsigned.signed)
    return replace(unsigned, signature=signature)


def faults(transcript: Transcript) -> dict[Fault, int]:
    return {f.fault: f.round for f in check_transcript(transcript, TRUST)}


def test_an_honest_run_has_no_findings() -> None:
    assert check_transcript(HONEST, TRUST, HONEST.roster.digest) == []
    assert len(HONEST.statements) == 5 + 4 + 4


def test_it_survives_the_way_to_the_auditor() -> None:
    assert Transcript.from_bytes(HONEST.to_bytes()) == HONEST
    with pytest.raises(MessageError):
        Transcript.from_bytes(HONEST.to_bytes()[:-1])


def test_sites_have_the_same_statements_as_the_server() -> None:
    own = [s for site in ROUNDS.sites.values() for s in site.statements()]
    assert HONEST.with_statements(own) == HONEST
    server = replace(HONEST, statements=HONEST.statements[:3])  # it kept some to itself
    assert set(server.with_statements(own).statements) == set(HONEST.statements)


def test_a_site_that_spoke_of_two_sets_is_found() -> None:
    """As a site whose state was put back from a copy would."""
    found = faults(HONEST.with_statements([stated(NAMES[0], 2, {0, 1, 2, 3, 4})]))
    assert found == {Fault.TWO_ANSWERS: 2, Fault.TWO_SETS: 2}


def test_different_sets_for_different_sites_are_found() -> None:
    kept = tuple(s for s in HONEST.statements if (s.round, s.site) != (1, NAMES[0]))
    transcript = replace(HONEST, statements=(*kept, stated(NAMES[0], 1, {0, 1, 2, 3})))
    assert faults(transcript) == {Fault.TWO_SETS: 1}


def test_both_secrets_of_a_site_are_found() -> None:
    """Three honest shares and the colluder's are enough for either."""
    others = [stated(name, 2, {0, 1, 2, 3, 4}) for name in NAMES[:3]]
    found = check_transcript(HONEST.with_statements(others), TRUST)
    both = [f for f in found if f.fault is Fault.BOTH_SECRETS]
    assert [(f.round, f.sites) for f in both] == [(2, (NAMES[1],))]
    fewer = HONEST.with_statements(others[:2])
    assert Fault.BOTH_SECRETS not in faults(fewer)


def test_a_sum_over_too_few_sites_is_found() -> None:
    small = tuple(stated(name, 3, {0, 1, 2}) for name in NAMES)
    kept = tuple(s for s in HONEST.statements if s.round != 3)
    assert faults(replace(HONEST, statements=(*kept, *small))) == {Fault.TOO_FEW: 3}


def test_statements_that_no_site_signed_are_found() -> None:
    for wrong in (
        stated(NAMES[0], 1, {0, 1, 2, 3, 4}, signer=NAMES[1]),
        replace(HONEST.statements[0], shares=bytes(32)),
        replace(HONEST.statements[0], site="site-9"),
        replace(HONEST.statements[0], roster=bytes(32)),
        stated(NAMES[0], 4, {0, 1, 2, 3, 4}),
        replace(HONEST.statements[0], survivors=b"\xff"),
    ):
        assert Fault.STATEMENT in faults(replace(HONEST, statements=(wrong,)))


def test_a_roster_that_not_all_signed_or_nobody_knows_is_found() -> None:
    other = run(seed=1).transcript()
    for wrong in (
        replace(HONEST, signatures=HONEST.signatures[:4]),
        replace(HONEST, signatures=HONEST.signatures[::-1]),
        replace(HONEST, roster=other.roster),
        replace(HONEST, terms=replace(TERMS, session=b"\1" * 16)),
    ):
        assert Fault.ROSTER in faults(wrong)
    unknown = check_transcript(other, TRUST, HONEST.roster.digest)
    assert [f.fault for f in unknown] == [Fault.ROSTER]
    _, stranger = throwaway_keys([], NOW)
    assert [f.fault for f in check_transcript(HONEST, stranger)] == [Fault.ROSTER]


def test_it_is_small() -> None:
    per_statement = max(len(s.to_bytes()) for s in HONEST.statements)
    assert per_statement < 300
