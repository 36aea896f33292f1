"""A request put together from its ends, since its own form says the rest.

Flower moves each object of a message in a call of its own. A request has six or seven, but only the
leaves of their tree and its root hold anything that a site cannot know: the chunk with the packed
adapter, the configurations, the metadata. How they hang together is fixed by `messages` and
`packing`. So a site takes the ends and builds the message; it is the announced one exactly if its
name is, a SHA-256 over the names of everything in it. Flower's own SuperNode, which knows nothing
of this, finds all the objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedgraft_common.inflation import MessageLimits
from fedgraft_common.messages import ADAPTER, COUNTS, MESSAGE, PLAN, SECURE, STATUS
from fedgraft_common.packing import package

Record = ArrayRecord | ConfigRecord | MetricRecord

_ORDER: Final[tuple[str, ...]] = (ADAPTER, COUNTS, PLAN, SECURE, STATUS)
_PLACES: Final = {PLAN: PLAN, STATUS: STATUS, MESSAGE: SECURE}
"""Where a configuration with such a key belongs."""


def ends_of(tree: ObjectTree) -> list[str]:
    """Names of the objects that hold no other, each once, and of the message's own."""
    leaves = [part.object_id for part in iterate_object_tree(tree) if not part.children]
    return list(dict.fromkeys([*leaves, tree.object_id]))


def rebuild(name: str, ends: Mapping[str, bytes], limits: MessageLimits) -> Message | None:
    """The message of that name; None if it is of another form, or its ends are others.

    Args:
        name: SHA-256 of the message's own object.
        ends: contents of that object and of the leaves, by their SHA-256.
        limits: what it may be.
    """
    records: dict[str, Record] = {}
    try:
        for leaf, content in ends.items():
            if leaf == name:
                continue
            found = inflate_object_from_contents(leaf, {leaf: content})
            if not isinstance(found, ArrayChunk) and len(content) > limits.description:
                return None
            place, record = _placed(found)
            if place in records:
                return None
            records[place] = record
        own = ProtoMessage.FromString(get_object_body(ends[name], Message))
        ordered = {place: records[place] for place in _ORDER if place in records}
        message = make_message(
            metadata=metadata_from_proto(own.metadata), content=RecordDict(ordered)
        )
        if message.object_id != name:
            return None
    except Exception:  # Flower's readers raise whatever their json, str and dict do
        return None
    message.metadata.__dict__["_message_id"] = name
    return message


def _placed(leaf: InflatableObject) -> tuple[str, Record]:
    """What a leaf stands for, and its place in a message."""
    if isinstance(leaf, ArrayChunk):
        return ADAPTER, package(bytes(leaf.data))
    if isinstance(leaf, ArrayRecord):
        return ADAPTER, leaf
    if isinstance(leaf, ConfigRecord):
        return next((place for key, place in _PLACES.items() if key in leaf), SECURE), leaf
    if isinstance(leaf, MetricRecord):
        return COUNTS, leaf
    raise TypeError(type(leaf))
