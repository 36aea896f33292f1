"""Requests on their way to sites, in one call where a site can read that.

Flower pushes each object of a message in a call of its own, and each site pulls each of them. Whose
reply came inside its announcement (`fedgraft_common.inline`) can read such a message: it gets the
next small request so. All others, a stock SuperNode among them, get Flower's objects; and so does
everyone who gets a large adapter, which all sites then share.

A place holder stands for one request after the other to the same site, and a reply names its
request by it. So each request has a group id of its own, which a reply repeats: one to an earlier
request, sent once more because a connection broke, is not taken for one to the present request.

`tests/unit/server/test_requests.py` pins every name used here to flwr 1.41.
"""

from __future__ import annotations

import logging
import secrets
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, TypeVar

import httpx
from flwr.app import Message
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.superlink.grid import HttpGrid

from fedgraft_common.inline import SMALL, announce, place_holder

log = logging.getLogger(__name__)
T = TypeVar("T")
_TOKEN: Final = 16  # bytes of what no other process and no other request has


class Requests:
    """Sends requests through the grid that Flower gives to a ServerApp.

    Args:
        grid: Flower's `HttpGrid`; any other grid is given the messages as they are.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._free: dict[int, list[tuple[str, bytes]]] = defaultdict(list)
        self._sent: dict[str, tuple[Message, bytes]] = {}  # by place holder, which is its content

    def push(self, messages: Sequence[Message], able: Collection[int]) -> list[str]:
        """Hands messages to the SuperLink.

        Args:
            messages: to sites.
            able: nodes that can read a message in its announcement.

        Returns:
            The id of each message, empty where the SuperLink took none.
        """
        announced: dict[int, ProtoMessage] = {}
        if isinstance(self._grid, HttpGrid):
            for place, message in enumerate(messages):
                is_able = message.metadata.dst_node_id in able and _is_small(message)
                if is_able and (one := self._announced(message)) is not None:
                    announced[place] = one
        plain = [message for place, message in enumerate(messages) if place not in announced]
        ids = iter(_taken(self._grid.push_messages, plain))
        inline = list(announced.values())
        names = _taken(self._push, inline)
        self.forget({m.metadata.message_id for m in inline} - set(names))
        sent = iter(names)
        return [next(sent) if place in announced else next(ids) for place in range(len(messages))]

    def settle(self, reply: Message) -> bool:
        """Whether this is the reply to the request it names; its place holder is then free.

        Where the SuperLink made an error of it, it may still have the request: that place holder is
        not used again.
        """
        name = reply.metadata.reply_to_message_id
        if name not in self._sent:
            return True  # that one went the other way
        request, content = self._sent.pop(name)
        if reply.metadata.group_id != request.metadata.group_id:
            return False
        if not reply.has_error():
            self._free[request.metadata.dst_node_id].append((name, content))
        return True

    def forget(self, ids: Collection[str]) -> None:
        """Nobody waits for a reply to these any more; their place holders are not used again."""
        for name in ids:
            self._sent.pop(name, None)

    def _announced(self, message: Message) -> ProtoMessage | None:
        free = self._free[message.metadata.dst_node_id]
        name, content = free.pop() if free else place_holder(secrets.token_hex(_TOKEN))
        message.metadata.__dict__["_group_id"] = secrets.token_hex(_TOKEN)
        announced = announce(message, name)
        if announced is None:
            free.append((name, content))
        else:
            self._sent[name] = message, content
        return announced

    def _push(self, announced: Sequence[ProtoMessage]) -> list[str]:
        grid = self._grid
        assert isinstance(grid, HttpGrid)  # noqa: S101 - nothing is announced to another
        names = [message.metadata.message_id for message in announced]
        response = grid._runtime_client.PushMessages(
            PushAppMessagesRequest(
                messages_list=announced,
                message_object_trees=[ObjectTree(object_id=name) for name in names],
            )
        )
        wanted = set(response.objects_to_push)
        for name in names:
            if name in wanted:  # nobody reads it; if it is not stored, it is wanted again
                grid._runtime_client.PushObject(
                    PushObjectRequest(
                        node=grid.node,
                        run_id=grid.run.run_id,
                        object_id=name,
                        object_content=self._sent[name][1],
                        session_id=response.session_id,
                    )
                )
        return list(response.message_ids)


def _taken(push: Callable[[list[T]], Iterable[str]], messages: list[T]) -> list[str]:
    """Their ids; empty ones if the SuperLink broke off, so that the sites are asked again.

    All messages of a call share what a SuperLink notes about pieces that are still to come, and a
    site that names a piece of the run's in its reply makes it forget that.
    """
    try:
        return list(push(messages)) if messages else []
    except (ObjectPushError, httpx.HTTPStatusError) as error:
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
            raise  # the run is over, say
        log.warning("requests were not taken: %s", error, extra={"action": "lost"})
        return [""] * len(messages)


def _is_small(message: Message) -> bool:
    arrays = (
        array for record in message.content.array_records.values() for array in record.values()
    )
    return sum(len(array.data) for array in arrays) <= SMALL
