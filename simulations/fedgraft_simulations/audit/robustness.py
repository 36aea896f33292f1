"""A malicious server against the real daemon: what it tries is refused, and costs nothing.

The daemon, the site, its policy, its ledger on disk, its randomness and its egress guard are those
of `fedgraft site up`, with the records of one simulated site; only the wire is short. A word that
is not the expected one, a reservation in the ledger beyond those of honest rounds, or a refusal
that carries anything but its word, fails the audit.

In a full audit the same attempts also travel the whole way: a server with mutual TLS, Flower's
SuperLink, and `fedgraft site up` as processes of their own (`hostile_federation`).
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ArrayRecord, Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file, save_file

from fedgraft_client.account import read_ledger, verify
from fedgraft_client.app import client_app
from fedgraft_client.connection import Outgoing
from fedgraft_client.daemon import Daemon, Pace
from fedgraft_client.entry import Kind
from fedgraft_client.policy import Policy
from fedgraft_client.runtime import Runtime
from fedgraft_client.site import Site, SiteConfig
from fedgraft_client.store import SiteStore
from fedgraft_common.accounting import SamplingEvent, epsilon
from fedgraft_common.backbone import load_backbone
from fedgraft_common.messages import ADAPTER, COUNTS, STATUS, Status, read_status
from fedgraft_common.plan import Plan
from fedgraft_simulations.audit.hostile import Attempt, HostileServer, as_message
from fedgraft_simulations.audit.part import (
    AuditContext,
    Finding,
    PartResult,
    Report,
    Verdict,
    worst,
)
from fedgraft_simulations.partition import Share, partition

NODE = 7
LONGEST_LINE = 2000
"""Characters of a log line about a message, however large that was."""


@dataclass(slots=True)
class Outcome:
    """What became of an attempt.

    Attributes:
        attempt: the message.
        word: the status that was answered.
        reserved: reservations that the ledger has more than before.
        content: bytes of the reply's arrays.
        silent: whether a refusal says its word and nothing else.
    """

    attempt: Attempt
    word: Status
    reserved: int
    content: bytes
    silent: bool

    @property
    def held(self) -> bool:
        """Whether the site did what it must."""
        a = self.attempt
        return self.word in a.expected and self.reserved == a.spends and self.silent


@dataclass
class ShortWire:
    """The daemon's connection: hands out what it is given, keeps what is sent.

    A message crosses it as the bytes that Flower puts on the network.
    """

    waiting: list[bytes]
    sent: list[Message] = field(default_factory=list)
    stop: object = None

    @property
    def node_id(self) -> int:
        """The server's number for the site."""
        return NODE

    def receive(self, wait: float = 0.0) -> Message | None:
        """The next message; when none is left, the daemon is told to stop."""
        if not self.waiting:
            self.stop()  # type: ignore[operator]
            return None
        return message_from_proto(ProtoMessage.FromString(self.waiting.pop(0)))

    def prepare(self, reply: Message) -> Outgoing:
        """As bytes."""
        announced = message_to_proto(reply)
        content = announced.SerializeToString()
        return Outgoing(announced, reply.metadata.run_id, ObjectTree(), {"reply": content})

    def send(self, reply: Outgoing) -> None:
        """Read back from the bytes."""
        self.sent.append(message_from_proto(ProtoMessage.FromString(reply.contents["reply"])))

    def close(self) -> None:
        """Nothing to say goodbye to."""


