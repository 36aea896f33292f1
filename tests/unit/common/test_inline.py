"""Messages in their announcements, and what somebody might put there."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from hypothesis import given
from hypothesis import strategies as st

from fedgraft_common.errors import MessageError
from fedgraft_common.inflation import MessageLimits
from fedgraft_common.inline import SMALL, announce, is_inline, opened, place_holder
from fedgraft_common.messages import to_record
from fedgraft_common.packing import pack

LIMITS = MessageLimits()


def message(values: int = 4) -> Message:
    metadata = Metadata(
        run_id=7, message_id="", src_node_id=1, dst_node_id=2, reply_to_message_id="",
        group_id="g", created_at=1e9, ttl=1e9, message_type="train",
    )  # fmt: skip
    adapter = pack(to_record({"a": torch.arange(float(values))}))
    content = RecordDict({"adapter": adapter, "plan": ConfigRecord({"plan": "{}", "round": 1})})
    return make_message(metadata=metadata, content=content)


def announced(values: int = 4) -> ProtoMessage:
    found = announce(message(values), place_holder("a")[0])
    assert found is not None
    return found


def test_a_message_comes_back_as_it_was() -> None:
    sent, name = message(), place_holder("a")[0]
    found = announce(sent, name)
    assert found is not None
    assert is_inline(found)
    received = opened(ProtoMessage.FromString(found.SerializeToString()), LIMITS)
    assert received.content == sent.content
    assert received.metadata == sent.metadata
    assert received.metadata.message_id == name


def test_a_large_message_is_not_announced_so() -> None:
    assert announce(message(SMALL // 4), place_holder("a")[0]) is None
    assert announced(SMALL // 4 - 400).ByteSize() <= SMALL


def test_flower_s_own_announcement_holds_nothing() -> None:
    assert not is_inline(message_to_proto(remove_content_from_message(message())))


@given(st.text(max_size=64))
def test_a_place_holder_is_an_object_that_flower_stores(text: str) -> None:
    name, content = place_holder(text)
    assert name == get_object_id(content)
    validate_object_content(content)


def test_each_text_has_its_own_place_holder() -> None:
    assert len({place_holder(text)[0] for text in ("a", "b", "ab", "")}) == 4


@pytest.mark.parametrize("limits", [MessageLimits(bytes=200), MessageLimits(objects=4)])
def test_more_than_allowed_is_not_opened(limits: MessageLimits) -> None:
    with pytest.raises(MessageError):
        opened(announced(), limits)
    assert opened(announced(), MessageLimits(objects=5))


def test_what_is_larger_than_an_announcement_is_not_opened() -> None:
    large = message_to_proto(message(SMALL // 4))
    with pytest.raises(MessageError):
        opened(large, LIMITS)
    assert opened(large, LIMITS, most=2 * SMALL)


@given(st.data())
def test_damage_is_one_clear_error(data: st.DataObject) -> None:
    """Whatever a byte is changed to: a message, or `MessageError`."""
    content = bytearray(announced().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = ProtoMessage.FromString(bytes(content))
    except Exception:
        return
    try:
        assert isinstance(opened(found, LIMITS), Message)
    except MessageError as error:
        assert str(error).count("found") == 1
