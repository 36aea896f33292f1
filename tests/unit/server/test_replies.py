"""Replies object by object, from a Runtime API that exists in memory only."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.retry import RetryState
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedgraft_common.inflation import MessageLimits
from fedgraft_common.inline import announce, place_holder
from fedgraft_common.messages import Status, read_status, to_record, write_reply
from fedgraft_common.packing import pack
from fedgraft_common.parcel import wrap
from fedgraft_server.replies import Replies


class Api:
    """The calls that `Replies` makes of a SuperLink."""

    def __init__(self) -> None:
        self.waiting: dict[str, Message] = {}
        self.objects: dict[str, bytes | None] = {}
        self.confirmed: list[str] = []
        self.asked: list[list[str]] = []

    def arrive(self, request_id: str, node: int, *, complete: bool = True) -> Message:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        request = Message(RecordDict({"plan": ConfigRecord({"n": node})}), node, "train")
        request.metadata.__dict__["_message_id"] = request_id
        reply = write_reply(request, 1, Status.OK, pack(to_record({"a": torch.ones(node)})))
        reply.metadata.__dict__["_message_id"] = reply.object_id
        for name, thing in get_all_nested_objects(reply).items():
            self.objects[name] = thing.deflate() if complete else None
        self.waiting[request_id] = reply
        return reply

    def finish(self, reply: Message) -> None:
        for name, thing in get_all_nested_objects(reply).items():
            self.objects[name] = thing.deflate()

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:  # noqa: N802
        self.asked.append(sorted(request.message_ids))
        found = [self.waiting.pop(n) for n in request.message_ids if n in self.waiting]
        bare = [make_message(metadata=m.metadata, content=RecordDict()) for m in found]
        return PullAppMessagesResponse(
            messages_list=[message_to_proto(m) for m in bare],
            message_object_trees=[get_object_tree(m) for m in found],
        )

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802
        if request.object_id not in self.objects:
            return PullObjectResponse()
        content = self.objects[request.object_id]
        return PullObjectResponse(
            object_found=True, object_available=content is not None, object_content=content or b""
        )

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802
        self.confirmed.append(request.message_object_id)


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def replies(api: Api) -> Replies:
    grid = HttpGrid(token="t")  # noqa: S106
    grid.set_run(Run.create_empty(1))
    grid._client = api  # type: ignore[assignment]
    return Replies(grid)


def test_flower_has_what_is_used_here() -> None:
    grid = HttpGrid(token="t")  # noqa: S106
    assert isinstance(grid.node, Node)
    assert isinstance(inspect.getattr_static(HttpGrid, "_runtime_client"), property)
    for call in ("PullMessages", "PullObject", "ConfirmMessageReceived"):
        assert list(inspect.signature(getattr(RuntimeHttpClient, call)).parameters) == [
            "self", "request"
        ]  # fmt: skip
    retry = grid._retry_invoker
    assert {"on_success", "wait_gen_factory"} <= vars(retry).keys()
    assert "tries" in {f.name for f in dataclasses.fields(RetryState)}


def test_complete_replies_are_handed_over_once(api: Api, replies: Replies) -> None:
    first, second = api.arrive("r1", 3), api.arrive("r2", 4)
    found = replies.collect(["r1", "r2", "r3"])
    assert [m.metadata.src_node_id for m in found] == [3, 4]
    assert found[0].content == first.content
    assert found[1].metadata.message_id == second.object_id
    assert replies.collect(["r3"]) == []
    replies.tidy()
    assert sorted(api.confirmed) == sorted([first.object_id, second.object_id])


def test_nobody_waits_for_a_reply_that_is_still_being_sent(api: Api, replies: Replies) -> None:
    slow = api.arrive("r1", 3, complete=False)
    api.arrive("r2", 4)
    assert [m.metadata.src_node_id for m in replies.collect(["r1", "r2"])] == [4]
    assert replies.collect(["r1"]) == []
    assert api.asked == [["r1", "r2"]]  # an announced reply is not asked for again
    api.finish(slow)
    [found] = replies.collect(["r1"])
    assert found.content == slow.content


def test_a_reply_that_was_lost_or_altered_is_dropped(api: Api, replies: Replies) -> None:
    api.arrive("r1", 3, complete=False)
    altered = api.arrive("r2", 4, complete=False)
    assert replies.collect(["r1", "r2"]) == []
    api.objects.clear()
    api.finish(altered)
    api.objects = dict.fromkeys(api.objects, b"x")
    assert replies.collect(["r1", "r2"]) == []
    assert not api.confirmed


def parcel(api: Api, node: int, **forged: Any) -> Message:
    """A reply to r1 as one object; what it says inside may be another than it is announced with."""
    sent = api.arrive("r1", node)
    for fact, value in forged.items():
        sent.metadata.__dict__["_" + fact] = value
    content = wrap(sent)
    assert content is not None
    name = hashlib.sha256(content).hexdigest()
    sent.metadata.__dict__.update(
        _src_node_id=node, _reply_to_message_id="r1", _run_id=1, _message_id=name
    )  # fmt: skip
    api.objects = {name: content}
    bare = message_to_proto(make_message(metadata=sent.metadata, content=RecordDict()))
    answer_with(api, bare, ObjectTree(object_id=name))
    return sent


def answer_with(api: Api, announced: ProtoMessage, tree: ObjectTree) -> None:
    """What the next question for replies finds."""
    response = PullAppMessagesResponse(messages_list=[announced], message_object_trees=[tree])
    api.PullMessages = lambda request: response  # type: ignore[method-assign]


def test_a_reply_may_come_as_one_object(api: Api, replies: Replies) -> None:
    sent = parcel(api, 3)
    [found] = replies.collect(["r1"])
    assert found.content == sent.content
    assert found.metadata.message_id == sent.metadata.message_id
    assert replies.able == set()


def announced(api: Api, node: int) -> Message:
    """A reply to r1 in its announcement."""
    sent = api.arrive("r1", node)
    name, _ = place_holder("r1")
    announcement = announce(sent, name)
    assert announcement is not None
    api.objects.clear()
    answer_with(api, announcement, ObjectTree(object_id=name))
    return sent


def test_a_reply_may_come_in_its_announcement(api: Api, replies: Replies) -> None:
    sent = announced(api, 3)
    assert replies.able == set()
    [found] = replies.collect(["r1"])
    assert found.content == sent.content
    assert found.metadata == sent.metadata
    assert replies.able == {3}
    replies.tidy()
    assert api.confirmed == []  # nothing to delete


@pytest.mark.parametrize("limits", [MessageLimits(bytes=100), MessageLimits(objects=0)])
def test_a_malformed_announcement_is_an_answer_without_content(
    api: Api, replies: Replies, limits: MessageLimits
) -> None:
    replies._limits = limits
    announced(api, 3)
    [found] = replies.collect(["r1"])
    assert (found.metadata.src_node_id, found.metadata.reply_to_message_id) == (3, "r1")
    assert read_status(found) is Status.FAILED
    assert replies.able == set()


@pytest.mark.parametrize(
    "forged", [{"src_node_id": 4}, {"reply_to_message_id": "r2"}, {"run_id": 9}]
)
def test_a_parcel_says_who_sent_it_as_its_announcement_does(
    api: Api, replies: Replies, forged: dict[str, Any]
) -> None:
    parcel(api, 3, **forged)
    [found] = replies.collect(["r1"])
    assert (found.metadata.src_node_id, found.metadata.reply_to_message_id) == (3, "r1")
    assert read_status(found) is Status.FAILED


@pytest.mark.parametrize("fact", ["src_node_id", "reply_to_message_id"])
def test_nobody_answers_for_somebody_else(api: Api, replies: Replies, fact: str) -> None:
    """What a message says inside is the site's own word; what it was announced with counts."""
    reply = api.arrive("r1", 3)
    honest = reply.object_id
    reply.metadata.__dict__["_" + fact] = {"src_node_id": 4, "reply_to_message_id": "r2"}[fact]
    forged = make_message(metadata=reply.metadata, content=reply.content)
    content = forged.deflate()
    name = hashlib.sha256(content).hexdigest()
    assert name != honest
    api.objects[name] = content
    tree = ObjectTree(object_id=name, children=get_object_tree(reply).children)
    metadata = Metadata(
        run_id=1, message_id=name, src_node_id=3, dst_node_id=1, reply_to_message_id="r1",
        group_id="", created_at=1e9, ttl=1e9, message_type="train",
    )  # fmt: skip
    announced = message_to_proto(make_message(metadata=metadata, content=RecordDict()))
    answer_with(api, announced, tree)
    [found] = replies.collect(["r1"])
    assert (found.metadata.src_node_id, found.metadata.reply_to_message_id) == (3, "r1")
    assert read_status(found) is Status.FAILED
    replies.tidy()
    assert api.confirmed == [name]


