"""Sites that fail or cheat under secure aggregation. Long, for each point of failure is a case.

The others go on, or learn whom to leave out; and nothing but sums comes out.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from flwr.app import Array, Message

from fedgraft_client.app import client_app
from fedgraft_client.secure_member import Membership, SecureMember
from fedgraft_common.errors import AggregationError, CheckpointError, IdentityError, MessageError
from fedgraft_common.messages import ADAPTER, MESSAGE, SECURE, SecureStep
from fedgraft_common.plan import Plan
from fedgraft_common.secure_aggregation import SecureSite
from fedgraft_common.secure_messages import Advertisement, Roster, Sharing, Statement, unpack_list
from fedgraft_common.secure_transcript import Transcript, check_transcript
from fedgraft_common.site_signature import SiteKey, Trust
from fedgraft_server.app import site_of
from fedgraft_server.authority import Authority
from fedgraft_server.checkpoint import save_checkpoint
from fedgraft_server.federation import run_federation
from fedgraft_server.registry import Registry
from fedgraft_server.secure_sum import SecureSum
from fedgraft_simulations.local_grid import LocalGrid
from fedgraft_simulations.sites import SimulatedSites
from fedgraft_simulations.throwaway_keys import throwaway_authority, throwaway_key

SITES, ROUNDS = 4, 3
CULPRIT, VICTIM = 1, 2  # numbers of sites, from 0
TRAIN, UNMASK = "train", SecureStep.UNMASK.message_type
ADVERTISE, SHARE, ACCEPT = (f"query.{step}" for step in ("advertise", "share", "accept"))


class BadGrid(LocalGrid):
    """Loses messages, changes replies, and forgets nodes.

    Args:
        sites: behind it.
        lost: whether the message to a site (from 0) in a round, of a type, is lost.
        change: may change a site's reply; the same facts and the reply.
        gone: sites that were revoked.
    """

    def __init__(
        self,
        sites: SimulatedSites,
        lost: Callable[[int, int, str], bool] = lambda *_: False,
        change: Callable[[int, int, str, Message], None] = lambda *_: None,
        gone: tuple[int, ...] = (),
    ) -> None:
        app = client_app(sites)

        def changed(message: Message, context: Any) -> Message:
            reply = app(message, context)
            change(*_address(message), reply)
            return reply

        super().__init__(app, SITES, lost=lambda message: lost(*_address(message)))
        self._app = changed  # type: ignore[assignment]
        self._gone = {site + 1 for site in gone}

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if node not in self._gone]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        for message in batch:  # as a SuperLink's grid does
            if message.metadata.dst_node_id in self._gone:
                raise MessageError("destination", message.metadata.dst_node_id, "a site", "")
        return super().push_messages(batch)


def _address(message: Message) -> tuple[int, int, str]:
    number = message.content.config_records["plan"]["round"]
    assert isinstance(number, int)
    return message.metadata.dst_node_id - 1, number, message.metadata.message_type


class Watched:
    """Runs a plan, holding every sum against the inputs that are in it.

    Attributes:
        sums: survivors of each round that gave a sum; 0 for a lost one.
    """

    def __init__(self, directory: Path, dropouts: int, colluders: int = 0, **more: object) -> None:
        self.directory = directory
        self.plan = Plan().replace(
            {
                "adapter.method": "film",
                "adapter.layers": "last:1",
                "privacy.mechanism": "distributed",
                "privacy.tolerated_dropouts": dropouts,
                "privacy.tolerated_colluders": colluders,
                "training.sample_rate": 0.5,
                "training.expected_batch": 8.0,
                "aggregation.sites": SITES,
                "sites.count": SITES,
                "data.test_fraction": 0.96,
                "rounds.count": ROUNDS,
                **more,
            }
        )
        self.sites = SimulatedSites(self.plan, directory / "sites", "cpu")
        self.names = [site.config.name for site in self.sites.all()]
        self.trust: Callable[[], Trust] = self.sites.trust
        self.registered: Any = None
        self.sums: dict[int, int] = {}
        self.inputs: dict[tuple[str, int], np.ndarray] = {}

    def run(self, **grid: Any) -> dict[int, int]:
        """Survivors of each round that was finished now."""
        before = dict(self.sums)
        mask, gather = SecureMember.mask, SecureSum.gather

        def note(member: SecureMember, number: int, values: np.ndarray, context: bytes) -> Any:
            name = member._membership.key.name
            assert (name, number) not in self.inputs, "a site gave two inputs in a round"
            self.inputs[name, number] = values.copy()
            return mask(member, number, values, context)

        def watch(sums: SecureSum, number: int, adapter: Any) -> Any:
            total = gather(sums, number, adapter)
            if total is not None:
                expected = np.zeros_like(total.values)
                for name in total.survivors:
                    expected += self.inputs[name, number]
                assert np.array_equal(total.values, expected)
                assert len(total.survivors) >= SITES - self.plan.privacy.tolerated_dropouts
            self.sums[number] = 0 if total is None else len(total.survivors)
            return total

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SecureMember, "mask", note)
            patch.setattr(SecureSum, "gather", watch)
            try:
                run_federation(
                    self.plan, BadGrid(self.sites, **grid), self.directory / "server",
                    durable=False, trust=self.trust, registered=self.registered,
                )  # fmt: skip
            finally:
                self.check_openings()
        return {number: count for number, count in self.sums.items() if number not in before}

    def check_openings(self) -> None:
        """Every answer of every site opened one sum of its round, and no other."""
        rounds: list[int] = []
        for folder in (self.directory / "server").glob("transcript-*"):
            begun = Transcript.from_bytes((folder / "set-up.bin").read_bytes())
            statements = [
                Statement.from_bytes(part)
                for path in folder.glob("round-*.bin")
                for part in unpack_list(path.read_bytes())
            ]
            assert check_transcript(begun.with_statements(statements), self.trust()) == []
            rounds += {statement.round for statement in statements}
        assert len(rounds) == len(set(rounds)), "a round was opened under two set-ups"

    def charges(self) -> list[int]:
        """Steps that each site was charged."""
        return [
            sum(event.steps for event in site.store.ledger.spent(self.plan.hash))
            for site in self.sites.all()
        ]

    def lose_state(self, number: int) -> None:
        """What putting a site's ledger back from a backup leaves of it."""
        with self.sites[number].store.ledger._transaction() as connection:
            connection.execute("DELETE FROM rounds WHERE plan LIKE '%/secure/%'")


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.CRITICAL):
        yield


