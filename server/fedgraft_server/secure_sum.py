"""A run's secure aggregation, seen from the server: set-ups, masked inputs, and their sum.

The protocol is `fedgraft_common.secure_aggregation`; this carries its messages over a grid and
keeps what a restarted server needs:

    <directory>/secure-setup.bin     the set-up in force, and which node is which site
    <directory>/secure-round.bin     the round being unmasked: its survivors are named once
    <directory>/transcript-NNNNNN/   what the sites signed under a set-up, for an auditor

A site that is missing in a set-up, or fails in it, counts as a dropout until the next one; one that
has lost its state gets a new set-up, once, when nobody else is away. A dealer whose shares more
sites cannot use than may work with the server is left out; with fewer reports, those who report.

A round with too few inputs is not unmasked; it goes on when the run is resumed, with the same
bytes. A round that can never be had is lost: the adapter stays as it was, what it cost is spent,
and the next round gets a new set-up. Its inputs exist under the old one only, and sites refuse a
set-up for a round they have trained: so nothing is ever summed twice.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedgraft_common.errors import (
    AggregationError,
    CheckpointError,
    FedgraftError,
    IdentityError,
    MessageError,
)
from fedgraft_common.files import write_atomically
from fedgraft_common.messages import (
    ADAPTER,
    MESSAGE,
    PLAN,
    ROUND,
    SECURE,
    STATUS,
    SecureStep,
    Status,
    Tensors,
    from_record,
    read_secure,
    read_status,
    to_record,
)
from fedgraft_common.plan import Plan
from fedgraft_common.secure_aggregation import (
    SecureRound,
    SecureServer,
    Total,
    check_advertisement,
)
from fedgraft_common.secure_messages import (
    Acceptance,
    Advertisement,
    Answer,
    Sharing,
    Terms,
    from_bits,
    pack_list,
    unpack_list,
)
from fedgraft_common.secure_terms import context_of, masked_schema, secure_terms, to_vector
from fedgraft_common.secure_transcript import Transcript
from fedgraft_common.site_signature import Trust
from fedgraft_server.aggregation import Aggregator
from fedgraft_server.secure_faults import RoundLostError, SecureFaults

log = logging.getLogger(__name__)
ATTEMPTS = 10  # set-ups in a row; each leaves out the sites that failed in those before

Registered = Callable[[bytes], tuple[str, int | None]]
"""A certificate (DER) to its site's name and node id; raises IdentityError if it is not live."""


@dataclass(slots=True)
class _Setup:
    """A complete set-up.

    Attributes:
        server: its state machine.
        nodes: node id of each site of the roster.
    """

    server: SecureServer
    nodes: dict[str, int]

    @property
    def names(self) -> dict[int, str]:
        """Site of each node."""
        return {node: name for name, node in self.nodes.items()}


@dataclass(slots=True)
class _Said:
    """What came of a question to several nodes.

    Attributes:
        answers: by node.
        refused: nodes that say the question does not follow the protocol: asked again, they would
            say so again.
    """

    answers: dict[int, bytes] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)


