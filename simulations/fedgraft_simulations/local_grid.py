"""A Flower Grid inside one process: a message is a function call.

`LocalGrid` stands where Flower's SuperLink and SuperNodes stand in production. The ClientApp and
the ServerApp on either side of it are the production ones; nothing is serialised on the way but
the arrays, which Flower's records hold as bytes anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1


class LocalGrid(Grid):
    """Carries messages to `count` sites in this process, one after the other.

    Args:
        app: answers for every site; a site's Context has its number as `partition-id`.
        count: sites; node k + 1 is site k.
        on_reply: called with a site's number after each of its replies.
        lost: whether a message never arrives; its site does not answer.
    """

    def __init__(
        self,
        app: ClientApp,
        count: int,
        on_reply: Callable[[int], None] = lambda _: None,
        lost: Callable[[Message], bool] = lambda _: False,
    ) -> None:
        TaskIdentity.run_id = TaskIdentity.task_id = RUN_ID
        TaskIdentity.node_id = 0
        self._app = app
        self._on_reply = on_reply
        self._lost = lost
        self._contexts = {site + 1: local_context(site, count) for site in range(count)}
        self._replies: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: Run) -> None:
        """A LocalGrid serves one run; there is nothing to set."""

    @property
    def run(self) -> Run:
        """The only run."""
        return Run.create_empty(RUN_ID)

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
        """One id per site."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Delivers messages and collects the replies at once."""
        ids = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = f"message-{self._sent}"
            node = message.metadata.dst_node_id
            ids.append(message.metadata.message_id)
            if self._lost(message):
                continue
            self._replies[message.metadata.message_id] = self._app(message, self._contexts[node])
            self._on_reply(node - 1)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages; each is handed out once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Delivers messages and returns the replies; calls cannot be late."""
        return self.pull_messages(self.push_messages(messages))


def local_context(site: int, count: int) -> Context:
    """The Context Flower's simulation would give a site."""
    config = UserConfig({"partition-id": site, "num-partitions": count})
    return Context(RUN_ID, site + 1, config, RecordDict(), UserConfig())
