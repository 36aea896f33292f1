"""A message of Flower's put together from its objects, and what it may grow to.

A message travels as objects that are named by their SHA-256: a record names its arrays, an array
its chunks. What is named twice travels once, so a few bytes may stand for as many gigabytes as
somebody likes. Sizes are therefore counted before anything is put together; both sides do it here,
with the same limits.

`tests/unit/common/test_inflation.py` pins every name used here to flwr 1.41.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from flwr.app import Message
from flwr.app.message import Array
from flwr.app.message.arraychunk import ArrayChunk
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedgraft_common.errors import MessageError

MEBIBYTE: Final = 1024 * 1024
_CHUNK, _ARRAY = ArrayChunk.__qualname__, Array.__qualname__


@dataclass(frozen=True, slots=True)
class MessageLimits:
    """What one message may be.

    Attributes:
        bytes: with everything in it, as it travels and put together.
        objects: pieces of it.
        description: bytes of a piece that is no chunk of an array: names, a plan, a status.
    """

    bytes: int = 1024 * MEBIBYTE
    objects: int = 20_000
    description: int = 4 * MEBIBYTE


def object_names(tree: ObjectTree, limits: MessageLimits) -> list[str]:
    """Names of a message's objects, leaves first, each once.

    Raises:
        MessageError: too many.
    """
    names = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
    if len(names) > limits.objects:
        raise MessageError(
            "message", f"{len(names)} objects", f"at most {limits.objects}",
            "The message was ignored; compare the versions of server and site.",
        )  # fmt: skip
    return names


def inflate_message(name: str, contents: Mapping[str, bytes], limits: MessageLimits) -> Message:
    """The message `name`.

    Args:
        name: of the message's own object.
        contents: every object by its SHA-256, which is not checked here.
        limits: what it may be.

    Raises:
        MessageError: it is no message of Flower's, or too large.
    """
    try:
        size = _size(contents, limits)
        if size > limits.bytes:
            raise too_large(limits)
        message = inflate_object_from_contents(name, dict(contents))
    except MessageError:
        raise
    except Exception as error:  # Flower's readers raise whatever their json, str and dict do
        raise malformed(type(error).__name__) from None
    if not isinstance(message, Message):
        raise malformed("an object that is no message")
    message.metadata.__dict__["_message_id"] = name
    return message


def too_large(limits: MessageLimits) -> MessageError:
    """The error for a message beyond the limit."""
    return MessageError(
        "message", "more bytes", f"at most {limits.bytes}",
        "The message was ignored; raise the limit if the plan's adapter is that large.",
    )  # fmt: skip


def malformed(found: str) -> MessageError:
    """The error for a message that Flower would not have sent."""
    return MessageError(
        "message", found, "a message as Flower builds them",
        "The message was ignored; compare the versions of server and site.",
    )  # fmt: skip


def _size(contents: Mapping[str, bytes], limits: MessageLimits) -> int:
    """Bytes of a message when every array has been put together from its chunks."""
    total = 0
    for content in contents.values():
        kind, chunks, _ = get_object_head_values_from_object_content(content)
        if kind == _CHUNK:
            continue
        if len(content) > limits.description:
            raise malformed(f"{kind[:20]} of {len(content)} bytes")
        total += len(content)
        if kind == _ARRAY:
            places = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            total += sum(len(contents[chunks[place]]) for place in places)
    return total