class SiteUnderAttack:
    """A real site with a directory of its own, and a hostile server that has the operator's key.

    Args:
        plan: under audit; the site is asked for the local mechanism, which needs no other site.
        share: the records of the site.
        directory: new.
    """

    def __init__(self, plan: Plan, share: Share, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True)
        backbone = load_backbone(plan.backbone)
        self.plan = plan_of_attack(plan, backbone.sha256)
        self.operator = Ed25519PrivateKey.generate()
        altered, sha256 = alter_backbone(backbone.directory, directory / "altered")
        privacy = self.plan.privacy
        self.site = Site(
            SiteConfig("north", share.classes, share.train.unit_count, task=share.spec),
            share.train,
            Runtime("cpu"),
            SiteStore(directory / "home", dataset="records", unit=privacy.unit),
            Policy(
                maximum_epsilon=privacy.epsilon,
                maximum_delta=privacy.delta,
                backbones=(backbone.sha256,),
            ),
            operator_key=self.operator.public_key(),
        )
        initial = self.site.bench(self.plan).initial
        self.server = HostileServer(self.plan, self.operator, initial, str(altered), sha256)
        self._app = client_app(lambda _: self.site)
        self._asked = 0
        TaskIdentity.run_id = TaskIdentity.task_id = 1
        TaskIdentity.node_id = 0

    @property
    def round_cost(self) -> SamplingEvent:
        """What an honest round costs."""
        event = self.site.step(self.plan).event
        assert event is not None  # noqa: S101 - the local mechanism has noise
        return replace(event, steps=self.plan.training.local_steps)

    @property
    def ledger(self) -> Path:
        """The site's ledger file."""
        return self.site.store.ledger.path

    def reservations(self) -> int:
        """How many the ledger's file holds."""
        return sum(entry.kind is Kind.RESERVE for entry in read_ledger(self.ledger))

    def ask(self, attempts: Sequence[Attempt]) -> list[Outcome]:
        """Sends messages through a daemon, one after the other."""
        outcomes = []
        for attempt in attempts:
            self._asked += 1
            before = self.reservations()
            message = as_message(attempt, self._asked, NODE)
            wire = ShortWire([message_to_proto(message).SerializeToString()])
            daemon = Daemon("north", partial(_same, wire), self._app, Pace(poll=0.001))
            wire.stop = daemon.stop
            daemon.run()
            (reply,) = wire.sent
            word = read_status(reply)
            outcomes.append(
                Outcome(attempt, word, self.reservations() - before, arrays_of(reply),
                        word is Status.OK or says_only_its_word(reply))
            )  # fmt: skip
        return outcomes

    def close(self) -> None:
        """Lets the ledger go."""
        self.site.store.close()


def plan_of_attack(plan: Plan, backbone: str) -> Plan:
    """The plan that the attacked site takes part in: the audited one, as a lone site can have it.

    Args:
        plan: under audit.
        backbone: SHA-256 of its weights, which the site pins.
    """
    return plan.replace(
        {
            "privacy.mechanism": "local",
            "backbone.sha256": backbone,
            "rounds.count": max(plan.rounds.count, 3),
            "evaluation.every": 0,
        }
    )


def _same(wire: ShortWire) -> ShortWire:
    return wire


def arrays_of(reply: Message) -> bytes:
    """All bytes of the reply's tensors."""
    record = reply.content.array_records.get(ADAPTER) or ArrayRecord()
    return b"".join(record[name].data for name in sorted(record))


def says_only_its_word(reply: Message) -> bool:
    """Whether a refusal holds a status, a round and nothing else: no error, tensor or number."""
    if reply.has_error():
        return False
    content = reply.content
    known = set(content) <= {ADAPTER, COUNTS, STATUS}
    empty = not content.array_records.get(ADAPTER) and not content.metric_records.get(COUNTS)
    return known and empty and set(content.config_records[STATUS]) == {"round", "status"}


