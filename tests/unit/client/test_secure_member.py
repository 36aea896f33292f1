"""A durable site in secure aggregation: every step from the disk, every answer only once."""

from __future__ import annotations

import datetime as dt
import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedgraft_client.egress import guard_secure
from fedgraft_client.entry import Kind
from fedgraft_client.ledger import Ledger
from fedgraft_client.peers import Peers, Rule
from fedgraft_client.secure_member import Membership, SecureMember
from fedgraft_common.errors import (
    EgressError,
    FedgraftError,
    IdentityError,
    LedgerError,
    MessageError,
)
from fedgraft_common.messages import SecureStep, Status, write_secure
from fedgraft_common.plan import Plan
from fedgraft_common.secure_aggregation import SecureRound, SecureServer, SecureSite
from fedgraft_common.secure_messages import (
    Acceptance,
    Advertisement,
    Answer,
    Delivery,
    Question,
    Sharing,
    Statement,
    from_bits,
    to_bits,
)
from fedgraft_common.secure_terms import secure_terms
from fedgraft_common.site_signature import Trust, key_fingerprint
from fedgraft_simulations.throwaway_keys import throwaway_authority, throwaway_key

NAMES, LENGTH, CONTEXT = ["east", "north", "south", "west"], 5, bytes(32)
NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
AUTHORITY = throwaway_authority(NOW)
KEYS = {name: throwaway_key(AUTHORITY, name, NOW) for name in NAMES}
TRUST = Trust(AUTHORITY.certificate, NOW)
PLAN = Plan().replace(
    {
        "privacy.mechanism": "distributed",
        "privacy.tolerated_dropouts": 1,
        "training.sample_rate": 0.5,
        "aggregation.sites": len(NAMES),
        "rounds.count": 3,
    }
)


class Sites:
    """Four sites on disk; each question meets a process that has just started."""

    rule: Rule = "first"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        terms = secure_terms(PLAN, LENGTH, 32, bytes(16), 1)
        self.server = SecureServer(terms, TRUST)

    def restarted(self, name: str, work: Callable[[SecureMember, Ledger], Any]) -> Any:
        with Ledger(self.directory / name, "x-rays") as ledger:
            membership = Membership(KEYS[name], lambda: TRUST)
            peers = Peers(ledger, self.directory / name / "peers", self.rule)
            return work(SecureMember(PLAN, LENGTH, 32, ledger, membership, peers), ledger)

    def ask(self, name: str, step: SecureStep, number: int, content: bytes) -> bytes:
        def work(member: SecureMember, _: Ledger) -> bytes:
            return member.answer(step, number, content)

        answer: bytes = self.restarted(name, work)
        assert self.restarted(name, work) == answer  # asked again after a crash: the same bytes
        return answer

    def set_up(self) -> None:
        for name in NAMES:
            terms = self.server.terms.to_bytes()
            answer = self.ask(name, SecureStep.ADVERTISE, 1, terms)
            self.server.add_advertisement(Advertisement.from_bytes(answer))
        roster = self.server.close_roster().to_bytes()
        for name in NAMES:
            self.server.add_sharing(Sharing.from_bytes(self.ask(name, SecureStep.SHARE, 1, roster)))
        for name in NAMES:
            delivery = self.server.delivery(name).to_bytes()

            def accept(member: SecureMember, _: Ledger, delivery: bytes = delivery) -> None:
                member.accept(1, delivery)

            self.restarted(name, accept)

    def mask(self, name: str, number: int, values: np.ndarray) -> np.ndarray:
        def work(member: SecureMember, ledger: Ledger) -> np.ndarray:
            member.check(number)
            masked, state = member.mask(number, values, CONTEXT)
            reservation = ledger.reserve(charge(number))
            ledger.commit(reservation, PLAN.hash, number, "d" * 64, masked.tobytes(), state)
            return masked

        masked: np.ndarray = self.restarted(name, work)
        return masked


def charge(number: int) -> Any:
    from fedgraft_client.entry import Charge
    from fedgraft_common.accounting import SamplingEvent

    event = SamplingEvent(0.5, 2.0, 1)
    return Charge("run", PLAN.hash, number, "train", "distributed", "record", event, 3)


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    made = Sites(tmp_path)
    made.set_up()
    yield made


def vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**20, LENGTH).astype(np.uint32)


def question(sites: Sites, number: int, *survivors: int) -> bytes:
    bits = to_bits(survivors, len(NAMES))
    return Question(sites.server.roster.digest, number, bits).to_bytes()


