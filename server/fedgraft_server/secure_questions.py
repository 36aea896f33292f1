"""The server's questions to sites in secure aggregation, and what it makes of wrong answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedgraft_common.errors import FedgraftError, MessageError
from fedgraft_common.messages import (
    ADAPTER,
    MESSAGE,
    PLAN,
    ROUND,
    SECURE,
    STATUS,
    SecureStep,
    Status,
    read_secure,
    read_status,
)
from fedgraft_server.aggregation import Aggregator

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Said:
    """What came of a question to several nodes.

    Attributes:
        answers: by node.
        refused: nodes that say the question does not follow the protocol: asked again, they would
            say so again.
    """

    answers: dict[int, bytes] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)


class SecureQuestions:
    """Asks the sites of one run.

    Args:
        aggregator: knows what every request holds.
        grid: carries messages.
        deadline: seconds that an answer may take.
    """

    def __init__(self, aggregator: Aggregator, grid: Grid, deadline: float) -> None:
        self._aggregator = aggregator
        self._grid = grid
        self._deadline = deadline

    def ask(self, step: SecureStep, number: int, messages: Mapping[int, bytes]) -> Said:
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
        said = Said()
        for reply in self._grid.send_and_receive(requests, timeout=self._deadline):
            node = reply.metadata.src_node_id
            with noted(step, number, node):
                if read_status(reply) is Status.MESSAGE:
                    said.refused.add(node)
                check_status(number, reply)
                answer = read_secure(reply.content.config_records.get(SECURE))
                said.answers.setdefault(node, answer)  # a second one is ignored
        return said


@contextmanager
def noted(step: str, number: int, node: int) -> Iterator[None]:
    """A site that answers wrongly is logged, and counts as one that did not answer.

    Whatever went wrong: what a stranger sent must not end the run of the others.
    """
    try:
        yield
    except Exception as error:
        facts = {"action": "refuse", "round": number, "site": node}
        known = isinstance(error, FedgraftError)
        log.warning("%s: %s", step, error if known else repr(error), extra=facts)


def check_status(number: int, reply: Message) -> None:
    """Refuses a reply that is no answer, or one to another round.

    Raises:
        MessageError: says which.
    """
    status = read_status(reply)
    if status is not Status.OK:
        raise MessageError("status", status.value, "ok", "See the site's log.")
    answered = reply.content.config_records[STATUS].get(ROUND)
    if answered != number:
        raise MessageError("round", answered, str(number), "A late reply was ignored.")


def too_few(what: str, found: int, needed: int) -> MessageError:
    """What there is too little of, so far."""
    return MessageError(
        f"secure aggregation, {what}", f"{found} sites", f"at least {needed}, the plan's sites "
        "without privacy.tolerated_dropouts",
        "Nothing was revealed. Look into the sites' own logs; resume the run when they are back.",
    )  # fmt: skip