class SecureSum:
    """The sums of one run.

    Args:
        plan: the run.
        aggregator: makes requests.
        grid: carries messages.
        directory: of the run.
        bits: 32 or 64: sums are modulo 2^bits.
        trust: whose certificates count, now.
        durable: whether a write waits for the disk.
        registered: the server's registry, which says which node is which site; None in a
            simulation, where the certificate alone does.
    """

    def __init__(
        self,
        plan: Plan,
        aggregator: Aggregator,
        grid: Grid,
        directory: Path,
        bits: int,
        trust: Callable[[], Trust],
        durable: bool = True,
        registered: Registered | None = None,
    ) -> None:
        self._plan = plan
        self._aggregator = aggregator
        self._grid = grid
        self._directory = directory
        self._trust = trust
        self._durable = durable
        self._bits = bits
        self._schema = masked_schema(aggregator.schema, bits)
        self._setup: _Setup | None = None
        self._delivered: set[int] = set()  # nodes that have taken their shares of this set-up
        self._registered = registered
        self._faults = SecureFaults.read(directory)
        self._stranded: set[int] = set()  # nodes that only a new set-up would bring back
        self._brought: set[int] = set()  # nodes for which one was made

    def gather(self, number: int, adapter: Tensors) -> Total | None:
        """The sum of a round's inputs, modulo 2^bits; None if the round is lost.

        Args:
            number: of the round.
            adapter: where it starts.

        Raises:
            MessageError: too few sites, inputs or answers so far; resume the run when they are
                back.
            AggregationError: several rounds in a row were lost; says what can be done.
            CheckpointError: the saved state is damaged.
        """
        if self._faults.lost == number:  # the server was killed before its checkpoint
            return None
        try:
            setup = self._set_up_for(number)
            open_round = self._saved(setup, number)
            if open_round is None:
                open_round = self._collect(setup, number, adapter)
                self._write("secure-round.bin", open_round.save())
            try:
                self._unmask(setup, open_round)
            finally:
                self._record(setup, open_round)
            return self._total(open_round)
        except RoundLostError as lost:
            self._lose(number, lost)
            return None

    def _total(self, finished: SecureRound) -> Total:
        try:
            total = finished.total()
        except AggregationError:
            who = finished.unreadable
            raise RoundLostError(
                f"{who} dealt shares that do not give its secrets, or several sites changed theirs",
                who,
            ) from None
        for holder, dealer in total.wrong:
            facts = {"action": "refuse", "round": finished.number, "site": holder}
            log.warning("a share of %s's does not fit", dealer, extra=facts)
        return total

    def _lose(self, number: int, lost: RoundLostError) -> None:
        """Declares a round lost, on the disk before anything follows from it."""
        log.error("lost: %s", lost.reason, extra={"action": "lose", "round": number})
        self._faults.lose(number, lost)
        self._faults.write(self._directory, self._durable)
        if self._setup is None or self._setup.server.terms.first_round <= number:
            self._forget()
        self._faults.check(self._plan.privacy.tolerated_dropouts)

    # -- set-up

    def _set_up_for(self, number: int) -> _Setup:
        if self._setup is None:
            self._setup = self._restored()
        if self._setup is None or self._setup.server.terms.last_round < number or self._stranded:
            self._brought |= self._stranded
            self._setup = self._new_set_up(number)
        if self._setup.server.terms.first_round > number:
            raise RoundLostError("the sites had begun it under a set-up that is gone")
        return self._setup

    def _restored(self) -> _Setup | None:
        path = self._directory / "secure-setup.bin"
        if not path.exists():
            return None
        try:
            state, nodes = unpack_list(path.read_bytes(), 2)
            return _Setup(SecureServer.restore(state, self._trust()), json.loads(nodes))
        except (MessageError, ValueError) as error:
            raise CheckpointError(
                str(path), str(error), "what the server wrote",
                "Delete the file: the run then makes a new set-up for the rounds that are left.",
            ) from None  # fmt: skip

    def _new_set_up(self, number: int) -> _Setup:
        """For this round and later ones; from the next one on, if sites have trained this one."""
        self._forget()
        last = self._plan.rounds.count
        made = self._agree(number) or (self._agree(number + 1) if number < last else None)
        if made is None and 1 < number == last:
            raise RoundLostError("the sites had begun it under a set-up that is gone")
        if made is None:
            raise MessageError(
                f"secure aggregation, set-up for round {number}", "refused by too many sites",
                "sites that are where this server is",
                "See their logs: they run another version, or are ahead of this server because it "
                "was put back from an old copy. Then start a new run.",
            )  # fmt: skip
        nodes = json.dumps(made.nodes).encode()
        self._write("secure-setup.bin", pack_list([made.server.save(), nodes]))
        return made

    def _agree(self, first: int) -> _Setup | None:
        """A complete set-up from a round on; None if sites have trained that round already.

        Raises:
            MessageError: too few sites; names those that were left out, and why.
        """
        out = dict(self._faults.out)  # site to reason
        absent: dict[str, str] = {}
        reports: dict[str, set[str]] = defaultdict(set)  # dealer to who cannot use its shares
        for attempt in range(ATTEMPTS):
            terms, trust = self._terms(first), self._trust()
            offers, refused = self._advertise(terms, trust, first)
            if not attempt and len(offers) < terms.needed <= len(offers) + len(refused):
                return None
            if not attempt and len(offers.keys() - out) < terms.needed <= len(offers):
                log.warning("trying again with %s", sorted(out), extra={"action": "set-up"})
                out = {}  # it does not work without them, and they may have been mended
            setup = _Setup(SecureServer(terms, trust), {})
            for name in sorted(offers.keys() - out):
                node, advertisement = offers[name]
                with _noted(SecureStep.ADVERTISE, first, node):
                    setup.server.add_advertisement(advertisement)
                    setup.nodes[name] = node
            if len(setup.nodes) < terms.needed:
                told = f" ({'; '.join(out.values())})" if out else ""
                raise _too_few(f"set-up{told}", len(setup.nodes), terms.needed)
            failed = self._share(setup, first)
            complaints = [] if failed else self._deliver(setup, first, failed)
            if not failed and not complaints:
                facts = {"action": "set-up", "round": first}
                log.info("secure aggregation of %d sites", len(setup.nodes), extra=facts)
                return setup
            for reporter, dealer in complaints:
                reports[dealer].add(reporter)
            absent |= failed
            out = self._judge(reports, terms.colluders) | absent
            log.warning(
                "a new set-up: %s", "; ".join(out.values()),
                extra={"action": "set-up", "round": first},
            )  # fmt: skip
        raise _too_few(f"set-up ({'; '.join(out.values())})", 0, terms.needed)

    def _terms(self, first: int) -> Terms:
        length = sum(spec.bytes for spec in self._schema) * 8 // self._bits
        return secure_terms(self._plan, length, self._bits, secrets.token_bytes(16), first)

    def _advertise(
        self, terms: Terms, trust: Trust, first: int
    ) -> tuple[dict[str, tuple[int, Advertisement]], set[int]]:
        """Node and keys of each site that has a right to its name; nodes that refuse the terms."""
        asked = dict.fromkeys(self._grid.get_node_ids(), terms.to_bytes())
        said = self._ask(SecureStep.ADVERTISE, first, asked)
        offers: dict[str, tuple[int, Advertisement]] = {}
        for node, answer in said.answers.items():
            with _noted(SecureStep.ADVERTISE, first, node):
                offered = Advertisement.from_bytes(answer)
                if self._registered is not None:
                    _check_registered(self._registered(offered.certificate), offered.site, node)
                check_advertisement(offered, terms, trust)
                if offers.setdefault(offered.site, (node, offered))[0] != node:
                    raise IdentityError(
                        f"node {node}", f"site {offered.site}, a second time",
                        "one node for each site", "Somebody may be posing as that site.",
                    )  # fmt: skip
        return offers, said.refused

    def _share(self, setup: _Setup, first: int) -> dict[str, str]:
        """Has the roster signed; returns who has not, and why."""
        message = setup.server.close_roster().to_bytes()
        asked = dict.fromkeys(setup.nodes.values(), message)
        for node, answer in self._ask(SecureStep.SHARE, first, asked).answers.items():
            with _noted(SecureStep.SHARE, first, node):
                sharing = Sharing.from_bytes(answer)
                _check_name(sharing.site, setup.names[node])
                setup.server.add_sharing(sharing)
        return {name: f"{name} sent no shares" for name in setup.server.missing}

    def _deliver(self, setup: _Setup, first: int, failed: dict[str, str]) -> list[tuple[str, str]]:
        """Hands out the shares; one that is away gets them with its first round.

        Args:
            setup: with everybody's shares.
            first: round.
            failed: who has not taken them, and why, is added to it.

        Returns:
            Pairs (site, dealer whose shares it cannot use).
        """
        server, names = setup.server, setup.names
        asked = {node: server.delivery(name).to_bytes() for node, name in names.items()}
        said = self._ask(SecureStep.ACCEPT, first, asked)
        complaints: list[tuple[str, str]] = []
        self._delivered = set()
        for node in said.answers.keys() | said.refused:
            failed[names[node]] = f"{names[node]} did not take its shares"
        for node, answer in said.answers.items():
            with _noted(SecureStep.ACCEPT, first, node):
                found = Acceptance.from_bytes(answer)
                unusable = from_bits(found.unusable, len(server.roster))
                if found.roster != server.roster.digest:
                    raise MessageError("roster", "another", "the one it signed", "It is left out.")
                complaints += [(names[node], server.roster.names[n]) for n in sorted(unusable)]
                if not unusable:
                    self._delivered.add(node)
                del failed[names[node]]
        return complaints

    def _judge(self, reports: Mapping[str, set[str]], colluders: int) -> dict[str, str]:
        """Whom to leave out, and why: a dealer that more sites report than may lie, else them."""
        before = dict(self._faults.out)
        out: dict[str, str] = {}
        for dealer, reporters in reports.items():
            if len(reporters) > colluders:
                told = ", ".join(sorted(reporters))
                self._faults.out[dealer] = f"{dealer} dealt shares that {told} cannot use"
            else:
                out |= {name: f"{name} cannot use the shares of {dealer}" for name in reporters}
        if self._faults.out != before:
            self._faults.write(self._directory, self._durable)
        return out | self._faults.out

    # -- a round

    def _saved(self, setup: _Setup, number: int) -> SecureRound | None:
        """A round that was being unmasked when the server stopped."""
        path = self._directory / "secure-round.bin"
        if not path.exists():
            return None
        server = setup.server
        saved = SecureRound.restore(path.read_bytes(), server.terms, server.roster)
        return saved if saved.number == number else None

    def _collect(self, setup: _Setup, number: int, adapter: Tensors) -> SecureRound:
        server, names = setup.server, setup.names
        context = context_of(self._plan, number, to_record(adapter))
        opened = SecureRound(server.terms, server.roster, number, context)
        requests = []
        for request in self._aggregator.requests(number, adapter, self._grid):
            node = request.metadata.dst_node_id
            if node not in names:
                continue
            if node not in self._delivered:
                delivery = ConfigRecord({MESSAGE: server.delivery(names[node]).to_bytes()})
                request.content = RecordDict({**request.content, SECURE: delivery})
            requests.append(request)
        refused: dict[str, str] = {}
        for reply in self._grid.send_and_receive(requests, timeout=self._plan.rounds.deadline):
            node = reply.metadata.src_node_id
            status = read_status(reply)
            refused[names[node]] = "malformed" if status is Status.OK else status.value
            with _noted("input", number, node):
                tensors = self._input(number, reply)
                opened.add_input(names[node], to_vector(tensors, self._schema))
                self._delivered.add(node)
                del refused[names[node]]
        if len(opened.inputs) < server.terms.needed:
            self._give_up("inputs", number, setup, opened.inputs, refused)
        opened.close()
        lost = {setup.nodes[name] for name, why in refused.items() if why == Status.MESSAGE}
        if len(opened.inputs) + len(lost) == len(setup.nodes):
            self._stranded = lost - self._brought
        return opened

    def _input(self, number: int, reply: Message) -> Tensors:
        _check_status(number, reply)
        return from_record(reply.content.array_records.get(ADAPTER, ArrayRecord()), self._schema)

    def _unmask(self, setup: _Setup, closed: SecureRound) -> None:
        question, number = closed.close().to_bytes(), closed.number
        present = set(self._grid.get_node_ids())  # a site may have been revoked since
        asked = {
            node: question
            for name, node in setup.nodes.items()
            if name not in closed.answers and node in present
        }
        said = self._ask(SecureStep.UNMASK, number, asked)
        refused = {setup.names[node]: Status.MESSAGE.value for node in said.refused}
        for node, answer in said.answers.items():
            refused[setup.names[node]] = "malformed"
            with _noted(SecureStep.UNMASK, number, node):
                closed.add_answer(Answer.from_bytes(answer))
                del refused[setup.names[node]]
        if not closed.enough:
            self._give_up("answers", number, setup, closed.answers, refused)

    def _give_up(
        self,
        what: str,
        number: int,
        setup: _Setup,
        had: frozenset[str],
        refused: Mapping[str, str],
    ) -> NoReturn:
        """Ends a round: for now, or for good if those that may still come are too few.

        Args:
            what: there is too little of.
            number: of the round.
            setup: that it is under.
            had: sites that gave theirs.
            refused: sites that did not, and what they said.
        """
        present = set(self._grid.get_node_ids())
        hopeless = {n for n, why in refused.items() if why in (Status.MESSAGE, "malformed")}
        gone = {name for name, node in setup.nodes.items() if node not in present} - had
        told = [f"{name} {why}" for name, why in sorted(refused.items())]
        told += [f"{name} is not in the run any more" for name in sorted(gone)]
        needed = setup.server.terms.needed
        if len(had | (setup.nodes.keys() - hopeless - gone)) < needed:
            raise RoundLostError(f"{len(had)} {what} of at least {needed} ({', '.join(told)})")
        why = f" ({', '.join(told)})" if told else ""
        raise _too_few(f"{what} of round {number}{why}", len(had), needed)

    # -- messages and files

    def _ask(self, step: SecureStep, number: int, messages: Mapping[int, bytes]) -> _Said:
        """Asks nodes; one that refuses is logged."""
        requests = [
            Message(
                RecordDict(
                    {
                        ADAPTER: ArrayRecord(),
                        PLAN: self._aggregator.config(number),
                        SECURE: ConfigRecord({MESSAGE: message}),
                    }
                ),
                node,
                step.message_type,
            )
            for node, message in sorted(messages.items())
        ]
        said = _Said()
        for reply in self._grid.send_and_receive(requests, timeout=self._plan.rounds.deadline):
            node = reply.metadata.src_node_id
            with _noted(step, number, node):
                if read_status(reply) is Status.MESSAGE:
                    said.refused.add(node)
                _check_status(number, reply)
                answer = read_secure(reply.content.config_records.get(SECURE))
                said.answers.setdefault(node, answer)  # a second one is ignored
        return said

    def _record(self, setup: _Setup, finished: SecureRound) -> None:
        """Adds a round's statements to the transcript, also of one that is lost."""
        if not finished.statements:
            return
        server = setup.server
        folder = self._directory / f"transcript-{server.terms.first_round:06d}"
        if not (folder / "set-up.bin").exists():
            begun = Transcript(server.terms, server.roster, server.signatures(), ())
            write_atomically(folder / "set-up.bin", begun.to_bytes(), self._durable)
        statements = pack_list([statement.to_bytes() for statement in finished.statements])
        write_atomically(folder / f"round-{finished.number:06d}.bin", statements, self._durable)

    def _forget(self) -> None:
        """The next round gets a new set-up."""
        self._setup = None
        self._stranded = set()
        for name in ("secure-round.bin", "secure-setup.bin"):
            (self._directory / name).unlink(missing_ok=True)

    def _write(self, name: str, content: bytes) -> None:
        write_atomically(self._directory / name, content, self._durable)