def test_processes_that_restart_at_every_step_give_the_sum(sites: Sites) -> None:
    for number in (1, 2):
        opened = SecureRound(sites.server.terms, sites.server.roster, number, CONTEXT)
        present = NAMES if number == 1 else NAMES[1:]
        for seed, name in enumerate(present):
            opened.add_input(name, sites.mask(name, number, vector(seed)))
        asked = opened.close().to_bytes()
        for name in NAMES:
            answer = sites.ask(name, SecureStep.UNMASK, number, asked)
            opened.add_answer(Answer.from_bytes(answer))
        expected = sum((vector(seed) for seed in range(len(present))), np.zeros(LENGTH, np.uint32))
        assert np.array_equal(opened.total().values, expected)


@pytest.mark.parametrize("second", [(0, 1, 2), (1, 2, 3)])
def test_other_survivors_are_refused_after_a_restart(sites: Sites, second: tuple[int, ...]) -> None:
    for name in NAMES:
        sites.mask(name, 1, vector(0))
    sites.ask("north", SecureStep.UNMASK, 1, question(sites, 1, 0, 1, 2, 3))
    with pytest.raises(MessageError, match="others than before"):
        sites.ask("north", SecureStep.UNMASK, 1, question(sites, 1, *second))


def test_an_old_ledger_put_back_is_noticed_before_it_answers(sites: Sites, tmp_path: Path) -> None:
    for name in NAMES:
        sites.mask(name, 1, vector(0))
    old = (tmp_path / "north" / "ledger.sqlite3").read_bytes()
    sites.ask("north", SecureStep.UNMASK, 1, question(sites, 1, 0, 1, 2, 3))
    for leftover in (tmp_path / "north").glob("ledger.sqlite3-*"):
        leftover.unlink()
    (tmp_path / "north" / "ledger.sqlite3").write_bytes(old)
    with pytest.raises(LedgerError, match="witness has seen"):
        sites.ask("north", SecureStep.UNMASK, 1, question(sites, 1, 0, 1, 2))


def put_back(directory: Path, copy: bytes) -> None:
    for leftover in directory.glob("ledger.sqlite3-*"):
        leftover.unlink()
    (directory / "ledger.sqlite3").write_bytes(copy)


def test_a_lost_round_is_closed_for_a_new_set_up_as_well(sites: Sites) -> None:
    """Recovered from two histories: the round that only the witness knows had its input."""
    home = sites.directory / "north"
    old = (home / "ledger.sqlite3").read_bytes()
    sites.mask("north", 1, vector(0))
    witness = (home / "ledger.witness").read_bytes()
    put_back(home, old)
    (home / "ledger.witness").unlink()
    Ledger(home, "x-rays", recover=True).close()
    (home / "ledger.witness").write_bytes(witness)
    with Ledger(home, "x-rays", recover=True) as ledger:
        assert ledger.last_trained(PLAN.hash) == 1
        assert ledger.last_trained("another plan") == 0
    terms = secure_terms(PLAN, LENGTH, 32, b"another session.", 1).to_bytes()
    with pytest.raises(MessageError, match="first round of the set-up"):
        sites.ask("north", SecureStep.ADVERTISE, 1, terms)


def test_a_state_from_before_a_recovery_is_not_used_even_if_it_is_there(sites: Sites) -> None:
    home = sites.directory / "north"
    old = home / "copy.sqlite3"
    old.write_bytes((home / "ledger.sqlite3").read_bytes())
    Ledger(home, "x-rays", recover=True).close()
    with closing(sqlite3.connect(home / "ledger.sqlite3")) as file, file:
        assert not file.execute("SELECT * FROM rounds").fetchall()
        file.execute("ATTACH ? AS old", (str(old),))
        file.execute("INSERT INTO rounds SELECT * FROM old.rounds")
        assert file.execute("SELECT count(*) FROM rounds").fetchone() == (2,)
    with pytest.raises(MessageError, match="the terms first"):
        sites.mask("north", 1, vector(0))


def test_a_changed_state_is_not_used(sites: Sites, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "north" / "ledger.sqlite3")) as file, file:
        file.execute("UPDATE rounds SET content = x'00' WHERE plan LIKE '%/secure/rounds'")
    with pytest.raises(LedgerError, match="state of secure aggregation"):
        sites.mask("north", 1, vector(0))


def test_a_crash_before_the_commit_leaves_the_round_open(sites: Sites) -> None:
    """The masked input was not stored, so it did not leave: another may take its place."""

    def dies(member: SecureMember, _: Ledger) -> None:
        member.mask(1, vector(1), CONTEXT)
        member.mask(1, vector(2), CONTEXT)  # the same process goes on after a full disk

    def again(member: SecureMember, _: Ledger) -> None:
        member.mask(1, vector(4), CONTEXT)

    sites.restarted("north", dies)
    sites.mask("north", 1, vector(3))
    with pytest.raises(MessageError, match="a second one"):
        sites.restarted("north", again)