def message_of(reply: Message) -> bytes:
    message = reply.content.config_records[SECURE][MESSAGE]
    assert isinstance(message, bytes)
    return message


def garbage(*victims: int) -> Callable[[int, int, str, Message], None]:
    """The culprit deals ciphertexts that nobody can read, to these sites."""

    def change(site: int, number: int, kind: str, reply: Message) -> None:
        if (site, kind) == (CULPRIT, SHARE):
            dealt = Sharing.from_bytes(message_of(reply))
            ciphertexts = tuple(
                bytes(len(text)) if peer in victims else text
                for peer, text in enumerate(dealt.ciphertexts)
            )
            spoiled = dataclasses.replace(dealt, ciphertexts=ciphertexts)
            reply.content.config_records[SECURE][MESSAGE] = spoiled.to_bytes()

    return change


# --- dealers


def test_a_dealer_of_garbage_is_left_out_before_anything_is_spent(tmp_path: Path) -> None:
    watched = Watched(tmp_path, dropouts=1, colluders=1)
    everybody = garbage(*range(SITES))
    assert watched.run(change=everybody) == {1: 3, 2: 3, 3: 3}
    assert watched.charges() == [3, 0, 3, 3]


def test_garbage_for_one_site_only(tmp_path: Path) -> None:
    """One report may be a lie: the site that reports is left out. Two are not, with c = 1."""
    dealt: list[int] = []

    def once(site: int, number: int, kind: str, reply: Message) -> None:
        if not dealt:
            garbage(VICTIM)(site, number, kind, reply)
        if (site, kind) == (CULPRIT, SHARE):
            dealt.append(number)

    watched = Watched(tmp_path / "once", dropouts=1, colluders=1)
    assert watched.run(change=once) == {1: 3, 2: 4, 3: 4}  # it gets another set-up
    assert watched.charges() == [3, 3, 2, 3]
    watched = Watched(tmp_path / "again", dropouts=1, colluders=1)
    assert watched.run(change=garbage(VICTIM)) == {1: 3, 2: 3, 3: 3}
    assert watched.charges() == [3, 0, 3, 3]


