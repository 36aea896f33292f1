"""Small messages whose content travels inside their announcement.

Flower announces a message by its metadata and the names of its objects, and moves each object in a
call of its own, on both sides. What it keeps of the announcement has room for the content itself,
and it hands that back as it came; so a small message needs no further call.

An announcement must name one object at least, its message's own. Here that is a place holder, a few
bytes that say nothing. It is kept as long as its run and can be announced again and again: the
SuperLink then asks for no object, and nothing has to be deleted.
"""

from __future__ import annotations

from typing import Final

from flwr.app import Message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict
from flwr.supercore.inflatable.inflatable_object import get_object_id

from fedgraft_common.inflation import MessageLimits, malformed, too_large

SMALL: Final = 64 * 1024
"""Bytes of a content that travels so at most: the SuperLink reads and writes it anew each time."""


def place_holder(text: str) -> tuple[str, bytes]:
    """Name and content of the object that a message is announced by.

    Args:
        text: another one for each message that is on its way at the same time.

    Returns:
        A SHA-256 in hex, and Flower's serialisation of an `ArrayChunk` that holds the text.
    """
    content = ArrayChunk(memoryview(text.encode())).deflate()
    return get_object_id(content), content


def announce(message: Message, name: str) -> ProtoMessage | None:
    """The announcement of a message, content and all; None if that would be too large.

    Args:
        message: gets the name as its id.
        name: of its place holder.
    """
    message.metadata.__dict__["_message_id"] = name
    announced = message_to_proto(message)
    return announced if announced.ByteSize() <= SMALL else None


def is_inline(announced: ProtoMessage) -> bool:
    """Whether an announcement holds its message's content."""
    return bool(announced.content.items)


def opened(announced: ProtoMessage, limits: MessageLimits, most: int = SMALL) -> Message:
    """The message in an announcement.

    Args:
        announced: holds its content.
        limits: what the message may be.
        most: bytes of it.

    Raises:
        MessageError: it is malformed, too large, or has too many pieces.
    """
    if announced.ByteSize() > min(most, limits.bytes):
        raise too_large(limits)
    try:
        pieces = sum(1 + _entries(item) for item in announced.content.items)
        if pieces > limits.objects:
            raise ValueError(f"{pieces} pieces")
        return message_from_proto(announced)
    except Exception as error:  # Flower's readers raise whatever protobuf, str and dict do
        raise malformed(type(error).__name__) from None


def _entries(item: RecordDict.Item) -> int:
    records = (item.array_record, item.metric_record, item.config_record)
    return sum(len(record.items) for record in records)
