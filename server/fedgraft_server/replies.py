"""Replies as they arrive, object by object; knows Flower's Runtime calls, as `requests` does.

A SuperLink announces a reply before its objects are there. Flower's own `pull_messages` then waits
a second before it looks again, and as long as it takes (up to hours) before it hands over the other
replies; one site that died while it sent would hold up the round. Here a reply that is not complete
is looked at again the next time, and nobody waits for it.

Flower repeats a call that found no SuperLink until there is one. What the SuperLink had answered to
the call that was lost, it counts as delivered: a reply that was in that answer never comes again by
itself. So whoever asks here is told when a call was repeated, and asks the sites once more.

`tests/unit/server/test_replies.py` pins every name used here to flwr 1.41.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from flwr.app import Message
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.retry import RetryInvoker, RetryState, exponential
from flwr.superlink.grid import HttpGrid

from fedgraft_common.errors import MessageError
from fedgraft_common.inflation import (
    MessageLimits,
    inflate_message,
    malformed,
    object_names,
    too_large,
)
from fedgraft_common.inline import is_inline, opened
from fedgraft_common.parcel import is_parcel, unwrap

log = logging.getLogger(__name__)

_RETRY: Final = 2  # seconds between two attempts to reach the SuperLink at most


@dataclass(slots=True)
class Arriving:
    """A reply that was announced.

    Attributes:
        announced: who answers what, as the SuperLink knows it; without the content.
        missing: objects that are not here yet, leaves first.
        contents: those that are.
        room: bytes that may still come.
    """

    announced: Message
    missing: list[str]
    room: int
    contents: dict[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def reply_to(self) -> str:
        """Id of the request it answers."""
        return self.announced.metadata.reply_to_message_id

    @property
    def node(self) -> int:
        """Who sent it."""
        return self.announced.metadata.src_node_id


class Replies:
    """Collects replies through the grid that Flower gives to a ServerApp.

    Args:
        grid: Flower's `HttpGrid`; any other grid is asked through its public `pull_messages`.
        limits: what one reply may be.

    Attributes:
        able: nodes whose replies came in their announcements: they can read such a request.
    """

    def __init__(self, grid: Grid, limits: MessageLimits | None = None) -> None:
        self._grid = grid
        self._limits = limits or MessageLimits()
        self.able: set[int] = set()
        self._arriving: dict[str, Arriving] = {}
        self._inline: list[Message] = []
        self._interrupted = False
        self._complete_ones: list[str] = []  # whose objects the SuperLink may delete
        if isinstance(grid, HttpGrid):
            self._watch(grid._retry_invoker)

    def was_interrupted(self) -> bool:
        """Whether the SuperLink was away for a moment since the last question."""
        found, self._interrupted = self._interrupted, False
        return found

    def collect(self, request_ids: Collection[str]) -> list[Message]:
        """The replies to these requests that are complete by now; each is returned once.

        A malformed one is returned without its content: its site has answered, and that was all.
        """
        if not isinstance(self._grid, HttpGrid):
            return list(self._grid.pull_messages(request_ids))
        for name in [n for n, a in self._arriving.items() if a.reply_to not in request_ids]:
            del self._arriving[name]  # its round is over
        announced = {arriving.reply_to for arriving in self._arriving.values()}
        if awaited := [name for name in request_ids if name not in announced]:
            self._announce(self._grid, awaited)
        inline, self._inline = self._inline, []
        return inline + [
            reply
            for name, arriving in list(self._arriving.items())
            if (reply := self._complete(self._grid, name, arriving)) is not None
        ]

    def forget(self, node: int) -> None:
        """Drops what a node had begun to send: it has restarted."""
        for name, arriving in list(self._arriving.items()):
            if arriving.node == node:
                del self._arriving[name]

    def tidy(self) -> None:
        """Lets the SuperLink delete what has come; call it when nobody waits for this process."""
        while self._complete_ones and isinstance(self._grid, HttpGrid):
            self._grid._runtime_client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(
                    node=self._grid.node,
                    run_id=self._grid.run.run_id,
                    message_object_id=self._complete_ones.pop(),
                )
            )

    def _watch(self, retry: RetryInvoker) -> None:
        """Notes when a call was repeated; and repeats soon: the SuperLink is on this machine."""
        on_success = retry.on_success

        def note(state: RetryState) -> None:
            if state.tries > 1:
                self._interrupted = True
            if on_success is not None:
                on_success(state)

        retry.on_success = note
        retry.wait_gen_factory = partial(exponential, max_delay=_RETRY)

    def _announce(self, grid: HttpGrid, request_ids: list[str]) -> None:
        response = grid._runtime_client.PullMessages(
            PullAppMessagesRequest(message_ids=request_ids)
        )
        for message, tree in zip(
            response.messages_list, response.message_object_trees, strict=True
        ):
            if is_inline(message):
                self._inline.append(self._opened(message))
                continue
            announced = message_from_proto(message)
            try:
                names = object_names(tree, self._limits)
            except MessageError:
                names = []  # then it has no content
            arriving = Arriving(announced, names, self._limits.bytes)
            self._arriving[message.metadata.message_id] = arriving

    def _opened(self, message: ProtoMessage) -> Message:
        node = message.metadata.src_node_id
        try:
            reply = opened(message, self._limits)
        except MessageError as error:
            log.warning("%s", error, extra={"action": "refuse", "site": node})
            message.ClearField("content")
            message.content.SetInParent()
            return message_from_proto(message)
        self.able.add(node)
        return reply

    def _complete(self, grid: HttpGrid, name: str, arriving: Arriving) -> Message | None:
        client, run = grid._runtime_client, grid.run.run_id
        while arriving.missing:
            part = arriving.missing[0]
            response = client.PullObject(
                PullObjectRequest(node=grid.node, run_id=run, object_id=part)
            )
            if response.object_found and not response.object_available:
                return None
            if not response.object_found or get_object_id(response.object_content) != part:
                facts = {"action": "lost", "site": arriving.node}
                log.warning("a reply was lost on the way", extra=facts)
                del self._arriving[name]
                return None
            arriving.contents[part] = response.object_content
            arriving.room -= len(response.object_content)
            del arriving.missing[0]
            if arriving.room < 0:
                arriving.contents.clear()
                arriving.missing.clear()
        self._complete_ones.append(name)
        del self._arriving[name]
        try:
            return self._inflated(name, arriving)
        except MessageError as error:
            log.warning("%s", error, extra={"action": "refuse", "site": arriving.node})
            return arriving.announced

    def _inflated(self, name: str, arriving: Arriving) -> Message:
        if arriving.room < 0:
            raise too_large(self._limits)
        own = arriving.contents.get(name, b"")
        if is_parcel(own):
            reply = unwrap(name, own, self._limits)
        else:
            reply = inflate_message(name, arriving.contents, self._limits)
        # A site writes what is inside; whom it comes from, gateway and SuperLink have checked.
        for fact in ("src_node_id", "reply_to_message_id", "run_id"):
            if getattr(reply.metadata, fact) != getattr(arriving.announced.metadata, fact):
                raise malformed(f"another {fact} than it was announced with")
        return reply
