"""Every byte of a reply, accounted for.

A reply is taken apart into what the plan lets leave (tensors of the plan's names, shapes and dtype,
or masked integers in their place, or two noised counts, or a message of secure aggregation; the
round; one word of a closed list) and what mirrors the request. From these alone it is put together
again. If the bytes are the same, there was nothing else in them, and each byte is of one of the
kinds below. If they are not, something left that nobody accounts for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from flwr.app import Message
from flwr.common.serde import message_to_proto

from fedgraft_client.egress import digest_counts
from fedgraft_common.errors import FedgraftError, MessageError
from fedgraft_common.messages import (
    ADAPTER,
    COUNTS,
    EVALUATE,
    SECURE,
    SecureStep,
    Status,
    TensorSpec,
    digest,
    from_record,
    read_counts,
    read_secure,
    read_status,
    to_record,
    write_counts,
    write_reply,
    write_secure,
)
from fedgraft_common.secure_messages import Acceptance, Advertisement, Answer, Sharing
from fedgraft_simulations.audit.rehearsal import Exchange

SECURE_STEPS: dict[str, type[Advertisement | Sharing | Acceptance | Answer]] = {
    SecureStep.ADVERTISE.message_type: Advertisement,
    SecureStep.SHARE.message_type: Sharing,
    SecureStep.ACCEPT.message_type: Acceptance,
    SecureStep.UNMASK.message_type: Answer,
}


@dataclass(frozen=True, slots=True)
class Accounted:
    """The bytes of one reply.

    Attributes:
        total: all of them.
        values: private, behind noise or masks: the numbers in tensors or counts.
        masks: of secure aggregation: public keys, signatures, encrypted shares of mask secrets.
        form: the plan's: names, shapes and number formats of the tensors.
        envelope: the request's own values sent back, the round and the status.
        status: the word.
        digest: SHA-256 of tensors, counts or message, as the ledger has it; empty if none left.
    """

    total: int
    values: int
    masks: int
    form: int
    envelope: int
    status: Status
    digest: str


def account_for(exchange: Exchange, schema: tuple[TensorSpec, ...]) -> Accounted:
    """Takes a reply apart and puts it together again.

    Args:
        exchange: what was asked and what was sent.
        schema: the tensors that the plan lets leave.

    Raises:
        FedgraftError: there is something in it that is not accounted for; says what.
    """
    reply = exchange.reply
    status = read_status(reply)
    values, masks, found, again = 0, 0, "", _plain(exchange, status)
    if status is Status.OK and exchange.kind == EVALUATE:
        counts = read_counts(reply.content.metric_records.get(COUNTS))
        values, found = 16, digest_counts(counts)
        again = write_counts(exchange.request, exchange.round, status, counts)
    elif status is Status.OK and exchange.kind in SECURE_STEPS:
        message = read_secure(reply.content.config_records.get(SECURE))
        _check_secure(exchange, message)
        masks, found = len(message), hashlib.sha256(message).hexdigest()
        again = write_secure(exchange.request, exchange.round, status, message)
    elif status is Status.OK:
        tensors = from_record(reply.content.array_records[ADAPTER], schema)
        record = to_record(tensors)
        values, found = sum(spec.bytes for spec in schema), digest(record)
        again = write_reply(exchange.request, exchange.round, status, record)
    envelope = len(_bytes(_plain(exchange, status), exchange))
    expected = _bytes(again, exchange)
    if expected != exchange.sent:
        raise MessageError(
            f"reply of site {exchange.site}, round {exchange.round}",
            f"{len(exchange.sent)} bytes", f"the {len(expected)} that plan and request explain",
            "Something left the site that nobody accounts for: stop the run and look into it.",
        )  # fmt: skip
    form = len(exchange.sent) - values - masks - envelope
    return Accounted(len(exchange.sent), values, masks, form, envelope, status, found)


def _check_secure(exchange: Exchange, message: bytes) -> None:
    """A message of secure aggregation has its fields and nothing more; its parsers are canonical.

    Raises:
        MessageError: it is something else, or one peer's shares are longer than another's.
    """
    parsed = SECURE_STEPS[exchange.kind].from_bytes(message)
    lengths = {len(c) for c in parsed.ciphertexts if c} if isinstance(parsed, Sharing) else set()
    if parsed.to_bytes() != message or len(lengths) > 1:
        raise MessageError(
            f"reply of site {exchange.site}, {exchange.kind}", f"{len(message)} bytes",
            "the fields of that message, and shares of one length",
            "Something left the site that nobody accounts for: stop the run and look into it.",
        )  # fmt: skip


def why_not(exchange: Exchange, schema: tuple[TensorSpec, ...]) -> str | None:
    """What is wrong with a reply; None if every byte is accounted for."""
    try:
        account_for(exchange, schema)
    except FedgraftError as error:
        return str(error)
    except Exception as error:  # bytes that are no message at all
        return f"reply of site {exchange.site}, round {exchange.round}: {error!r}"
    return None


def _plain(exchange: Exchange, status: Status) -> Message:
    """The reply without tensors or counts."""
    if exchange.kind in SECURE_STEPS:
        return write_secure(exchange.request, exchange.round, status)
    write = write_counts if exchange.kind == EVALUATE else write_reply
    return write(exchange.request, exchange.round, status)


def _bytes(message: Message, exchange: Exchange) -> bytes:
    """The bytes of a reply that mirrors its request and knows no clock."""
    message.metadata.ttl = exchange.request.metadata.ttl
    message.metadata.__dict__["_created_at"] = exchange.request.metadata.created_at
    wire: bytes = message_to_proto(message).SerializeToString()
    return wire