@contextmanager
def _noted(step: str, number: int, node: int) -> Iterator[None]:
    """A site that answers wrongly is logged, and counts as one that did not answer.

    Whatever went wrong: what a stranger sent must not end the run of the others.
    """
    try:
        yield
    except Exception as error:
        facts = {"action": "refuse", "round": number, "site": node}
        known = isinstance(error, FedgraftError)
        log.warning("%s: %s", step, error if known else repr(error), extra=facts)


def _check_registered(found: tuple[str, int | None], name: str, node: int) -> None:
    if found != (name, node):
        raise IdentityError(
            f"node {node}", f"keys of site {name}", f"those of the site that node is ({found[0]})",
            "Somebody may be posing as that site; it was left out. Tell the site.",
        )  # fmt: skip


def _check_name(found: str, expected: str) -> None:
    if found != expected:
        raise MessageError("site", found, expected, "The message was ignored.")


def _check_status(number: int, reply: Message) -> None:
    status = read_status(reply)
    if status is not Status.OK:
        raise MessageError("status", status.value, "ok", "See the site's log.")
    answered = reply.content.config_records[STATUS].get(ROUND)
    if answered != number:
        raise MessageError("round", answered, str(number), "A late reply was ignored.")


def _too_few(what: str, found: int, needed: int) -> MessageError:
    return MessageError(
        f"secure aggregation, {what}", f"{found} sites", f"at least {needed}, the plan's sites "
        "without privacy.tolerated_dropouts",
        "Nothing was revealed. Look into the sites' own logs; resume the run when they are back.",
    )  # fmt: skip
