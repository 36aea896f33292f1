"""The egress guard: the last step before anything leaves a site.

It knows nothing of training. It compares an outgoing reply with what the plan allows and with
what the ledger has committed, byte for byte, and fails closed: whatever it was not told to let
through does not leave.

    reply    adapter   the plan's tensors: names, shapes, float32 (masked: unsigned integers),
                       finite, exact bytes; their SHA-256 is the one of the ledger's commit. Empty
                       unless the status is ok.
             status    {round: the round asked for, status: a word of the closed list}
    counts   {correct, total}: two finite numbers that the ledger committed, in place of the
             adapter, in answer to a request for an evaluation
    secure   message   bytes that the ledger wrote down as a message of secure aggregation
    metadata the request's own numbers, mirrored; no name, no error text, no time of the site
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from flwr.app import ArrayRecord, Message, RecordDict

from fedgraft_common.errors import EgressError, FedgraftError
from fedgraft_common.messages import (
    ADAPTER,
    COUNTS,
    ROUND,
    SECURE,
    STATUS,
    Counts,
    Status,
    TensorSpec,
    digest,
    from_record,
    read_counts,
    read_secure,
)
from fedgraft_common.packing import PACKAGE, is_packed, pack, unpack

MAXIMUM_BYTES = 2**31
"""Largest adapter that may leave, in bytes of its tensors; Flower's messages end there too."""


def guard(
    reply: Message,
    request: Message,
    number: int,
    schema: tuple[TensorSpec, ...] = (),
    committed: str | None = None,
) -> Message:
    """Lets a reply pass, or stops it.

    Args:
        reply: what is about to leave.
        request: what it answers.
        number: the round that was asked for; 0 if the request had none.
        schema: the tensors that the plan calls for; empty if none may leave.
        committed: SHA-256 of the reply that the ledger holds for this plan and round; None if
            there is none.

    Returns:
        The same reply.

    Raises:
        EgressError: it holds anything else.
    """
    word = _status(reply, request, number, ADAPTER)
    adapter = reply.content.array_records.get(ADAPTER)
    if adapter is None:
        raise _stopped("reply", "records of another kind", "arrays and configuration")
    if word != Status.OK:
        if len(adapter):
            raise _stopped(ADAPTER, f"{len(adapter)} tensors", f"none with status {word}")
        return reply
    if sum(spec.bytes for spec in schema) > MAXIMUM_BYTES or not schema:
        raise _stopped(
            ADAPTER, f"{len(schema)} tensors", f"some, of at most {MAXIMUM_BYTES} bytes together"
        )
    try:
        from_record(adapter, schema)
    except FedgraftError as error:
        raise _stopped(error.field, error.value, error.allowed) from None
    if list(adapter) != sorted(adapter):
        raise _stopped(ADAPTER, "tensors in another order", "tensors in the order of their names")
    found = digest(adapter)
    if committed is None or found != committed:
        raise _stopped(
            "SHA-256 of the adapter", found[:16],
            f"{committed[:16]}, the ledger's" if committed else "one that the ledger committed",
        )  # fmt: skip
    return reply


def guard_counts(
    reply: Message, request: Message, number: int, committed: str | None = None
) -> Message:
    """The same for a released evaluation.

    Raises:
        EgressError: it holds anything but a status and the two counts that were committed.
    """
    word = _status(reply, request, number, COUNTS)
    counts = reply.content.metric_records.get(COUNTS)
    if counts is None:
        raise _stopped("reply", "records of another kind", "counts and configuration")
    if word != Status.OK:
        if len(counts):
            raise _stopped(COUNTS, f"{len(counts)} numbers", f"none with status {word}")
        return reply
    try:
        found = digest_counts(read_counts(counts))
    except FedgraftError as error:
        raise _stopped(error.field, error.value, error.allowed) from None
    if committed is None or found != committed:
        raise _stopped("counts", found[:16], "those that the ledger committed")
    return reply


