"""A reply as one object, and what a site might put in its place."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.app.message import make_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.app.metadata import Metadata
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from hypothesis import given
from hypothesis import strategies as st

from fedgraft_common.errors import MessageError
from fedgraft_common.inflation import MessageLimits
from fedgraft_common.messages import Status, to_record, write_reply
from fedgraft_common.packing import pack
from fedgraft_common.parcel import LARGEST, is_parcel, unwrap, wrap

LIMITS = MessageLimits()
METADATA = Metadata(
    run_id=7, message_id="", src_node_id=1, dst_node_id=2, reply_to_message_id="",
    group_id="", created_at=1e9, ttl=1e9, message_type="train",
)  # fmt: skip
REQUEST = make_message(metadata=METADATA, content=RecordDict())


def reply(values: int = 3) -> Message:
    return write_reply(REQUEST, 1, Status.OK, pack(to_record({"a": torch.ones(values)})))


def test_what_goes_in_comes_out() -> None:
    sent = reply()
    content = wrap(sent)
    assert content is not None
    validate_object_content(content)  # what the SuperLink asks of an object
    assert is_parcel(content)
    found = unwrap("name", content, LIMITS)
    assert found.content == sent.content
    assert found.metadata.message_id == "name"
    for fact in ("run_id", "src_node_id", "dst_node_id", "reply_to_message_id", "ttl"):
        assert getattr(found.metadata, fact) == getattr(sent.metadata, fact)


def test_equal_answers_of_two_sites_have_different_names() -> None:
    """The SuperLink takes a name once."""
    first, second = reply(), reply()
    second.metadata.__dict__["_src_node_id"] = first.metadata.src_node_id + 1
    names = {get_object_id(wrap(sent) or b"") for sent in (first, second)}
    assert len(names) == 2


def test_a_large_one_is_left_to_flower() -> None:
    assert wrap(reply(LARGEST // 4 - 1000)) is not None
    assert wrap(reply(LARGEST // 4)) is None


def test_flowers_own_objects_are_not_taken_for_parcels() -> None:
    assert not is_parcel(reply().deflate())
    assert not is_parcel(reply().content.array_records["adapter"]["package"].deflate())


@given(st.binary(max_size=200))
def test_anything_else_is_one_error(content: bytes) -> None:
    try:
        unwrap("name", ArrayChunk(memoryview(content)).deflate(), LIMITS)
    except MessageError as error:
        assert "a message as Flower builds them" in str(error)


def test_a_parcel_of_a_million_arrays_is_not_opened() -> None:
    many = write_reply(REQUEST, 1, Status.OK, to_record({str(n): torch.ones(1) for n in range(9)}))
    content = wrap(many)
    assert content is not None
    with pytest.raises(MessageError, match="a message as Flower builds them"):
        unwrap("name", content, MessageLimits(objects=8))
    assert len(unwrap("name", content, MessageLimits(objects=20)).content["adapter"]) == 9
