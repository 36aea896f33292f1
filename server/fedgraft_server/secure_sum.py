"""A run's secure aggregation, seen from the server: set-ups, masked inputs, and their sum.

The protocol is `fedgraft_common.secure_aggregation`; this carries its messages over a grid and
keeps what a restarted server needs:

    <directory>/secure-setup.bin     the set-up in force, and which node is which site
    <directory>/secure-round.bin     the round being unmasked: its survivors are named once
    <directory>/transcript-NNNNNN/   what the sites signed under a set-up, for an auditor

A site that is missing in a set-up, or fails in it, counts as a dropout until the next one. One that
is there again, or has lost its state, gets a new set-up, once, when nobody else is away.

A round with too few inputs is not unmasked; it goes on when the run is resumed, with the same
bytes. A round that can never be had is lost: the adapter stays as it was, what it cost is spent,
and the next round gets a new set-up. Its inputs exist under the old one only, and sites refuse a
set-up for a round they have trained: so nothing is ever summed twice.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedgraft_common.errors import AggregationError, CheckpointError, MessageError
from fedgraft_common.files import write_atomically
from fedgraft_common.messages import (
    ADAPTER,
    MESSAGE,
    SECURE,
    SecureStep,
    Status,
    Tensors,
    from_record,
    read_status,
    to_record,
)
from fedgraft_common.plan import Plan
from fedgraft_common.secure_aggregation import SecureRound, SecureServer, Total
from fedgraft_common.secure_messages import Answer, Terms, pack_list, unpack_list
from fedgraft_common.secure_terms import context_of, masked_schema, secure_terms, to_vector
from fedgraft_common.secure_transcript import Transcript
from fedgraft_common.site_signature import Trust
from fedgraft_server.aggregation import Aggregator
from fedgraft_server.secure_faults import RoundLostError, SecureFaults
from fedgraft_server.secure_questions import SecureQuestions, check_status, noted, too_few
from fedgraft_server.secure_set_up import Registered, SecureSetUps, SetUp

log = logging.getLogger(__name__)


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
        self._setup: SetUp | None = None
        self._questions = SecureQuestions(aggregator, grid, plan.rounds.deadline)
        self._faults = SecureFaults.read(directory, durable)
        self._set_ups = SecureSetUps(
            self._terms, self._questions, grid, trust, self._faults, registered
        )
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
        self._faults.write()
        if self._setup is None or self._setup.server.terms.first_round <= number:
            self._forget()
        self._faults.check(self._plan.privacy.tolerated_dropouts)

    # -- set-up

    def _set_up_for(self, number: int) -> SetUp:
        if self._setup is None:
            self._setup = self._restored()
        if self._setup is None or self._setup.server.terms.last_round < number or self._stranded:
            self._brought |= self._stranded
            self._setup = self._new_set_up(number)
        if self._setup.server.terms.first_round > number:
            raise RoundLostError("the sites had begun it under a set-up that is gone")
        return self._setup

    def _restored(self) -> SetUp | None:
        path = self._directory / "secure-setup.bin"
        if not path.exists():
            return None
        try:
            state, nodes = unpack_list(path.read_bytes(), 2)
            return SetUp(SecureServer.restore(state, self._trust()), json.loads(nodes))
        except (MessageError, ValueError) as error:
            raise CheckpointError(
                str(path), str(error), "what the server wrote",
                "Delete the file: the run then makes a new set-up for the rounds that are left.",
            ) from None  # fmt: skip

    def _new_set_up(self, number: int) -> SetUp:
        """For this round and later ones; from the next one on, if sites have trained this one."""
        self._forget()
        last = self._plan.rounds.count
        made = self._set_ups.agree(number) or (
            self._set_ups.agree(number + 1) if number < last else None
        )
        if made is None and 1 < number == last:
            raise RoundLostError("the sites had begun it under a set-up that is gone")
        if made is None:
            raise MessageError(
                f"secure aggregation, set-up for round {number}",
                f"refused by {', '.join(self._set_ups.refusing)}",
                "sites that are where this server is",
                "See their logs: they run another version, or are ahead of this server because it "
                "was put back from an old copy. Then start a new run.",
            )  # fmt: skip
        nodes = json.dumps(made.nodes).encode()
        self._write("secure-setup.bin", pack_list([made.server.save(), nodes]))
        return made

    def _terms(self, first: int) -> Terms:
        length = sum(spec.bytes for spec in self._schema) * 8 // self._bits
        return secure_terms(self._plan, length, self._bits, secrets.token_bytes(16), first)

    # -- a round

    def _saved(self, setup: SetUp, number: int) -> SecureRound | None:
        """A round that was being unmasked when the server stopped."""
        path = self._directory / "secure-round.bin"
        if not path.exists():
            return None
        server = setup.server
        saved = SecureRound.restore(path.read_bytes(), server.terms, server.roster)
        return saved if saved.number == number else None

    def _collect(self, setup: SetUp, number: int, adapter: Tensors) -> SecureRound:
        server, names = setup.server, setup.names
        context = context_of(self._plan, number, to_record(adapter))
        opened = SecureRound(server.terms, server.roster, number, context)
        requests = []
        for request in self._aggregator.requests(number, adapter, self._grid):
            node = request.metadata.dst_node_id
            if node not in names:
                continue
            if node not in setup.delivered:
                delivery = ConfigRecord({MESSAGE: server.delivery(names[node]).to_bytes()})
                request.content = RecordDict({**request.content, SECURE: delivery})
            requests.append(request)
        refused: dict[str, str] = {}
        for reply in self._grid.send_and_receive(requests, timeout=self._plan.rounds.deadline):
            node = reply.metadata.src_node_id
            status = read_status(reply)
            refused[names[node]] = "malformed" if status is Status.OK else status.value
            with noted("input", number, node):
                tensors = self._input(number, reply)
                opened.add_input(names[node], to_vector(tensors, self._schema))
                setup.delivered.add(node)
                del refused[names[node]]
        if len(opened.inputs) < server.terms.needed:
            self._give_up("inputs", number, setup, opened.inputs, refused)
        opened.close()
        lost = {setup.nodes[name] for name, why in refused.items() if why == Status.MESSAGE}
        if len(opened.inputs) + len(lost) == len(setup.nodes):
            self._stranded = (lost | self._outside(setup)) - self._brought
        return opened

    def _outside(self, setup: SetUp) -> set[int]:
        """Nodes that are connected and have no part in the set-up: they came late, or failed."""
        inside = set(setup.nodes.values())
        if inside >= set(self._grid.get_node_ids()):
            return set()
        return {node.node_id for node in self._grid.get_nodes()} - inside

    def _input(self, number: int, reply: Message) -> Tensors:
        check_status(number, reply)
        return from_record(reply.content.array_records.get(ADAPTER, ArrayRecord()), self._schema)

    def _unmask(self, setup: SetUp, closed: SecureRound) -> None:
        question, number = closed.close().to_bytes(), closed.number
        present = set(self._grid.get_node_ids())  # a site may have been revoked since
        asked = {
            node: question
            for name, node in setup.nodes.items()
            if name not in closed.answers and node in present
        }
        said = self._questions.ask(SecureStep.UNMASK, number, asked)
        refused = {setup.names[node]: Status.MESSAGE.value for node in said.refused}
        for node, answer in said.answers.items():
            refused[setup.names[node]] = "malformed"
            with noted(SecureStep.UNMASK, number, node):
                closed.add_answer(Answer.from_bytes(answer))
                del refused[setup.names[node]]
        if not closed.enough:
            self._give_up("answers", number, setup, closed.answers, refused)

    def _give_up(
        self,
        what: str,
        number: int,
        setup: SetUp,
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
        raise too_few(f"{what} of round {number}{why}", len(had), needed)

    # -- messages and files

    def _record(self, setup: SetUp, finished: SecureRound) -> None:
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
