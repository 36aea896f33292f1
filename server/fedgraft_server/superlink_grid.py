"""The grid of a real run: the plan's sites, their replies as they arrive, and a deadline.

Flower's grid looks for replies every three seconds and addresses whoever is connected. This one
looks when the gateway says that a reply came, and more often while replies are expected, addresses
the sites of the run and nobody else, and asks a site again that went away with its request: a site
answers the same request with the same bytes, so asking twice costs neither privacy nor work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedgraft_common.errors import MessageError
from fedgraft_common.messages import ADAPTER, SecureStep
from fedgraft_common.packing import is_packed, pack, unpack
from fedgraft_server.bell import LISTEN, Bells
from fedgraft_server.replies import Replies
from fedgraft_server.requests import Requests

log = logging.getLogger(__name__)
ONLINE: Final = "online"
QUICK: Final = frozenset((SecureStep.UNMASK.message_type,))
"""Types of messages whose replies take no training, and where enough replies are all there is to
wait for. In a set-up every site counts."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How often the server looks and how long it waits, in seconds.

    Attributes:
        poll: between two looks for replies in the first seconds of a round.
        idle: between two looks at most.
        heard: between two looks, where a gateway rings when a reply came.
        gather: between two looks at least, where it rings and several sites owe replies: one look
            takes them all, and costs the SuperLink as much as a reply does.
        share: part of the time since the last reply that may pass between two looks.
        census: between two looks at which sites are connected.
        again: after which a connected site whose request was lost is asked again.
        absence: how long a round that has enough replies waits for sites that are not connected.
        linger: how long at least an exchange that has enough replies waits for sites that are
            connected and silent: where a reply takes no training, and for sites that let an
            earlier exchange come to its deadline.
    """

    poll: float = 0.05
    idle: float = 2.0
    heard: float = 0.5
    gather: float = 0.03
    share: float = 0.01
    census: float = 2.0
    again: float = 5.0
    absence: float = 60.0
    linger: float = 2.0

    def look(self, quiet: float, has_bell: bool = False) -> float:
        """Seconds until the next look, when nothing came for `quiet` seconds."""
        return min(max(self.share * quiet, self.heard if has_bell else self.poll), self.idle)


@dataclass(slots=True)
class Asked:
    """A site that owes a reply in this round.

    Attributes:
        message: what it was sent.
        ids: the request's ids, one for each time it was sent.
        activation: when the site had last connected, as it was sent; empty if it had not.
        attempts: how often it was sent.
        sent: clock at the last attempt.
        lost: whether the request or its reply is gone, or may be.
    """

    message: Message
    ids: set[str] = field(default_factory=set)
    activation: str = ""
    attempts: int = 0
    sent: float = 0.0
    lost: bool = False


class SuperlinkGrid(Grid):
    """Carries messages to the sites of a run through a SuperLink.

    Args:
        grid: what Flower hands to a ServerApp.
        sites: node ids of the run's sites.
        enough: replies that make a round worth finishing without absent sites.
        patience: how often it looks and how long it waits.
        clock: monotonic seconds.
        sleep: waits.
        on_reply: told about each reply, once.
        names: of sites, by node id; learned as they connect.
        bells: between the gateway and the runs of this server, if there is a gateway.
    """

    def __init__(
        self,
        grid: Grid,
        sites: Collection[int],
        enough: int = 1,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        on_reply: Callable[[Message], None] = lambda _: None,
        names: dict[int, str] | None = None,
        bells: Bells | None = None,
    ) -> None:
        self._grid = grid
        self._bells = bells
        self._names = {} if names is None else names
        self._on_reply = on_reply
        self._sites = frozenset(sites)
        self._enough = enough
        self._patience = patience or Patience()
        self._clock = clock
        self._sleep = sleep
        self._requests = Requests(grid)
        self._replies = Replies(grid)
        self._connected: dict[int, str] = {}
        self._looked = float("-inf")  # clock at the last look at who is connected
        self._away: set[int] = set()  # sites that a round went on without; until they are back
        self._silent: set[int] = set()  # connected, and yet waited for in vain; until they reply

    def set_run(self, run: Run) -> None:
        """Flower has set the run of the grid inside."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to one site."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The run's sites in order, connected or not: one that connects later is asked then."""
        return sorted(self._sites)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """What the SuperLink knows about those that are connected."""
        ours = [node for node in self._grid.get_nodes() if node.node_id in self._sites]
        self._names.update((node.node_id, node.name) for node in ours if node.name)
        return [node for node in ours if node.status in ("", ONLINE)]

    def wait_for_sites(self, timeout: float) -> int:
        """Waits until every site is connected, or the time is over.

        Returns:
            How many are connected.
        """
        end = self._clock() + timeout
        while (count := len(list(self.get_nodes()))) < len(self._sites) and self._clock() < end:
            self._sleep(min(self._patience.census, max(end - self._clock(), 0.0)))
        return count

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hands messages to the SuperLink, adapters packed; an id is None where it took none.

        Raises:
            MessageError: a message is for a site that is not part of the run.
        """
        batch = list(messages)
        for message in batch:
            if message.metadata.dst_node_id not in self._sites:
                raise MessageError(
                    "destination", message.metadata.dst_node_id, "a site of the run",
                    "Name the site in the run, or leave it alone.",
                )  # fmt: skip
        _pack(batch)
        names = self._requests.push(batch, self._replies.able) if batch else []
        if self._bells is not None:
            self._bells.asked.ring()
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The complete replies to these messages, adapters unpacked."""
        return [_unpacked(reply) for reply in self._replies.collect(set(message_ids))]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Delivers messages and returns the replies of this round."""
        return list(self.receive(messages, timeout, self._on_reply))

    def receive(
        self,
        messages: Iterable[Message],
        timeout: float | None = None,
        on_reply: Callable[[Message], None] = lambda _: None,
    ) -> Iterator[Message]:
        """Delivers messages and yields each reply when it arrives, at most one per site.

        It ends when every site has replied, at the deadline, or when enough have replied and the
        others have not been connected for a while. A site that one round has waited for in vain is
        not waited for in the next ones, until it is connected again. One that is connected and
        silent is waited for as long again as the others took, if it was silent before or if a
        reply takes no training. A message expires at the deadline: a site that comes back later
        does not spend privacy on a round that is over.

        Args:
            messages: at most one per site.
            timeout: seconds until the deadline; None waits for everyone.
            on_reply: told about each reply, before it is yielded.
        """
        start = self._clock()
        end = float("inf") if timeout is None else start + timeout
        owing = {message.metadata.dst_node_id: Asked(message) for message in messages}
        connected = self._census()
        rung = self._rung()
        self._ask(owing, connected, end)
        self._replies.tidy()
        if rung > 0:  # nobody has replied yet
            self._rest(min(self._patience.heard, max(end - self._clock(), 0.0)), rung)
        replied = 0
        heard = seen = start  # last reply; last time that a site which owes one was connected
        had_enough = float("inf")  # clock at the reply that made it enough
        is_quick = all(a.message.metadata.message_type in QUICK for a in owing.values())
        while owing:
            if rung > 0 and len(owing) > 1:
                self._sleep(min(self._patience.gather, max(end - self._clock(), 0.0)))
            rung = self._rung()
            for reply in self.pull_messages({name for a in owing.values() for name in a.ids}):
                node = self._accept(reply, owing)
                if node is None:
                    continue
                self._requests.forget(owing.pop(node).ids)
                replied, heard = replied + 1, self._clock()
                self._silent.discard(node)
                if replied == self._enough:
                    had_enough = heard
                on_reply(reply)
                yield reply
            now = self._clock()
            if self._replies.was_interrupted():
                for asked in owing.values():
                    asked.lost = True
            if now - self._looked >= self._patience.census:
                connected = self._census()
                self._ask(_lost(owing, connected, now - self._patience.again), connected, end)
            if owing.keys() & connected.keys():
                seen = now
            gone = owing.keys() <= self._away or now - seen >= self._patience.absence
            if not owing or now >= end or (gone and replied >= self._enough):
                break
            patience = max(self._patience.linger, had_enough - start)
            if (is_quick or owing.keys() <= self._away | self._silent) and (
                now - had_enough >= patience
            ):
                break
            pause = self._patience.look(now - heard, has_bell=rung > 0)
            self._rest(min(pause, max(end - now, 0.0)), rung)
        self._requests.forget({name for asked in owing.values() for name in asked.ids})
        if owing:
            self._away |= owing.keys() - connected.keys()
            if self._clock() >= end:
                self._silent |= owing.keys() & connected.keys()
            log.warning("no reply from nodes %s", sorted(owing), extra={"action": "deadline"})

    def _rung(self) -> int:
        return 0 if self._bells is None else self._bells.answered.rung()

    def _rest(self, seconds: float, rung: int) -> None:
        """Sleeps, or until the bell that was heard before is rung again."""
        if self._bells is None:
            self._sleep(seconds)
            return
        end = self._clock() + seconds
        while self._rung() == rung and (left := end - self._clock()) > 0:
            self._sleep(min(left, LISTEN))

    def _census(self) -> dict[int, str]:
        """When each connected site had last connected; as of a moment ago."""
        if self._clock() - self._looked >= self._patience.census:
            self._looked = self._clock()
            self._connected = {n.node_id: n.last_activated_at for n in self.get_nodes()}
            self._away -= self._connected.keys()
        return self._connected

    def _ask(self, owing: dict[int, Asked], connected: dict[int, str], end: float) -> None:
        """Sends every request of `owing`; each copy expires at the deadline."""
        left = end - self._clock()
        if not owing or left <= 0:
            return
        for node, asked in owing.items():
            if asked.attempts:  # perhaps an older daemon is back, which reads no announcements
                self._replies.able.discard(node)
        copies = [_copy(asked.message, left) for asked in owing.values()]
        for (node, asked), name in zip(owing.items(), self.push_messages(copies), strict=True):
            asked.attempts += 1
            if asked.attempts > 1:
                log.info("asking node %d again", node, extra={"action": "resend", "site": node})
                self._replies.forget(node)
            asked.lost = not name
            asked.activation = connected.get(node, "")
            asked.sent = self._clock()
            if name:
                asked.ids.add(name)

    def _accept(self, reply: Message, owing: dict[int, Asked]) -> int | None:
        """The site a reply is from, if that site owes one; a lost request is noted."""
        name = reply.metadata.reply_to_message_id
        node = next((n for n, asked in owing.items() if name in asked.ids), None)
        if node is None:
            return None
        is_settled = self._requests.settle(reply)
        if reply.has_error():  # made by the SuperLink; a site's own failures are statuses
            log.info("lost: %s", reply.error.reason, extra={"action": "lost", "site": node})
            owing[node].lost = True
            owing[node].ids.discard(name)
            return None
        if not is_settled:
            log.info("an earlier reply came again", extra={"action": "lost", "site": node})
            owing[node].lost, owing[node].sent = True, float("-inf")
            owing[node].ids.discard(name)
            return None
        if reply.metadata.src_node_id != node:
            facts = {"action": "refuse", "site": node}
            log.warning("a reply of node %d came from another", node, extra=facts)
            return None
        return node


def _lost(owing: dict[int, Asked], connected: dict[int, str], before: float) -> dict[int, Asked]:
    """Who is to be asked again: connected, and has restarted or lost the request meanwhile."""
    return {
        node: asked
        for node, asked in owing.items()
        if node in connected
        and (connected[node] != asked.activation or (asked.lost and asked.sent <= before))
    }


def _copy(message: Message, seconds: float) -> Message:
    facts: dict[str, Any] = {"group_id": message.metadata.group_id}
    if seconds != float("inf"):
        facts["ttl"] = min(seconds, message.metadata.ttl)
    return Message(
        message.content, message.metadata.dst_node_id, message.metadata.message_type, **facts
    )


def _pack(messages: list[Message]) -> None:
    """Packs the adapters in place; messages that share one share its package."""
    packages: dict[int, ArrayRecord] = {}
    for message in messages:
        adapter = message.content.array_records.get(ADAPTER)
        if adapter is None or is_packed(adapter):
            continue
        package = packages.setdefault(id(adapter), pack(adapter))
        others = {name: part for name, part in message.content.items() if name != ADAPTER}
        message.content = RecordDict({ADAPTER: package, **others})


def _unpacked(reply: Message) -> Message:
    """The reply with its adapter unpacked; a damaged package is left for the schema to refuse."""
    if not reply.has_content():
        return reply
    adapter = reply.content.array_records.get(ADAPTER)
    if adapter is not None and is_packed(adapter):
        try:
            reply.content[ADAPTER] = unpack(adapter)
        except MessageError as error:
            node = reply.metadata.src_node_id
            log.warning("%s", error, extra={"action": "refuse", "site": node})
    return reply