def test_garbage_where_nobody_can_be_done_without(tmp_path: Path) -> None:
    watched = Watched(tmp_path, dropouts=0)
    with pytest.raises(MessageError, match=r"branch-01 dealt shares that .*branch-02.* cannot use"):
        watched.run(change=garbage(VICTIM))
    assert watched.charges() == [0, 0, 0, 0]
    assert watched.run() == {1: 4, 2: 4, 3: 4}  # it was mended


@pytest.mark.parametrize("dropouts", [0, 1])
def test_a_dealer_of_wrong_shares(
    dropouts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They look like shares: only the round shows that they are none."""
    deal = SecureSite._deal

    def wrong(site: SecureSite, roster: Roster) -> list[bytes]:
        dealt = deal(site, roster)
        return [bytes(len(part)) for part in dealt] if site.name == "branch-01" else dealt

    monkeypatch.setattr(SecureSite, "_deal", wrong)
    watched = Watched(tmp_path, dropouts=dropouts)
    if dropouts:
        assert watched.run() == {1: 0, 2: 3, 3: 3}
        return
    with pytest.raises(AggregationError, match=r"rounds 1 to 2.*branch-01 dealt.*branch-01 dealt"):
        watched.run()
    assert watched.charges() == [2, 2, 2, 2]
    monkeypatch.setattr(SecureSite, "_deal", deal)
    assert watched.run() == {2: 0, 3: 4}  # the lost one is not asked for again


# --- sites that cannot or will not


@pytest.mark.parametrize("dropouts", [0, 1])
def test_a_refused_delivery(dropouts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unusable = SecureSite.unusable

    def refuse(site: SecureSite, delivery: Any) -> tuple[int, ...]:
        if site.name == "branch-01":
            raise MessageError("delivery", "any", "none", "")
        return unusable(site, delivery)

    monkeypatch.setattr(SecureSite, "unusable", refuse)
    watched = Watched(tmp_path, dropouts=dropouts)
    if dropouts:
        assert watched.run() == {1: 3, 2: 3, 3: 3}
        return
    with pytest.raises(MessageError, match="branch-01 did not take its shares"):
        watched.run()
    monkeypatch.setattr(SecureSite, "unusable", unusable)
    assert watched.run() == {1: 4, 2: 4, 3: 4}


@pytest.mark.parametrize(("dropouts", "second"), [(0, 0), (1, 3)])
def test_a_site_that_lost_its_state_is_back_in_the_next_round(
    dropouts: int, second: int, tmp_path: Path
) -> None:
    watched = Watched(tmp_path, dropouts=dropouts)
    lost: list[int] = []

    def forget(site: int, number: int, kind: str) -> bool:
        if (number, kind) == (2, TRAIN) and not lost:
            lost.append(number)
            watched.lose_state(CULPRIT)
        return False

    assert watched.run(lost=forget) == {1: 4, 2: second, 3: 4}


def test_a_site_that_comes_late_gets_one_more_set_up(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "late", dropouts=1, **{"rounds.count": 4})
    asked: list[int] = []

    def late(site: int, number: int, kind: str) -> bool:
        if (site, kind) == (0, ADVERTISE):
            asked.append(number)
        return site == CULPRIT and number < 2

    assert watched.run(lost=late) == {1: 3, 2: 4, 3: 4, 4: 4}
    assert asked == [1, 2]
    watched, asked[:] = Watched(tmp_path / "never", dropouts=1), []
    assert watched.run(lost=lambda *a: late(*a) or a[0] == CULPRIT) == {1: 3, 2: 3, 3: 3}
    assert asked == [1, 2]  # and no third for a site that is not heard of


def test_a_server_that_lost_its_set_up_goes_on(tmp_path: Path) -> None:
    """As the error about a damaged file advises. The sites have trained the round already."""
    watched = Watched(tmp_path, dropouts=0)
    with pytest.raises(MessageError, match="answers of round 2"):
        watched.run(lost=lambda site, number, kind: (number, kind) == (2, UNMASK))
    (tmp_path / "server" / "secure-setup.bin").unlink()
    assert watched.run() == {2: 0, 3: 4}


def test_sites_that_are_ahead_of_the_server_lose_no_round(tmp_path: Path) -> None:
    """It was put back from an old copy: to go on would waste what every site has."""
    watched = Watched(tmp_path, dropouts=0)
    watched.run()
    server = tmp_path / "server"
    for leftover in [*server.glob("round-*"), *server.glob("secure-*")]:
        leftover.unlink()
    with pytest.raises(MessageError, match=r"refused by node 1, node 2, .*put back from an old"):
        watched.run()
    assert not (server / "secure-faults.json").exists()
    assert watched.charges() == [3, 3, 3, 3]


def test_killed_between_a_lost_round_and_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deal = SecureSite._deal

    def wrong(site: SecureSite, roster: Roster) -> list[bytes]:
        dealt = deal(site, roster)
        return [bytes(len(part)) for part in dealt] if site.name == "branch-01" else dealt

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SecureSite, "_deal", wrong)
    monkeypatch.setattr("fedgraft_server.federation.save_checkpoint", die)
    watched = Watched(tmp_path, dropouts=0)
    with pytest.raises(KeyboardInterrupt):
        watched.run()
    assert watched.sums == {1: 0}
    monkeypatch.setattr(SecureSite, "_deal", deal)
    monkeypatch.setattr("fedgraft_server.federation.save_checkpoint", save_checkpoint)
    asked: set[int] = set()
    assert watched.run(lost=lambda site, number, kind: asked.add(number)) == {2: 4, 3: 4}
    assert asked == {2, 3}
    assert watched.charges() == [3, 3, 3, 3]


def test_a_revoked_site_is_not_asked_any_more(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "one", dropouts=1)

    def cut(site: int, number: int, kind: str) -> bool:
        return (number, kind) == (2, UNMASK) and site != CULPRIT

    with pytest.raises(MessageError, match="answers of round 2"):
        watched.run(lost=cut)
    assert watched.run(gone=(CULPRIT,)) == {2: 4, 3: 3}  # its input of round 2 was there
    watched = Watched(tmp_path / "none", dropouts=0)
    with pytest.raises(MessageError, match="answers of round 2"):
        watched.run(lost=cut)
    with pytest.raises(MessageError, match=r"set-up.*found '3 sites'"):
        watched.run(gone=(CULPRIT,))
    assert watched.run() == {3: 4}  # it was invited again under the same number


@pytest.mark.parametrize("step", [ADVERTISE, SHARE, ACCEPT, TRAIN, UNMASK])
def test_a_site_that_aborts_at_each_step(step: str, tmp_path: Path) -> None:
    away: set[int] = set()

    def aborts(site: int, number: int, kind: str) -> bool:
        if (site, kind) == (CULPRIT, step) and number == (2 if step in (TRAIN, UNMASK) else 1):
            away.add(site)
        return site in away

    one = Watched(tmp_path / "one", dropouts=1)
    inputs = {ADVERTISE: [3, 3, 3], SHARE: [3, 3, 3], ACCEPT: [3, 3, 3], TRAIN: [4, 3, 3]}
    found = one.run(lost=aborts)
    assert list(found.values()) == inputs.get(step, [4, 4, 3])
    away.clear()
    none = Watched(tmp_path / "none", dropouts=0)
    with pytest.raises(MessageError, match="resume the run when they are back"):
        none.run(lost=aborts)
    none.run()
    assert none.sums == {1: 4, 2: 4, 3: 4}


@pytest.mark.parametrize("dropouts", [0, 1])
def test_a_vector_of_a_wrong_size(dropouts: int, tmp_path: Path) -> None:
    def change(site: int, number: int, kind: str, reply: Message) -> None:
        if (site, kind) == (CULPRIT, TRAIN) and len(reply.content.array_records[ADAPTER]):
            record = reply.content.array_records[ADAPTER]
            first = next(iter(record))
            record[first] = Array(np.append(record[first].numpy().reshape(-1), np.uint32(1)))

    watched = Watched(tmp_path, dropouts=dropouts)
    if dropouts:
        assert watched.run(change=change) == {1: 3, 2: 3, 3: 3}
        return
    with pytest.raises(AggregationError, match=r"rounds 1 to 2.*branch-01 malformed"):
        watched.run(change=change)
    assert watched.run() == {2: 0, 3: 4}


# --- whose keys


def test_a_malformed_certificate_is_that_site_s_fault(tmp_path: Path) -> None:
    def change(site: int, number: int, kind: str, reply: Message) -> None:
        if (site, kind) == (CULPRIT, ADVERTISE):
            offered = Advertisement.from_bytes(message_of(reply))
            version, other = bytes.fromhex("a003020102"), bytes.fromhex("a003020109")
            assert version in offered.certificate
            spoiled = offered.certificate.replace(version, other)  # one that there is not
            message = dataclasses.replace(offered, certificate=spoiled).to_bytes()
            reply.content.config_records[SECURE][MESSAGE] = message

    watched = Watched(tmp_path, 1, 0, **{"rounds.count": 1})
    assert watched.run(change=change) == {1: 3}


class Certified(Watched):
    """With certificates of the test's own authority.

    Args:
        directory: of the run.
        issue: name and authority to the certificate and key that a site holds.
    """

    def __init__(
        self, directory: Path, issue: Callable[[str, Authority, dt.datetime], SiteKey]
    ) -> None:
        super().__init__(directory, 1, 0, **{"rounds.count": 1})
        now = dt.datetime.now(dt.UTC)
        self.now, self.authority = now, throwaway_authority(now)
        trust = Trust(self.authority.certificate, now)
        self.trust = lambda: trust
        self.keys = {name: issue(name, self.authority, now) for name in self.names}
        for site in self.sites.all():
            site.membership = Membership(self.keys[site.config.name], self.trust)


def test_one_key_under_two_names_is_one_site(tmp_path: Path) -> None:
    issued: list[SiteKey] = []

    def issue(name: str, authority: Authority, now: dt.datetime) -> SiteKey:
        issued.append(throwaway_key(authority, name, now))
        if name != "branch-01":
            return issued[-1]
        key = issued[0].key
        certificate = authority.issue_site(name, key.public_key(), dt.timedelta(hours=1), now)
        return SiteKey(name, certificate, key)

    assert Certified(tmp_path, issue).run() == {1: 3}


@pytest.mark.parametrize("checked", [True, False])
def test_a_node_speaks_for_its_own_site_only(checked: bool, tmp_path: Path) -> None:
    """branch-01 holds a revoked certificate of branch-02 that has not expired."""

    def issue(name: str, authority: Authority, now: dt.datetime) -> SiteKey:
        return throwaway_key(authority, "branch-02" if name == "branch-01" else name, now)

    watched = Certified(tmp_path, issue)
    watched.registered = register(watched) if checked else None
    assert watched.run() == {1: 3}
    assert watched.charges() == ([1, 0, 1, 1] if checked else [1, 1, 0, 1])


def issued(certificate: x509.Certificate, _: str) -> x509.Certificate:
    return certificate


def register(watched: Certified) -> Callable[[bytes], tuple[str, int | None]]:
    """A registry in which branch-02 was revoked and has joined again."""
    file = watched.directory / "registry.sqlite3"
    with Registry(file) as registry:
        hour = dt.timedelta(hours=1)
        stale = watched.keys["branch-01"].certificate
        registry.join(registry.invite("branch-02", (), hour), "old", lambda _: stale)
        registry.revoke("branch-02")
        for name in watched.names:
            own = watched.keys[name].certificate
            if name == "branch-01":
                own = throwaway_key(watched.authority, name, watched.now).certificate
            registry.join(registry.invite(name, (), hour), name, partial(issued, own))
        registry.set_node_ids({name: n for n, name in enumerate(watched.names, 1)})
    found = site_of(file, watched.keys["branch-03"].certificate_der)
    assert found == ("branch-03", 4)
    with pytest.raises(IdentityError, match="revoked"):
        site_of(file, watched.keys["branch-01"].certificate_der)
    return partial(site_of, file)


def test_a_damaged_file_of_faults_is_one_error(tmp_path: Path) -> None:
    watched = Watched(tmp_path, dropouts=0)
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "secure-faults.json").write_text('{"lost": 1, "more": 2}')
    with pytest.raises(CheckpointError, match=r"secure-faults\.json.*Delete the file"):
        watched.run()
