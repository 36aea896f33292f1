"""Requests from their ends: the same message, or none."""

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
from fedgraft_common.rebuilding import ends_of, rebuild

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


def taken_apart(made: Message) -> tuple[str, dict[str, bytes]]:
    """Name and ends."""
    objects = {name: thing.deflate() for name, thing in get_all_nested_objects(made).items()}
    return made.object_id, {name: objects[name] for name in ends_of(get_object_tree(made))}


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (RecordDict({"adapter": ADAPTER, "plan": PLAN}), 3),
        (RecordDict({"adapter": ADAPTER, "plan": PLAN, "secure": SECURE}), 4),
        (RecordDict({"adapter": ArrayRecord(), "plan": PLAN, "secure": SECURE}), 4),
    ],
)
def test_every_request_comes_back_from_its_ends(content: RecordDict, count: int) -> None:
    made = request(content)
    made.metadata.__dict__["_src_task_id"] = 3  # which the SuperLink does not announce
    name, ends = taken_apart(made)
    assert len(ends) == count < len(get_all_nested_objects(made))
    found = rebuild(name, ends, LIMITS)
    assert found is not None
    assert found.content == content
    assert found.metadata.src_task_id == 3
    assert found.metadata.message_id == name


def test_other_ends_give_nothing() -> None:
    """What a dishonest server announces cannot become another message than the one it names."""
    name, ends = taken_apart(request(RecordDict({"adapter": ADAPTER, "plan": PLAN})))
    assert rebuild("0" * 64, {**ends, "0" * 64: ends[name]}, LIMITS) is None
    for end, content in ends.items():
        others = dict(ends)
        others[end] = content[:-1] + bytes([content[-1] ^ 1])
        assert rebuild(name, others, LIMITS) is None
        del others[end]
        assert rebuild(name, others, LIMITS) is None


def test_another_form_gives_nothing() -> None:
    tensors = to_record({"a": torch.zeros(2), "b": torch.ones(3)})
    strange = ConfigRecord({"x": 1})
    for content in (
        RecordDict({"adapter": tensors, "plan": PLAN}),
        RecordDict({"plan": PLAN, "adapter": ADAPTER}),
        RecordDict({"adapter": ADAPTER, "plan": PLAN, "other": strange}),
    ):
        assert rebuild(*taken_apart(request(content)), LIMITS) is None
    name, ends = taken_apart(request(RecordDict({"adapter": ADAPTER, "plan": PLAN})))
    assert rebuild(name, ends, MessageLimits(description=10)) is None
