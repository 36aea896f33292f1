from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedgraft_simulations.local_grid import LocalGrid, local_context

SITES = 3


class Sites:
    """Notes who was asked, and says so in the reply."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.app = ClientApp()

        @self.app.train()
        def train(message: Message, context: Context) -> Message:
            site = int(context.node_config["partition-id"])
            self.asked.append(site)
            visits = int(str(context.state.config_records.get("x", ConfigRecord()).get("n", 0)))
            context.state["x"] = ConfigRecord({"n": visits + 1})
            facts = ConfigRecord({"site": site, "visits": visits + 1})
            return Message(RecordDict({"facts": facts}), reply_to=message)


def messages(grid: LocalGrid) -> list[Message]:
    return [
        grid.create_message(RecordDict(), "train", node, group_id="1")
        for node in grid.get_node_ids()
    ]


def fact(reply: Message, name: str) -> object:
    return reply.content.config_records["facts"][name]


def test_every_site_answers_once_from_its_own_node() -> None:
    sites, told = Sites(), list[int]()
    grid = LocalGrid(sites.app, SITES, told.append)
    replies = list(grid.send_and_receive(messages(grid), timeout=1.0))
    assert sites.asked == told == [0, 1, 2]
    assert [(r.metadata.src_node_id, fact(r, "site")) for r in replies] == [(1, 0), (2, 1), (3, 2)]


def test_only_the_addressed_sites_are_asked() -> None:
    sites = Sites()
    grid = LocalGrid(sites.app, SITES)
    list(grid.send_and_receive(messages(grid)[1:2]))
    assert sites.asked == [1]


def test_contexts_are_those_of_flower_s_simulation() -> None:
    context = local_context(2, 5)
    assert dict(context.node_config) == {"partition-id": 2, "num-partitions": 5}
    assert context.node_id == 3
    assert not context.state


def test_a_site_keeps_its_context_and_shares_it_with_nobody() -> None:
    grid = LocalGrid(Sites().app, SITES)
    visits = [
        [fact(reply, "visits") for reply in grid.send_and_receive(messages(grid))] for _ in range(3)
    ]
    assert visits == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]


def test_a_reply_is_handed_out_once() -> None:
    grid = LocalGrid(Sites().app, SITES)
    ids = list(grid.push_messages(messages(grid)))
    assert len(set(ids)) == SITES
    first = list(grid.pull_messages(ids[:1]))
    assert [r.metadata.reply_to_message_id for r in first] == ids[:1]
    assert len(list(grid.pull_messages(ids))) == SITES - 1
    assert list(grid.pull_messages(ids)) == []
    assert list(grid.pull_messages(["never sent"])) == []


def test_message_ids_are_new_in_every_round() -> None:
    grid = LocalGrid(Sites().app, SITES)
    first, second = (list(grid.push_messages(messages(grid))) for _ in range(2))
    assert not set(first) & set(second)
    assert len(list(grid.pull_messages(first + second))) == 2 * SITES


def test_what_a_site_raises_is_not_hidden() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise RuntimeError("a bug in the site")

    grid = LocalGrid(app, SITES)
    with pytest.raises(RuntimeError, match="a bug in the site"):
        list(grid.send_and_receive(messages(grid)))
