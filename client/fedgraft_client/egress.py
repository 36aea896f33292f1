"""The egress guard: the last step before anything leaves a site.

It knows nothing of training. It compares an outgoing reply with what the plan allows and with
what the ledger has committed, byte for byte, and fails closed: whatever it was not told to let
through does not leave.

    reply    adapter   the plan's tensors: names, shapes, float32, finite, exact bytes; their
                       SHA-256 is the one of the ledger's commit. Empty unless the status is ok.
             status    {round: the round asked for, status: a word of the closed list}
    metadata the request's own numbers, mirrored; no name, no error text, no time of the site
"""

from __future__ import annotations

from flwr.app import Message, RecordDict

from fedgraft_common.errors import EgressError, FedgraftError
from fedgraft_common.messages import (
    ADAPTER,
    ROUND,
    STATUS,
    Status,
    TensorSpec,
    digest,
    from_record,
)

MAXIMUM_BYTES = 2**31
"""Largest adapter that may leave, in bytes of its tensors; Flower's messages end there too."""


def guard(
    reply: Message, number: int, schema: tuple[TensorSpec, ...] = (), committed: str | None = None
) -> Message:
    """Lets a reply pass, or stops it.

    Args:
        reply: what is about to leave.
        number: the round that was asked for; 0 if the request had none.
        schema: the tensors that the plan calls for; empty if none may leave.
        committed: SHA-256 of the reply that the ledger holds for this plan and round; None if
            there is none.

    Returns:
        The same reply.

    Raises:
        EgressError: it holds anything else.
    """
    if reply.has_error() or not reply.has_content():
        raise _stopped("reply", "an error or nothing", "records")
    content = reply.content
    if type(content) is not RecordDict or sorted(content) != sorted((ADAPTER, STATUS)):
        raise _stopped("reply", sorted(content), f"{ADAPTER!r} and {STATUS!r}")
    adapter = content.array_records.get(ADAPTER)
    config = content.config_records.get(STATUS)
    if adapter is None or config is None:
        raise _stopped("reply", "records of another kind", "arrays and configuration")
    if sorted(config) != sorted((ROUND, STATUS)):
        raise _stopped(STATUS, sorted(config), f"{ROUND!r} and {STATUS!r}")
    answered, word = config[ROUND], config[STATUS]
    if type(answered) is not int or answered != number:
        raise _stopped(f"{STATUS}.{ROUND}", repr(answered), str(number))
    if type(word) is not str or word not in {status.value for status in Status}:
        raise _stopped(f"{STATUS}.{STATUS}", repr(word), ", ".join(Status))
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
    found = digest(adapter)
    if committed is None or found != committed:
        raise _stopped(
            "SHA-256 of the adapter", found[:16],
            f"{committed[:16]}, the ledger's" if committed else "one that the ledger committed",
        )  # fmt: skip
    return reply


def _stopped(field: str, value: object, allowed: str) -> EgressError:
    return EgressError(
        f"egress: {field}", value, allowed,
        "Nothing left the site. This is a fault of the program or an attack on it: keep the log "
        "and report it.",
    )  # fmt: skip