def guard_secure(
    reply: Message,
    request: Message,
    number: int,
    committed: Callable[[str], bool] = lambda _: False,
) -> Message:
    """The same for a step of secure aggregation: public keys, or shares of secrets of masks.

    What is in such a message is a function of the site's keys and of random secrets, never of a
    record; it leaves only as the ledger has written it down.

    Args:
        reply: what is about to leave.
        request: what it answers.
        number: the round that was asked for.
        committed: whether the ledger holds a message with this SHA-256.

    Raises:
        EgressError: it holds anything but a status and such a message.
    """
    word = _status(reply, request, number, SECURE)
    record = reply.content.config_records.get(SECURE)
    if record is None:
        raise _stopped("reply", "records of another kind", "two configurations")
    if word != Status.OK:
        if len(record):
            raise _stopped(SECURE, f"{len(record)} entries", f"none with status {word}")
        return reply
    try:
        message = read_secure(record)
    except FedgraftError as error:
        raise _stopped(error.field, error.value, error.allowed) from None
    found = hashlib.sha256(message).hexdigest()
    if len(message) > MAXIMUM_BYTES or not committed(found):
        raise _stopped(SECURE, found[:16], "a message that the ledger holds")
    return reply


def guard_package(package: ArrayRecord, passed: ArrayRecord) -> ArrayRecord:
    """Lets the package of a guarded record pass: the same tensors, and not a byte more.

    Raises:
        EgressError: it holds anything else.
    """
    if not passed:
        same = not package
    else:
        inside = unpack(package) if is_packed(package) else ArrayRecord()
        same = (
            digest(inside) == digest(passed) and package[PACKAGE].data == pack(inside)[PACKAGE].data
        )
    if not same:
        raise _stopped("packed adapter", "other bytes", "the adapter that passed the guard")
    return package


def digest_counts(counts: Counts) -> str:
    """SHA-256 of two counts, in hexadecimal."""
    return hashlib.sha256(f"{counts.correct!r} {counts.total!r}".encode()).hexdigest()


def _mirror(reply: Message, request: Message) -> None:
    """Metadata holds the request's own values, and no clock of the site's.

    Raises:
        EgressError: anything else.
    """
    mine, theirs = reply.metadata, request.metadata
    mirrored = {
        "run_id": (mine.run_id, theirs.run_id),
        "src_node_id": (mine.src_node_id, theirs.dst_node_id),
        "dst_node_id": (mine.dst_node_id, theirs.src_node_id),
        "reply_to_message_id": (mine.reply_to_message_id, theirs.message_id),
        "group_id": (mine.group_id, theirs.group_id),
        "message_type": (mine.message_type, theirs.message_type),
        "message_id": (mine.message_id, ""),
    }
    for name, (found, allowed) in mirrored.items():
        if type(found) is not type(allowed) or found != allowed:
            raise _stopped(f"metadata.{name}", repr(found), repr(allowed))
    mine.ttl = theirs.ttl
    mine.__dict__["_created_at"] = theirs.created_at  # when the site was done is its own affair


def _status(reply: Message, request: Message, number: int, payload: str) -> str:
    """Checks everything but the payload.

    Returns:
        The status.
    """
    if reply.has_error() or not reply.has_content():
        raise _stopped("reply", "an error or nothing", "records")
    _mirror(reply, request)
    content = reply.content
    if type(content) is not RecordDict or sorted(content) != sorted((payload, STATUS)):
        raise _stopped("reply", sorted(content), f"{payload!r} and {STATUS!r}")
    config = content.config_records.get(STATUS)
    if config is None:
        raise _stopped("reply", "records of another kind", "a configuration")
    if sorted(config) != sorted((ROUND, STATUS)):
        raise _stopped(STATUS, sorted(config), f"{ROUND!r} and {STATUS!r}")
    answered, word = config[ROUND], config[STATUS]
    if type(answered) is not int or answered != number:
        raise _stopped(f"{STATUS}.{ROUND}", repr(answered), str(number))
    if type(word) is not str or word not in {status.value for status in Status}:
        raise _stopped(f"{STATUS}.{STATUS}", repr(word), ", ".join(Status))
    return word


def _stopped(field: str, value: object, allowed: str) -> EgressError:
    return EgressError(
        f"egress: {field}", value, allowed,
        "Nothing left the site. This is a fault of the program or an attack on it: keep the log "
        "and report it.",
    )  # fmt: skip