def alter_backbone(source: Path, directory: Path) -> tuple[Path, str]:
    """A copy of a backbone with one weight changed: its directory, the SHA-256 of its weights."""
    shutil.copytree(source, directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = sorted(name for name, t in tensors.items() if t.is_floating_point())[0]
    tensors[name].view(-1)[0] += 1.0
    save_file(tensors, file, {"format": "pt"})
    return directory, hashlib.sha256(file.read_bytes()).hexdigest()


class RobustnessPart:
    """The part `robustness` of an audit."""

    name = "robustness"
    title = "A malicious server"

    def run(self, context: AuditContext, progress: Report) -> PartResult:
        """Tries everything, then reads the ledger."""
        started = time.perf_counter()
        progress(0.0, "a site of its own")
        share = partition(context.plan)[0]
        target = SiteUnderAttack(context.plan, share, context.directory / self.name / "site")
        try:
            with overheard() as lines:
                outcomes = attack(target, progress)
        finally:
            target.close()
        honest = sum(outcome.attempt.spends for outcome in outcomes)
        findings = [
            *group_findings(outcomes),
            ledger_finding(target.plan, target.ledger, target.round_cost, honest),
            log_finding(lines),
        ]
        real: list[str] = []
        if context.effort == "full":
            from fedgraft_simulations.audit.hostile_federation import attack_processes

            progress(0.6, "the same over real processes")
            directory = context.directory / self.name / "federation"
            findings += attack_processes(context.plan, share, directory)
        else:
            real.append("The attempts did not travel over real processes: that takes a full audit.")
        result = tuple(findings)
        held = sum(outcome.held for outcome in outcomes if outcome.attempt.spends == 0)
        tried = sum(outcome.attempt.spends == 0 for outcome in outcomes)
        return PartResult(
            self.name, self.title, worst(result),
            f"A malicious server tried {tried} things; {held} were refused or gained it nothing.",
            result, (),
            {"attempts": [_facts(outcome) for outcome in outcomes]},
            (
                *real,
                "A list of attempts is not every attempt. What bounds a server that finds another "
                "is the clipping and noise at the site, which the mechanism part measures.",
                "Messages of secure aggregation are attacked by its own tests.",
            ),
            time.perf_counter() - started,
        )  # fmt: skip


def attack(target: SiteUnderAttack, progress: Report = lambda *_: None) -> list[Outcome]:
    """Everything, in the order of a run: before it, between its rounds, after it."""
    server = target.server
    outcomes = target.ask(server.before())
    progress(0.2, "between rounds")
    first = target.ask([server.honest(1)])
    again = target.ask(server.again())
    for outcome in again:  # another word than the same bytes would be a second look
        outcome.silent = outcome.content == first[0].content
    outcomes += [*first, *again, *target.ask(server.between())]
    progress(0.4, "a second run")
    outcomes += target.ask(server.greedy())
    outcomes += target.ask([server.honest(2)])
    target.site.refit(target.plan, server.moved())
    progress(0.5, "after the refit")
    return outcomes + target.ask(server.afterwards())


@contextmanager
def overheard() -> Iterator[list[str]]:
    """The lines that the site logs meanwhile, which go nowhere else: they would look like harm."""
    lines: list[str] = []
    logger = logging.getLogger("fedgraft_client")
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(listener)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield lines
    finally:
        logger.propagate = propagates
        logger.removeHandler(listener)


def log_finding(lines: Sequence[str]) -> Finding:
    """Messages of megabytes must not become log lines of megabytes."""
    longest = max(map(len, lines), default=0)
    return Finding(
        "What a server sends does not fill the site's log",
        f"{len(lines)} lines, the longest of {longest:,} characters",
        "pass" if longest <= LONGEST_LINE else "fail",
        "The reason of a refusal is for the site's operator; only its word leaves.",
        "log",
    )


def group_findings(outcomes: Sequence[Outcome]) -> list[Finding]:
    """One finding for each kind of attempt."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.attempt.group, []).append(outcome)
    findings = []
    for group, found in groups.items():
        broken = [outcome for outcome in found if not outcome.held]
        spends = found[0].attempt.spends
        claim = {
            "an honest round": "An honest round is answered and charged once",
            "the same round asked again": "The same round asked again gives the same bytes, free",
        }.get(group, f"A site refuses {group}, with one word and at no cost")
        words = sorted({outcome.word.value for outcome in found})
        right = f"{len(found) - len(broken)} of {len(found)}"
        measured = f"{right} answered as they must be: {', '.join(words)}"
        cases = tuple(
            f"{o.attempt.title}: {o.word.value}"
            + (f", {o.reserved} charged" if o.reserved != spends else "")
            + ("" if o.silent else ", and more than its word")
            for o in (broken or found)
        )
        verdict: Verdict = "fail" if broken else "pass"
        findings.append(Finding(claim, measured, verdict, name=group, cases=cases))
    return findings


def ledger_finding(plan: Plan, ledger: Path, event: SamplingEvent, honest: int) -> Finding:
    """The ledger's own account, read from its file after the site has closed it.

    Args:
        plan: that the site took part in.
        ledger: the file; its witness is beside it.
        event: what one honest round costs.
        honest: how many there were.
    """
    entries, delta = read_ledger(ledger), plan.privacy.delta
    check = verify(entries, delta, ledger.with_name("ledger.witness"))
    reserved = sum(entry.kind is Kind.RESERVE for entry in entries)
    committed = sum(entry.kind is Kind.COMMIT for entry in entries)
    owed = epsilon([event] * honest, delta)
    right = not check.faults and reserved == committed == honest and check.epsilon <= owed + 1e-6
    return Finding(
        "After all of it the ledger charges for the honest rounds and for nothing else",
        f"{reserved} reservations and {committed} commits for {honest} honest rounds, epsilon "
        f"{check.epsilon:.4f} where these cost {owed:.4f}",
        "pass" if right else "fail",
        f"{check.entries} signed lines, {len(check.faults)} faults; the witness "
        f"{'agrees' if check.witnessed else 'was not there'}.",
        "ledger",
    )


def _facts(outcome: Outcome) -> dict[str, object]:
    return {
        "group": outcome.attempt.group,
        "title": outcome.attempt.title,
        "answer": outcome.word.value,
        "expected": [word.value for word in outcome.attempt.expected],
        "reservations": outcome.reserved,
        "held": outcome.held,
    }