def test_a_round_that_is_over_is_refused_before_it_is_charged(sites: Sites) -> None:
    """Else a server could have a site's whole budget spent without getting anything."""
    for name in NAMES[1:]:
        sites.mask(name, 1, vector(0))
    sites.ask("east", SecureStep.UNMASK, 1, question(sites, 1, 1, 2, 3))
    sites.mask("north", 2, vector(0))

    def spent(_: SecureMember, ledger: Ledger) -> object:
        return ledger.spent()

    for name, number, words in (
        ("east", 1, "being unmasked"), ("north", 1, "after 2"), ("north", 2, "after 2"),
    ):  # fmt: skip
        before = sites.restarted(name, spent)
        with pytest.raises(MessageError, match=words):
            sites.mask(name, number, vector(1))
        assert sites.restarted(name, spent) == before


def test_a_site_that_joined_again_takes_part_in_a_new_set_up(sites: Sites) -> None:
    """Its key is another, so its old state is of no use; the rounds it masked stay closed."""
    sites.mask("north", 1, vector(0))
    key = throwaway_key(AUTHORITY, "north", NOW)

    def ask(number: int) -> bytes:
        terms = secure_terms(PLAN, LENGTH, 32, b"another session.", number)
        with Ledger(sites.directory / "north", "x-rays") as ledger:
            peers = Peers(ledger, sites.directory / "north" / "peers", "first")
            membership = Membership(key, lambda: TRUST)
            member = SecureMember(PLAN, LENGTH, 32, ledger, membership, peers)
            return member.answer(SecureStep.ADVERTISE, number, terms.to_bytes())

    with pytest.raises(MessageError, match="first round of the set-up"):
        ask(1)
    first = ask(2)
    assert Advertisement.from_bytes(first).site == "north"
    assert ask(2) == first


def test_terms_that_do_not_follow_from_the_plan(tmp_path: Path) -> None:
    sites = Sites(tmp_path)
    for plan in (
        PLAN.replace({"privacy.tolerated_dropouts": 0}),
        PLAN.replace({"rounds.count": 4}),
        PLAN.replace({"aggregation.sites": 5}),
    ):
        terms = secure_terms(plan, LENGTH, 32, bytes(16), 1).to_bytes()
        with pytest.raises(MessageError, match="those that follow from the plan"):
            sites.ask("north", SecureStep.ADVERTISE, 1, terms)
    with pytest.raises(MessageError, match="those that follow from the plan"):
        longer = secure_terms(PLAN, LENGTH + 1, 32, bytes(16), 1).to_bytes()
        sites.ask("north", SecureStep.ADVERTISE, 1, longer)


def test_a_new_set_up_is_for_later_rounds_only(sites: Sites) -> None:
    sites.mask("north", 1, vector(0))
    again = secure_terms(PLAN, LENGTH, 32, b"another session.", 1).to_bytes()
    with pytest.raises(MessageError, match="first round of the set-up"):
        sites.ask("north", SecureStep.ADVERTISE, 1, again)
    later = secure_terms(PLAN, LENGTH, 32, b"another session.", 2).to_bytes()
    sites.ask("north", SecureStep.ADVERTISE, 2, later)
    with pytest.raises(MessageError, match="after a complete set-up"):
        sites.mask("north", 2, vector(0))


def test_a_delivery_is_taken_or_the_dealer_is_named_in_the_ledger(tmp_path: Path) -> None:
    sites = Sites(tmp_path)
    for name in NAMES:
        terms = sites.server.terms.to_bytes()
        offered = sites.ask(name, SecureStep.ADVERTISE, 1, terms)
        sites.server.add_advertisement(Advertisement.from_bytes(offered))
    roster = sites.server.close_roster().to_bytes()
    for name in NAMES:
        dealt = sites.ask(name, SecureStep.SHARE, 1, roster)
        sites.server.add_sharing(Sharing.from_bytes(dealt))
    good = sites.server.delivery("north")
    garbage = list(good.ciphertexts)
    garbage[3] = bytes(len(garbage[3]))
    bad = replace(good, ciphertexts=tuple(garbage))

    def said(delivery: Delivery) -> frozenset[int]:
        answer = Acceptance.from_bytes(
            sites.ask("north", SecureStep.ACCEPT, 1, delivery.to_bytes())
        )
        assert answer.roster == sites.server.roster.digest
        return from_bits(answer.unusable, len(NAMES))

    with pytest.raises(MessageError, match="for another roster"):
        said(replace(bad, roster=bytes(32)))
    with pytest.raises(MessageError, match="does not fit"):
        said(replace(bad, signatures=good.signatures[::-1]))
    assert said(bad) == {3}
    with pytest.raises(MessageError, match="after a complete set-up"):
        sites.mask("north", 1, vector(0))
    assert said(good) == frozenset()
    assert said(bad) == frozenset()  # what was taken is taken
    sites.restarted("north", lambda member, _: member.accept(1, bad.to_bytes()))
    sites.mask("north", 1, vector(0))


