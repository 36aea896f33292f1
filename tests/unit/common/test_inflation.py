"""Messages put together from objects: what Flower does, and must not be made to do."""

from __future__ import annotations

import hashlib
import inspect
import json

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import Array, make_message
from flwr.app.metadata import Metadata
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedgraft_common.errors import MessageError
from fedgraft_common.inflation import MessageLimits, inflate_message, object_names
from fedgraft_common.messages import to_record

LIMITS = MessageLimits()


def message(values: int = 4) -> Message:
    metadata = Metadata(
        run_id=7, message_id="", src_node_id=1, dst_node_id=2, reply_to_message_id="",
        group_id="", created_at=1e9, ttl=1e9, message_type="train",
    )  # fmt: skip
    adapter = to_record({"a": torch.zeros(values), "b": torch.ones(2, 2)})
    return make_message(
        metadata=metadata, content=RecordDict({"adapter": adapter, "plan": ConfigRecord({"n": 1})})
    )


def objects_of(made: Message) -> dict[str, bytes]:
    return {name: thing.deflate() for name, thing in get_all_nested_objects(made).items()}


def test_flower_has_what_is_used_here() -> None:
    assert list(inspect.signature(inflate_object_from_contents).parameters)[:2] == [
        "object_id", "object_contents"
    ]  # fmt: skip
    made = to_record({"a": torch.zeros(3)})["a"]
    kind, chunks, length = get_object_head_values_from_object_content(made.deflate())
    assert (kind, len(chunks)) == ("Array", 1)
    body = get_object_body(made.deflate(), Array)
    assert len(body) == length
    assert json.loads(body)["arraychunk_ids"] == [0]


def test_a_message_comes_back() -> None:
    made = message()
    name = made.object_id
    found = inflate_message(name, objects_of(made), LIMITS)
    assert found.content == made.content
    assert found.metadata.message_id == name
    names = object_names(get_object_tree(made), LIMITS)
    assert set(names) == set(objects_of(made))
    assert names[-1] == name


def bomb(times: int) -> tuple[str, dict[str, bytes]]:
    """One chunk that an array names so many times."""
    made = message(values=10_000)
    contents = objects_of(made)
    small = next(c for c in contents.values() if b'"shape": [10000]' in c)
    large = small.replace(b'"arraychunk_ids": [0]', b'"arraychunk_ids": [' + b"0, " * times + b"0]")
    renamed: dict[str, str] = {}
    old = hashlib.sha256(small).hexdigest()
    new = hashlib.sha256(large).hexdigest()
    contents[new] = large
    del contents[old]
    root = made.object_id
    while True:
        renamed[old] = new
        parent = next((n for n, c in contents.items() if old.encode() in c), None)
        if parent is None:
            return renamed[root], contents
        content = contents.pop(parent).replace(old.encode(), new.encode())
        old, new = parent, hashlib.sha256(content).hexdigest()
        contents[new] = content


def test_a_small_message_cannot_become_a_huge_one() -> None:
    name, contents = bomb(times=100)
    found = inflate_message(name, contents, LIMITS)
    assert len(found.content.array_records["adapter"]["a"].data) > 100 * 40_000
    limits = MessageLimits(bytes=4_000_000)
    assert sum(map(len, contents.values())) < limits.bytes
    with pytest.raises(MessageError, match="found 'more bytes'; allowed: at most 4000000"):
        inflate_message(name, contents, limits)


def test_names_and_plans_are_short() -> None:
    made = message()
    limits = MessageLimits(description=100)
    with pytest.raises(MessageError, match=r"found '\w+ of \d+ bytes'; allowed: a message as"):
        inflate_message(made.object_id, objects_of(made), limits)
    with pytest.raises(MessageError, match="objects'; allowed: at most 3"):
        object_names(get_object_tree(made), MessageLimits(objects=3))


def test_anything_else_is_one_error() -> None:
    made = message()
    contents = objects_of(made)
    record = next(n for n, c in contents.items() if c.startswith(b"RecordDict"))
    for name, given in (
        (record, contents),
        ("nothing", contents),
        (made.object_id, {made.object_id: contents[made.object_id]}),
        (made.object_id, {made.object_id: b"rubbish"}),
        (made.object_id, contents | {made.object_id: b"Message  3\x00abc"}),
    ):
        with pytest.raises(MessageError, match="allowed: a message as Flower builds them"):
            inflate_message(name, given, LIMITS)
