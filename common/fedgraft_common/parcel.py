"""A reply as one object, for the way from a site to its server.

Flower moves a message as six or seven objects, each in a call of its own on both sides. A reply to
our server travels as one: Flower's own serialisation of the whole message, inside one `ArrayChunk`,
because that is what the SuperLink stores as bytes. Its SHA-256 is the message's name, as ever; the
metadata inside make it another one for each reply. A reply too large for one call moves as Flower
moves it.
"""

from __future__ import annotations

from typing import Final

from flwr.app import Message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from fedgraft_common.inflation import MessageLimits, malformed
from fedgraft_common.inline import opened

LARGEST: Final = 4 * 1024 * 1024
"""Bytes of a parcel at most; Flower's own pieces are 5 MiB, and a gateway takes no more than 16."""
_KIND: Final = f"{ArrayChunk.__qualname__} ".encode()


def wrap(message: Message) -> bytes | None:
    """The object that stands for a message; None if it would be too large."""
    content = message_to_proto(message).SerializeToString(deterministic=True)
    return ArrayChunk(memoryview(content)).deflate() if len(content) <= LARGEST else None


def is_parcel(content: bytes) -> bool:
    """Whether a message's own object is a whole message."""
    return content.startswith(_KIND)


def unwrap(name: str, content: bytes, limits: MessageLimits) -> Message:
    """The message in a parcel.

    Args:
        name: the parcel's SHA-256, which is not checked here.
        content: the object.
        limits: what it may be.

    Raises:
        MessageError: there is none in it, or one of too many pieces.
    """
    try:
        found = ProtoMessage.FromString(bytes(ArrayChunk.inflate(content).data))
    except Exception as error:  # Flower's readers raise whatever protobuf, str and dict do
        raise malformed(type(error).__name__) from None
    message = opened(found, limits, limits.bytes)
    message.metadata.__dict__["_message_id"] = name
    return message