@pytest.mark.parametrize(
    "limits", [MessageLimits(bytes=300), MessageLimits(objects=3), MessageLimits(description=20)]
)
def test_a_reply_beyond_the_limits_is_an_answer_without_content(
    api: Api, replies: Replies, limits: MessageLimits, caplog: pytest.LogCaptureFixture
) -> None:
    replies._limits = limits
    api.arrive("r1", 30)
    [found] = replies.collect(["r1"])
    assert found.metadata.src_node_id == 30
    assert read_status(found) is Status.FAILED
    assert replies.collect(["r1"]) == []
    [record] = [vars(r) for r in caplog.records if vars(r).get("action") == "refuse"]
    assert record["site"] == 30
    replies.tidy()
    assert len(api.confirmed) == 1


def test_what_a_restarted_site_had_begun_to_send_is_forgotten(api: Api, replies: Replies) -> None:
    slow = api.arrive("r1", 3, complete=False)
    assert replies.collect(["r1"]) == []
    replies.forget(3)
    api.finish(slow)
    assert replies.collect([]) == []


def test_a_call_that_was_repeated_is_noted_once(api: Api) -> None:
    """Flower's own retries, with a SuperLink that is away for two calls."""
    grid = HttpGrid(token="t")  # noqa: S106
    replies = Replies(grid)
    retry = grid._retry_invoker
    waits: list[float] = []
    retry.wait_function, retry.jitter = waits.append, None
    away = [httpx.ConnectError("away")] * 4
    assert retry.invoke(lambda: "answer") == "answer"
    assert not replies.was_interrupted()

    def call() -> str:
        if away:
            raise away.pop()
        return "answer"

    assert retry.invoke(call) == "answer"
    assert replies.was_interrupted()
    assert not replies.was_interrupted()
    assert waits == [1, 2, 2, 2]


def test_other_grids_are_asked_in_public() -> None:
    grid: Any = SimpleNamespace(pull_messages=lambda ids: [f"reply to {i}" for i in ids])
    found: list[Any] = list(Replies(grid).collect(["r1"]))
    assert found == ["reply to r1"]
