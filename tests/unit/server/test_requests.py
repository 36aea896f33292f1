"""Requests in their announcements, and as Flower's, through a Runtime API in memory."""

from __future__ import annotations

import inspect
from typing import Any

import httpx
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree, PushObjectResponse
from flwr.proto.runtime_pb2 import PushAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedgraft_common.inflation import MessageLimits
from fedgraft_common.inline import SMALL, is_inline, opened
from fedgraft_common.messages import to_record
from fedgraft_common.packing import pack
from fedgraft_server.requests import Requests


class Api:
    """The calls that a request needs of a SuperLink."""

    def __init__(self) -> None:
        self.trees: dict[int, ObjectTree] = {}
        self.announced: dict[int, ProtoMessage] = {}
        self.sent: list[Message] = []
        self.objects: dict[str, bytes] = {}
        self.refused: set[int] = set()
        self.is_forgetful = False
        self.broken: Exception | None = None

    def PushMessages(self, request: Any) -> PushAppMessagesResponse:  # noqa: N802
        if self.broken is not None:
            raise self.broken
        ids, wanted = [], []
        for message, tree in zip(request.messages_list, request.message_object_trees, strict=True):
            node = message.metadata.dst_node_id
            ids.append("" if node in self.refused else message.metadata.message_id)
            if node not in self.refused:
                self.trees[node] = tree
                self.announced[node] = message
                self.sent.append(message_from_proto(message))
                names = [part.object_id for part in iterate_object_tree(tree)]
                wanted += [name for name in names if name not in self.objects]
        return PushAppMessagesResponse(message_ids=ids, objects_to_push=wanted, session_id="s")

    def PushObject(self, request: Any) -> PushObjectResponse:  # noqa: N802
        assert (request.session_id, request.run_id) == ("s", 1)
        if self.is_forgetful:
            return PushObjectResponse(stored=False)
        self.objects[request.object_id] = request.object_content
        return PushObjectResponse(stored=True)


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def requests(api: Api) -> Requests:
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    grid = HttpGrid(token="t")  # noqa: S106
    grid.set_run(Run.create_empty(1))
    grid._client = api  # type: ignore[assignment]
    return Requests(grid)


def messages(count: int, values: int = 4) -> list[Message]:
    adapter = pack(to_record({"a": torch.ones(values)}))
    plan = ConfigRecord({"plan": "{}", "round": 1})
    return [
        Message(RecordDict({"adapter": adapter, "plan": plan}), node, "train")
        for node in range(2, 2 + count)
    ]


def test_flower_has_what_is_used_here() -> None:
    for call in ("PushMessages", "PushObject"):
        assert list(inspect.signature(getattr(RuntimeHttpClient, call)).parameters) == [
            "self", "request"
        ]  # fmt: skip
    assert issubclass(ObjectPushError, Exception)


def reply_to(request: Message) -> Message:
    return Message(RecordDict({"status": ConfigRecord({"status": "ok"})}), reply_to=request)


def test_who_can_read_announcements_gets_one(api: Api, requests: Requests) -> None:
    sent = messages(4)
    ids = requests.push(sent, able={3, 5})
    assert ids == [message.metadata.message_id for message in sent]
    assert len(set(ids)) == 4
    for message, name in zip(sent, ids, strict=True):
        node = message.metadata.dst_node_id
        tree = api.trees[node]
        assert tree.object_id == name
        assert is_inline(api.announced[node]) == (node in (3, 5)) != bool(tree.children)
        if node in (3, 5):
            found = opened(api.announced[node], MessageLimits())
            assert found.content == message.content
            assert (found.metadata.dst_node_id, found.metadata.run_id) == (node, 1)
            assert len(api.objects[name]) < 200


def test_a_place_holder_is_used_again_when_its_reply_has_come(api: Api, requests: Requests) -> None:
    names = [requests.push(messages(1), able={2})[0]]
    first = reply_to(api.sent[-1])
    assert requests.settle(first)
    names += requests.push(messages(1), able={2})
    second = reply_to(api.sent[-1])
    assert not requests.settle(first)  # it came again: its request is another one now
    names += requests.push(messages(1), able={2})
    assert requests.settle(reply_to(api.sent[-1]))
    assert names[0] == names[1] != names[2]
    assert first.metadata.group_id != second.metadata.group_id
    assert len(api.objects) == 2  # each place holder was pushed once


def test_a_place_holder_whose_request_may_still_be_there_is_not_used_again(
    api: Api, requests: Requests
) -> None:
    names = [requests.push(messages(1), able={2})[0]]
    assert requests.settle(Message(Error(1, "node is not available"), reply_to=api.sent[-1]))
    names += requests.push(messages(1), able={2})
    requests.forget(names)
    names += requests.push(messages(1), able={2})
    api.refused = {2}
    requests.push(messages(1), able={2})
    api.refused = set()
    names += requests.push(messages(1), able={2})
    assert len(set(names)) == 4
    assert requests._sent.keys() == set(names[-2:])


def test_requests_that_went_another_way_are_settled_by_any_reply(requests: Requests) -> None:
    sent = messages(1)
    requests.push(sent, able=set())
    assert requests.settle(reply_to(sent[0]))


def test_a_large_request_is_shared(api: Api, requests: Requests) -> None:
    requests.push(messages(3, values=SMALL // 4 + 1), able={2, 3, 4})
    assert all(tree.children for tree in api.trees.values())
    assert len(api.objects) == 3 + 5  # three messages, and what they share


def test_a_message_that_was_not_taken_has_no_id(api: Api, requests: Requests) -> None:
    api.refused = {3}
    first, second, third = requests.push(messages(3), able={2, 3})
    assert first
    assert not second
    assert third


def test_a_superlink_that_forgets_a_push_does_not_end_the_run(api: Api, requests: Requests) -> None:
    """A site whose reply names an object of the run's makes it forget."""
    api.is_forgetful = True
    assert requests.push(messages(2), able=set()) == ["", ""]
    announced = requests.push(messages(2), able={2, 3})
    assert all(announced)  # nobody reads a place holder
    waiting = dict(requests._sent)
    api.broken = status_error(500)
    assert requests.push(messages(2), able={2}) == ["", ""]
    assert requests._sent == waiting


def test_a_superlink_that_refuses_a_run_ends_it(api: Api, requests: Requests) -> None:
    api.broken = status_error(403)
    with pytest.raises(httpx.HTTPStatusError):
        requests.push(messages(1), able={2})


def status_error(status: int) -> httpx.HTTPStatusError:
    answer = httpx.Response(status, request=httpx.Request("POST", "https://superlink"))
    return httpx.HTTPStatusError(str(status), request=answer.request, response=answer)
