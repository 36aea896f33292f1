"""Every message survives the way there, and nothing but its canonical bytes is read as it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgraft_common.errors import MessageError, PlanError
from fedgraft_common.secure_messages import (
    Acceptance,
    Advertisement,
    Answer,
    Delivery,
    Question,
    Roster,
    Sharing,
    Statement,
    Terms,
    from_bits,
    pack_list,
    to_bits,
    unpack_list,
)
from fedgraft_common.shamir import SHARE

TERMS = Terms(bytes(32), bytes(16), 1, 60, 1000, 32, 8, 2, 1)
NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
HASHES = st.binary(min_size=32, max_size=32)
NUMBERS = st.integers(0, 2**63 - 1)
SHORT = st.binary(max_size=40)


@st.composite
def advertisements(draw: st.DrawFn, name: st.SearchStrategy[str] = NAMES) -> Advertisement:
    rounds = draw(st.integers(1, 3))
    keys = st.binary(min_size=32 * rounds, max_size=32 * rounds)
    return Advertisement(
        draw(HASHES), draw(name), draw(SHORT), draw(HASHES), draw(keys), draw(keys), draw(SHORT)
    )


@st.composite
def rosters(draw: st.DrawFn) -> Roster:
    names = sorted(draw(st.sets(NAMES, max_size=3)))
    return Roster(tuple(draw(advertisements(st.just(name))) for name in names))


STATEMENTS = st.builds(Statement, NAMES, HASHES, NUMBERS, SHORT, HASHES, SHORT)


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    shares = draw(st.binary(max_size=4)) * SHARE
    statement = draw(STATEMENTS)
    return Answer(replace(statement, shares=hashlib.sha256(shares).digest()), shares)


MESSAGES = st.one_of(
    st.just(TERMS),
    advertisements(),
    rosters(),
    st.builds(Sharing, NAMES, HASHES, st.lists(SHORT, max_size=3).map(tuple), SHORT),
    st.builds(
        Delivery,
        HASHES,
        st.lists(SHORT, max_size=3).map(tuple),
        st.lists(SHORT, max_size=3).map(tuple),
    ),
    st.builds(Acceptance, HASHES, SHORT),
    st.builds(Question, HASHES, NUMBERS, SHORT),
    STATEMENTS,
    answers(),
)


@given(MESSAGES)
def test_a_message_survives_the_way(message: Any) -> None:
    assert type(message).from_bytes(message.to_bytes()) == message


@settings(max_examples=200)
@given(MESSAGES, st.data())
def test_other_bytes_are_another_message_or_none(message: Any, data: st.DataObject) -> None:
    """Canonical: whatever parses has exactly the bytes it was parsed from."""
    content = bytearray(message.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "drop"])):
            case "flip" if at < len(content):
                content[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del content[at:]
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case _:
                del content[at : at + 1]
    try:
        parsed = type(message).from_bytes(bytes(content))
    except (MessageError, PlanError):
        return
    assert parsed.to_bytes() == content


@settings(max_examples=25)
@given(st.binary(max_size=200))
@pytest.mark.parametrize(
    "kind", [Terms, Advertisement, Roster, Sharing, Delivery, Question, Statement, Answer]
)
def test_noise_is_refused(kind: Any, content: bytes) -> None:
    with pytest.raises(MessageError):
        kind.from_bytes(content)


def test_numbers_end_below_two_to_the_63() -> None:
    content = Question(bytes(32), 2**63 - 1, b"").to_bytes()
    assert Question.from_bytes(content).round == 2**63 - 1
    with pytest.raises(MessageError, match="number"):
        Question.from_bytes(Question(bytes(32), 2**63, b"").to_bytes())


def test_one_kind_is_never_read_as_another() -> None:
    with pytest.raises(MessageError, match="mark and kind"):
        Statement.from_bytes(TERMS.to_bytes())


@given(st.integers(1, 40), st.data())
def test_survivors_are_bits(sites: int, data: st.DataObject) -> None:
    numbers = data.draw(st.sets(st.integers(0, sites - 1)))
    bits = to_bits(sorted(numbers), sites)
    assert len(bits) == -(-sites // 8)
    assert from_bits(bits, sites) == numbers


@pytest.mark.parametrize("bits", [b"", b"\x01", b"\xc1", bytes(2)])
def test_survivors_beyond_the_last_site_are_refused(bits: bytes) -> None:
    """Seven sites: one byte, whose last bit belongs to nobody."""
    with pytest.raises(MessageError, match="survivors"):
        from_bits(bits, 7)


def test_a_roster_has_each_site_once_and_in_order() -> None:
    one = Advertisement(bytes(32), "a", b"", bytes(32), bytes(32), bytes(32))
    two = replace(one, site="b")
    assert Roster.from_bytes(Roster((one, two)).to_bytes()).names == ("a", "b")
    for wrong in ((two, one), (one, one)):
        with pytest.raises(MessageError, match="roster"):
            Roster.from_bytes(Roster(wrong).to_bytes())
    with pytest.raises(MessageError, match="one of the roster"):
        Roster((one,)).number("b")


def test_an_answer_with_other_shares_than_it_speaks_of_is_refused() -> None:
    statement = Statement("a", bytes(32), 1, b"", hashlib.sha256(bytes(SHARE)).digest())
    content = Answer(statement, bytes(SHARE)).to_bytes()
    assert Answer.from_bytes(content).shares == bytes(SHARE)
    with pytest.raises(MessageError, match="those it speaks of"):
        Answer.from_bytes(content[:-1] + b"\x01")


def test_lists() -> None:
    assert unpack_list(pack_list([b"", b"ab"])) == [b"", b"ab"]
    with pytest.raises(MessageError):
        unpack_list(pack_list([b"a"]), 2)


# Terms: d (d + 1) + c < n, and sizes.


@pytest.mark.parametrize(
    ("n", "d", "c"),
    [(3, 0, 0), (3, 0, 2), (3, 1, 0), (4, 1, 1), (8, 2, 1), (100, 9, 9), (16, 3, 3)],
)
def test_terms_that_can_be_met(n: int, d: int, c: int) -> None:
    terms = replace(TERMS, sites=n, dropouts=d, colluders=c)
    assert terms.needed == n - d


@pytest.mark.parametrize(
    ("n", "d", "c"),
    [(3, 0, 3), (3, 1, 1), (8, 2, 2), (100, 9, 10), (6, 2, 0), (3, 3, 0)],
)
def test_terms_under_which_a_server_could_cheat_are_refused(n: int, d: int, c: int) -> None:
    with pytest.raises(PlanError, match=r"tolerated_dropouts.*Tolerate fewer"):
        replace(TERMS, sites=n, dropouts=d, colluders=c)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 16}, {"rounds": 0}, {"first_round": 0}, {"length": 0}, {"sites": 2},
        {"dropouts": -1}, {"colluders": -1}, {"run": b""}, {"session": bytes(15)},
        {"rounds": 10**6}, {"length": 2**40}, {"sites": 10**5},
    ],
)  # fmt: skip
def test_terms_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        replace(TERMS, **change)


def test_every_term_counts_in_the_digest() -> None:
    changes: list[dict[str, Any]] = [
        {"run": b"\1" * 32}, {"session": b"\1" * 16}, {"first_round": 2}, {"rounds": 61},
        {"length": 999}, {"bits": 64}, {"sites": 9}, {"dropouts": 1}, {"colluders": 0},
    ]  # fmt: skip
    digests = {TERMS.digest, *(replace(TERMS, **change).digest for change in changes)}
    assert len(digests) == 10
