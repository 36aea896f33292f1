"""Requests on their way to sites, each as one object where a site can read that.

Flower pushes each object of a message in a call of its own, and each site pulls each of them. Whose
reply came as a parcel (`fedgraft_common.parcel`) can open one: it gets the next small request as
one. All others, a stock SuperNode among them, get Flower's objects; and so does everyone who gets a
large adapter, which all sites then share.

`tests/unit/server/test_requests.py` pins every name used here to flwr 1.41.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import push_object_contents_from_iterable
from flwr.superlink.grid import HttpGrid

from fedgraft_common.parcel import wrap

SMALL: Final = 64 * 1024
"""Bytes of a request that is worth sending to each site anew."""


class Requests:
    """Sends requests through the grid that Flower gives to a ServerApp.

    Args:
        grid: Flower's `HttpGrid`; any other grid is given the messages as they are.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def push(self, messages: Sequence[Message], able: Collection[int]) -> list[str]:
        """Hands messages to the SuperLink.

        Args:
            messages: to sites.
            able: nodes that can open parcels.

        Returns:
            The id of each message, empty where the SuperLink took none.
        """
        parcels: dict[int, bytes] = {}
        if isinstance(self._grid, HttpGrid):
            for place, message in enumerate(messages):
                if message.metadata.dst_node_id in able and _is_small(message):
                    parcels[place] = wrap(message) or b""
        plain = [message for place, message in enumerate(messages) if place not in parcels]
        ids = iter(self._grid.push_messages(plain) if plain else ())
        sent = iter(self._push(self._grid, [(messages[p], c) for p, c in parcels.items()]))
        return [next(sent) if place in parcels else next(ids) for place in range(len(messages))]

    def _push(self, grid: Grid, parcels: Sequence[tuple[Message, bytes]]) -> list[str]:
        if not parcels or not isinstance(grid, HttpGrid):
            return []
        contents: dict[str, bytes] = {}
        for message, content in parcels:
            name = get_object_id(content)
            message.metadata.__dict__["_message_id"] = name
            contents[name] = content
        response = grid._runtime_client.PushMessages(
            PushAppMessagesRequest(
                messages_list=[
                    message_to_proto(remove_content_from_message(message)) for message, _ in parcels
                ],
                message_object_trees=[ObjectTree(object_id=name) for name in contents],
            )
        )
        wanted = set(response.objects_to_push)
        push_object_contents_from_iterable(
            [(name, content) for name, content in contents.items() if name in wanted],
            make_push_object_fn_protobuf(
                push_object_protobuf=grid._runtime_client.PushObject,
                node=grid.node,
                run_id=grid.run.run_id,
                session_id=response.session_id,
            ),
        )
        return list(response.message_ids)


def _is_small(message: Message) -> bool:
    arrays = (
        array for record in message.content.array_records.values() for array in record.values()
    )
    return sum(len(array.data) for array in arrays) <= SMALL
