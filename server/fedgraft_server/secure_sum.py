"""A run's secure aggregation, seen from the server: set-ups, masked inputs, and their sum.

The protocol is `fedgraft_common.secure_aggregation`; this carries its messages over a grid and
keeps what a restarted server needs:

    <directory>/secure-setup.bin     the set-up in force, and which node is which site
    <directory>/secure-round.bin     the round being unmasked: its survivors are named once
    <directory>/transcript-NNNNNN/   what the sites signed under a set-up, for an auditor

A site that is missing in a set-up, or fails in it, counts as a dropout until the next one. A round
with too few inputs is not unmasked; it goes on when the run is resumed, with the same bytes. A
round that cannot be unmasked is lost: the adapter stays as it was, and what it cost is spent.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedgraft_common.errors import AggregationError, CheckpointError, FedgraftError, MessageError
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
from fedgraft_common.secure_aggregation import SecureRound, SecureServer, Total
from fedgraft_common.secure_messages import Advertisement, Answer, Sharing, pack_list, unpack_list
from fedgraft_common.secure_terms import context_of, masked_schema, secure_terms, to_vector
from fedgraft_common.secure_transcript import Transcript
from fedgraft_common.site_signature import Trust
from fedgraft_server.aggregation import Aggregator

log = logging.getLogger(__name__)
ATTEMPTS = 3  # set-ups in a row; each leaves out the sites that failed in the one before


@dataclass(slots=True)
class _Setup:
    """A complete set-up.

    Attributes:
        server: its state machine.
        nodes: node id of each site of the roster.
    """

    server: SecureServer
    nodes: dict[str, int]


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
        self._delivered: set[int] = set()  # nodes that have answered a round under this set-up

    def gather(self, number: int, adapter: Tensors) -> Total | None:
        """The sum of a round's inputs, modulo 2^bits; None if the round is lost.

        Args:
            number: of the round.
            adapter: where it starts.

        Raises:
            MessageError: too few sites, inputs or answers so far; resume the run when they are
                back.
            CheckpointError: the saved state is damaged.
        """
        setup = self._set_up_for(number)
        open_round = self._saved(setup, number)
        if open_round is None:
            open_round = self._collect(setup, number, adapter)
            self._write("secure-round.bin", open_round.save())
        self._unmask(setup, open_round)
        self._record(setup, open_round)
        try:
            total = open_round.total()
        except AggregationError as error:
            log.error("lost: %s", error, extra={"action": "lose", "round": number})
            self._forget()
            return None
        for holder, dealer in total.wrong:
            facts = {"action": "refuse", "round": number, "site": holder}
            log.warning("a share of %s's does not fit", dealer, extra=facts)
        return total

    # -- set-up

    def _set_up_for(self, number: int) -> _Setup:
        if self._setup is None:
            self._setup = self._restored()
        current = self._setup
        if current is None or not _covers(current.server, number):
            self._setup = current = self._new_set_up(number)
            self._delivered.clear()
            (self._directory / "secure-round.bin").unlink(missing_ok=True)
            nodes = json.dumps(current.nodes).encode()
            self._write("secure-setup.bin", pack_list([current.server.save(), nodes]))
        return current

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
        length = sum(spec.bytes for spec in self._schema) * 8 // self._bits
        out: set[int] = set()
        for _ in range(ATTEMPTS):
            session = secrets.token_bytes(16)
            terms = secure_terms(self._plan, length, self._bits, session, number)
            server = SecureServer(terms, self._trust())
            nodes = self._advertise(server, number, set(self._grid.get_node_ids()) - out)
            if len(server.advertised) < terms.needed:
                raise _too_few("set-up", len(server.advertised), terms.needed)
            message = server.close_roster().to_bytes()
            asked = dict.fromkeys(nodes.values(), message)
            for node, answer in self._ask(SecureStep.SHARE, number, asked):
                with _noted(SecureStep.SHARE, number, node):
                    server.add_sharing(Sharing.from_bytes(answer))
            if server.ready:
                facts = {"action": "set-up", "round": number}
                log.info("secure aggregation of %d sites", len(nodes), extra=facts)
                return _Setup(server, nodes)
            out |= {nodes[name] for name in server.missing}
            log.warning(
                "no shares from %s; a new set-up without them", sorted(server.missing),
                extra={"action": "set-up", "round": number},
            )  # fmt: skip
        raise _too_few("set-up", len(server.roster) - len(server.missing), len(server.roster))

    def _advertise(self, server: SecureServer, number: int, asked: Iterable[int]) -> dict[str, int]:
        message = server.terms.to_bytes()
        nodes: dict[str, int] = {}
        for node, answer in self._ask(SecureStep.ADVERTISE, number, dict.fromkeys(asked, message)):
            with _noted(SecureStep.ADVERTISE, number, node):
                advertisement = Advertisement.from_bytes(answer)
                server.add_advertisement(advertisement)
                nodes.setdefault(advertisement.site, node)
        return nodes

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
        server = setup.server
        names = {node: name for name, node in setup.nodes.items()}
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
        refused = []
        for reply in self._grid.send_and_receive(requests, timeout=self._plan.rounds.deadline):
            node = reply.metadata.src_node_id
            try:
                tensors = self._input(number, reply)
                opened.add_input(names[node], to_vector(tensors, self._schema))
                self._delivered.add(node)
            except FedgraftError as error:
                facts = {"action": "refuse", "round": number, "site": node}
                log.warning("%s", error, extra=facts)
                refused.append(str(error.value))
        if len(opened.inputs) < server.terms.needed:
            told = f" ({', '.join(sorted(set(refused)))})" if refused else ""
            raise _too_few(f"round {number}{told}", len(opened.inputs), server.terms.needed)
        opened.close()
        return opened

    def _input(self, number: int, reply: Message) -> Tensors:
        _check_status(number, reply)
        return from_record(reply.content.array_records.get(ADAPTER, ArrayRecord()), self._schema)

    def _unmask(self, setup: _Setup, closed: SecureRound) -> None:
        question = closed.close().to_bytes()
        asked = {node: question for name, node in setup.nodes.items() if name not in closed.answers}
        for node, answer in self._ask(SecureStep.UNMASK, closed.number, asked):
            with _noted(SecureStep.UNMASK, closed.number, node):
                closed.add_answer(Answer.from_bytes(answer))
        if not closed.enough:
            raise _too_few(
                f"answers of round {closed.number}", len(closed.answers), setup.server.terms.needed
            )

    # -- messages and files

    def _ask(
        self, step: SecureStep, number: int, messages: dict[int, bytes]
    ) -> Iterator[tuple[int, bytes]]:
        """Asks nodes, and yields what they said; one that refuses is logged."""
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
        for reply in self._grid.send_and_receive(requests, timeout=self._plan.rounds.deadline):
            node = reply.metadata.src_node_id
            with _noted(step, number, node):
                _check_status(number, reply)
                yield node, read_secure(reply.content.config_records.get(SECURE))

    def _record(self, setup: _Setup, finished: SecureRound) -> None:
        """Adds a round's statements to the transcript."""
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
        (self._directory / "secure-setup.bin").unlink(missing_ok=True)

    def _write(self, name: str, content: bytes) -> None:
        write_atomically(self._directory / name, content, self._durable)


@contextmanager
def _noted(step: str, number: int, node: int) -> Iterator[None]:
    """A site that answers wrongly is logged, and counts as one that did not answer."""
    try:
        yield
    except FedgraftError as error:
        facts = {"action": "refuse", "round": number, "site": node}
        log.warning("%s: %s", step, error, extra=facts)


def _covers(server: SecureServer, number: int) -> bool:
    return server.ready and server.terms.first_round <= number <= server.terms.last_round


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