def test_a_step_without_a_set_up_or_out_of_order(tmp_path: Path) -> None:
    sites = Sites(tmp_path)
    for step in (SecureStep.SHARE, SecureStep.UNMASK):
        with pytest.raises(MessageError, match="the terms first"):
            sites.ask("north", step, 1, b"")
    with pytest.raises(MessageError):
        sites.ask("north", SecureStep.ADVERTISE, 1, b"nonsense")


def test_a_server_with_the_cas_key_cannot_take_the_peers_places(tmp_path: Path) -> None:
    """In a second run, with keys of its own in three names: the one real site signs nothing."""
    sites = Sites(tmp_path)
    sites.set_up()
    second = PLAN.replace({"name": "second"})
    forged = {name: throwaway_key(AUTHORITY, name, NOW) for name in NAMES[:1] + NAMES[2:]}
    server = SecureServer(secure_terms(second, LENGTH, 32, bytes(16), 1), TRUST)

    def answer(step: SecureStep, content: bytes) -> bytes:
        def work(_: SecureMember, ledger: Ledger) -> bytes:
            peers = Peers(ledger, tmp_path / "north" / "peers", "first")
            membership = Membership(KEYS["north"], lambda: TRUST)
            member = SecureMember(second, LENGTH, 32, ledger, membership, peers)
            return member.answer(step, 1, content)

        found: bytes = sites.restarted("north", work)
        return found

    own = Advertisement.from_bytes(answer(SecureStep.ADVERTISE, server.terms.to_bytes()))
    server.add_advertisement(own)
    for key in forged.values():
        server.add_advertisement(SecureSite(server.terms, key, bytes(32)).advertise())
    with pytest.raises(IdentityError, match=r"3 that this site does not know \(east, south"):
        answer(SecureStep.SHARE, server.close_roster().to_bytes())
    honest = SecureServer(server.terms, TRUST)
    honest.add_advertisement(own)
    for name in forged:
        honest.add_advertisement(SecureSite(server.terms, KEYS[name], bytes(32)).advertise())
    answer(SecureStep.SHARE, honest.close_roster().to_bytes())  # nothing was signed before


def test_what_a_ledger_says_of_roster_and_answers(sites: Sites) -> None:
    for name in NAMES:
        sites.mask(name, 1, vector(0))
    answer = sites.ask("north", SecureStep.UNMASK, 1, question(sites, 1, 0, 1, 2, 3))

    def bodies(_: SecureMember, ledger: Ledger) -> list[Any]:
        return [dict(e.body) for e in ledger.entries() if e.kind is Kind.SECURE]

    said = {body["step"]: body for body in sites.restarted("north", bodies)}
    assert said["share"]["roster"] == sites.server.roster.digest.hex()
    assert said["share"]["peers"] == {
        name: key_fingerprint(KEYS[name].key.public_key()) for name in NAMES if name != "north"
    }
    statement = Statement.from_bytes(bytes.fromhex(said["unmask"]["statement"]))
    assert statement == Answer.from_bytes(answer).statement


# --- the egress guard


def request() -> Message:
    TaskIdentity.run_id = TaskIdentity.task_id = 1
    TaskIdentity.node_id = 0
    message = Message(RecordDict(), dst_node_id=7, message_type="query.unmask")
    message.metadata.__dict__["_message_id"] = "request"
    return message


def known(digest: str) -> bool:
    return digest == hashlib.sha256(b"shares").hexdigest()


def test_what_the_ledger_holds_may_leave() -> None:
    reply = write_secure(request(), 3, Status.OK, b"shares")
    assert guard_secure(reply, request(), 3, known) is reply
    refused = write_secure(request(), 3, Status.MESSAGE)
    assert guard_secure(refused, request(), 3) is refused


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content["secure"].update({"message": b"other shares"}),
        lambda content: content["secure"].update({"accuracy": 0.5}),
        lambda content: content["secure"].update({"message": "shares"}),
        lambda content: content["secure"].pop("message"),
        lambda content: content.update({"secure": ConfigRecord({"message": b"a", "b": b"c"})}),
        lambda content: content.update({"more": ConfigRecord({})}),
        lambda content: content["status"].update({"loss": 0.5}),
        lambda content: content["status"].update({"round": 4}),
        lambda content: content["status"].update({"status": "refused-message"}),
    ],
)
def test_anything_else_is_stopped(spoil: Callable[[Any], object]) -> None:
    reply = write_secure(request(), 3, Status.OK, b"shares")
    spoil(reply.content)
    with pytest.raises(EgressError):
        guard_secure(reply, request(), 3, known)


def test_nothing_leaves_that_no_ledger_holds() -> None:
    with pytest.raises(FedgraftError, match="a message that the ledger holds"):
        guard_secure(write_secure(request(), 3, Status.OK, b"shares"), request(), 3)
