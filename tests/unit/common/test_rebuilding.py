"""Requests from their leaves: the same message, or none."""

from __future__ import annotations

from copy import copy

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedgraft_common.inflation import MessageLimits
from fedgraft_common.messages import to_record
from fedgraft_common.packing import pack
from fedgraft_common.rebuilding import leaves_of, rebuild

LIMITS = MessageLimits()
METADATA = Metadata(
    run_id=7, message_id="", src_node_id=1, dst_node_id=2, reply_to_message_id="",
    group_id="", created_at=1e9, ttl=1e9, message_type="train",
)  # fmt: skip
PLAN = ConfigRecord({"plan": "{}", "round": 3, "signature": "ab"})
ADAPTER = pack(to_record({"a": torch.arange(4.0), "b": torch.ones(2, 2)}))
SECURE = ConfigRecord({"message": b"\x00\x01"})


def request(content: RecordDict) -> Message:
    return make_message(metadata=copy(METADATA), content=content)


def taken_apart(made: Message) -> tuple[str, Metadata, dict[str, bytes]]:
    """Name, announced metadata and leaves."""
    objects = {name: thing.deflate() for name, thing in get_all_nested_objects(made).items()}
    leaves = {name: objects[name] for name in leaves_of(get_object_tree(made))}
    return made.object_id, copy(made.metadata), leaves


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (RecordDict({"adapter": ADAPTER, "plan": PLAN}), 2),
        (RecordDict({"adapter": ADAPTER, "plan": PLAN, "secure": SECURE}), 3),
        (RecordDict({"adapter": ArrayRecord(), "plan": PLAN, "secure": SECURE}), 3),
    ],
)
def test_every_request_comes_back_from_its_leaves(content: RecordDict, count: int) -> None:
    made = request(content)
    name, announced, leaves = taken_apart(made)
    assert len(leaves) == count < len(get_all_nested_objects(made))
    announced.delivered_at = "2026-01-01T00:00:00+00:00"  # as the SuperLink notes
    found = rebuild(name, announced, leaves, LIMITS)
    assert found is not None
    assert found.content == content
    assert found.metadata.message_id == name


def test_other_leaves_or_metadata_give_nothing() -> None:
    """What a dishonest server announces cannot become another message than the one it names."""
    name, announced, leaves = taken_apart(request(RecordDict({"adapter": ADAPTER, "plan": PLAN})))
    assert rebuild("0" * 64, announced, leaves, LIMITS) is None
    for number, (leaf, content) in enumerate(leaves.items()):
        others = dict(leaves)
        others[leaf] = content[:-1] + bytes([content[-1] ^ 1])
        assert rebuild(name, announced, others, LIMITS) is None
        del others[leaf]
        assert rebuild(name, announced, others, LIMITS) is None
        assert number < 2
    announced.message_type = "evaluate"
    assert rebuild(name, announced, leaves, LIMITS) is None


def test_another_form_gives_nothing() -> None:
    tensors = to_record({"a": torch.zeros(2), "b": torch.ones(3)})
    strange = ConfigRecord({"x": 1})
    for content in (
        RecordDict({"adapter": tensors, "plan": PLAN}),
        RecordDict({"plan": PLAN, "adapter": ADAPTER}),
        RecordDict({"adapter": ADAPTER, "plan": PLAN, "other": strange}),
    ):
        name, announced, leaves = taken_apart(request(content))
        assert rebuild(name, announced, leaves, LIMITS) is None
    long = RecordDict({"adapter": ADAPTER, "plan": PLAN})
    name, announced, leaves = taken_apart(request(long))
    assert rebuild(name, announced, leaves, MessageLimits(description=10)) is None
