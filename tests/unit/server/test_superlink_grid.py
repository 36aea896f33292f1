"""Rounds over a grid that is a list of sites in memory, with a clock to match."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedgraft_common.errors import MessageError
from fedgraft_common.messages import (
    Status,
    TensorSpec,
    from_record,
    read_status,
    to_record,
    write_reply,
)
from fedgraft_common.packing import is_packed, pack, unpack
from fedgraft_server.superlink_grid import Patience, SuperlinkGrid

ADAPTER = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
SCHEMA = (TensorSpec("a", (3,)), TensorSpec("b", (2, 2)))


class Node:
    """A site behind the SuperLink: answers `delay` seconds after it was asked."""

    def __init__(self, delay: float = 0.0, offline: tuple[float, float] | None = None) -> None:
        self.delay = delay
        self.offline = offline  # while it is away, what it was sent is lost
        self.seen: list[Message] = []


class Superlink(Grid):
    """Flower's part: keeps messages and says who is connected."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        self.nodes = nodes
        self.now = 0.0
        self.slept: list[float] = []
        self.due: dict[str, tuple[float, Message]] = {}
        self.pulled: list[set[str]] = []
        self.rejects: set[int] = set()
        self.stranger = False
        TaskIdentity.run_id = TaskIdentity.task_id = 1
        TaskIdentity.node_id = 1

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, *_: object, **__: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterator[NodeInfo]:
        for number, node in self.nodes.items():
            start, end = node.offline or (0.0, 0.0)
            if not start <= self.now < end:
                since = str(end) if node.offline and self.now >= end else "0"
                yield NodeInfo(node_id=number, status="online", last_activated_at=since)

    def push_messages(self, messages: Iterable[Message]) -> list[Any]:
        ids: list[str | None] = []
        for message in messages:
            number = message.metadata.dst_node_id
            node = self.nodes[number]
            if number in self.rejects:
                ids.append(None)
                continue
            name = f"{number}-{len(node.seen)}"
            message.metadata.__dict__["_message_id"] = name
            node.seen.append(message)
            start, end = node.offline or (0.0, 0.0)
            if start <= self.now < end:
                error = Message(Error(5, "node is not available"), reply_to=message)
                self.due[name] = (self.now, error)
            elif not (node.offline and self.now < start <= self.now + node.delay):
                reply = write_reply(message, 1, Status.OK, pack(to_record(ADAPTER)))
                if self.stranger:
                    reply.metadata.__dict__["_src_node_id"] = 99
                self.due[name] = (self.now + node.delay, reply)
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = set(message_ids)
        self.pulled.append(wanted)
        ready = [name for name in sorted(wanted) if self.due.get(name, (1e9,))[0] <= self.now]
        return [self.due.pop(name)[1] for name in ready]

    def send_and_receive(self, *_: object, **__: object) -> Iterable[Message]:
        raise AssertionError("Flower's own loop sleeps three seconds")


def grid_over(link: Superlink, sites: set[int] | None = None, **options: Any) -> SuperlinkGrid:
    return SuperlinkGrid(
        link, sites or set(link.nodes), clock=lambda: link.now, sleep=link.sleep, **options
    )


def requests(grid: SuperlinkGrid, kind: str = "train") -> list[Message]:
    content = RecordDict({"adapter": to_record(ADAPTER), "plan": ConfigRecord({"round": 1})})
    return [Message(content, node, kind) for node in grid.get_node_ids()]


def nodes_of(replies: Iterable[Message]) -> list[int]:
    return [reply.metadata.src_node_id for reply in replies]


def test_replies_come_as_they_arrive_and_the_round_ends_with_the_last() -> None:
    link = Superlink({1: Node(2.0), 2: Node(0.5), 3: Node(8.0)})
    grid = grid_over(link)
    told: list[int] = []
    arrived = []
    for reply in grid.receive(requests(grid), 100.0, lambda r: told.append(r.metadata.src_node_id)):
        arrived.append((reply.metadata.src_node_id, link.now))
        assert read_status(reply) is Status.OK
        found = from_record(reply.content.array_records["adapter"], SCHEMA)
        assert all(torch.equal(found[n], t) for n, t in ADAPTER.items())
    assert told == [node for node, _ in arrived] == [2, 1, 3]
    assert [time for _, time in arrived] == pytest.approx([0.5, 2.0, 8.0], abs=0.2)
    assert link.now < 8.2


def test_looks_are_close_together_at_first() -> None:
    patience = Patience(poll=0.05, idle=2.0, share=0.01)
    assert patience.look(0.0) == patience.look(5.0) == 0.05
    assert patience.look(60.0) == pytest.approx(0.6)
    assert patience.look(1e5) == 2.0
    link = Superlink({1: Node(1000.0)})
    grid = grid_over(link)
    list(grid.send_and_receive(requests(grid), timeout=2000.0))
    assert link.now <= 1002.0
    assert len(link.slept) < 2000


class Ringing:
    """A bell that is rung when a reply is due, on the grid's clock."""

    def __init__(self, link: Superlink) -> None:
        self.link = link
        self.answered = self.asked = self

    def rung(self) -> int:
        return 1 + sum(node.delay <= self.link.now for node in self.link.nodes.values())

    def ring(self) -> None: ...


def test_with_a_bell_it_looks_when_replies_have_come_and_takes_several_at_once() -> None:
    link = Superlink({1: Node(0.1), 2: Node(0.11), 3: Node(0.12), 4: Node(0.4)})
    bells: Any = Ringing(link)
    grid = grid_over(link, bells=bells)
    assert nodes_of(grid.receive(requests(grid))) == [1, 2, 3, 4]
    assert len(link.pulled) == 2
    assert link.now < 0.42


def test_adapters_travel_packed_and_once() -> None:
    link = Superlink({1: Node(), 2: Node()})
    grid = grid_over(link)
    list(grid.send_and_receive(requests(grid)))
    sent = [node.seen[0].content.array_records["adapter"] for node in link.nodes.values()]
    assert all(is_packed(record) for record in sent)
    assert sent[0] is sent[1]
    found = from_record(unpack(sent[0]), SCHEMA)
    assert np.array_equal(found["a"].numpy(), [0, 1, 2])
    assert link.nodes[1].seen[0].content.config_records["plan"] == {"round": 1}


def test_only_the_run_s_sites_are_addressed() -> None:
    link = Superlink({1: Node(), 2: Node(), 3: Node()})
    grid = grid_over(link, {3, 1})
    assert list(grid.get_node_ids()) == [1, 3]
    assert [node.node_id for node in grid.get_nodes()] == [1, 3]
    with pytest.raises(MessageError, match=r"destination: found 2; allowed: a site of the run"):
        grid.push_messages([Message(RecordDict(), 2, "train")])
    assert not link.nodes[2].seen


def test_the_deadline_ends_a_round_and_the_requests() -> None:
    link = Superlink({1: Node(1.0), 2: Node(500.0)})
    grid = grid_over(link)
    assert nodes_of(grid.send_and_receive(requests(grid), timeout=30.0)) == [1]
    assert link.now == pytest.approx(30.0)
    assert link.nodes[2].seen[0].metadata.ttl == pytest.approx(30.0)


def test_a_site_that_restarted_is_asked_again() -> None:
    link = Superlink({1: Node(1.0), 2: Node(10.0, offline=(5.0, 20.0))})
    grid = grid_over(link)
    assert nodes_of(grid.send_and_receive(requests(grid), timeout=100.0)) == [1, 2]
    assert len(link.nodes[1].seen) == 1
    assert len(link.nodes[2].seen) == 2
    again = link.nodes[2].seen[1]
    assert again.metadata.ttl < 85.0
    assert is_packed(again.content.array_records["adapter"])
    assert link.now < 35.0


def test_asking_again_is_logged_and_a_reply_to_either_request_counts_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    link = Superlink({1: Node(1.0), 2: Node(10.0, offline=(5.0, 6.0))})
    grid = grid_over(link)
    with caplog.at_level("INFO", "fedgraft_server"):
        assert nodes_of(grid.send_and_receive(requests(grid), timeout=100.0)) == [1, 2]
    assert [r.message for r in caplog.records] == ["asking node 2 again"]
    assert link.pulled[-1] == {"2-0", "2-1"}


def test_a_reply_that_a_dying_superlink_had_handed_out_is_asked_for_again() -> None:
    """To the SuperLink it is delivered, and the site has not noticed anything."""
    link = Superlink({1: Node(1.0), 2: Node(3.0)})
    grid: SuperlinkGrid

    def sleep(seconds: float) -> None:
        link.sleep(seconds)
        if link.now >= 3.0 and "2-0" in link.due:
            del link.due["2-0"]
            grid._replies._interrupted = True

    grid = SuperlinkGrid(link, {1, 2}, clock=lambda: link.now, sleep=sleep)
    assert nodes_of(grid.send_and_receive(requests(grid), timeout=100.0)) == [1, 2]
    assert [len(link.nodes[node].seen) for node in (1, 2)] == [1, 2]
    assert link.now < 15.0


def test_a_reply_to_an_earlier_request_has_its_site_asked_again_at_the_next_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link = Superlink({1: Node(0.5), 2: Node(0.5)})
    grid = grid_over(link)
    verdicts = [False]
    monkeypatch.setattr(
        grid._requests, "settle", lambda reply: verdicts.pop() if verdicts else True
    )
    assert sorted(nodes_of(grid.receive(requests(grid), timeout=60))) == [1, 2]
    assert sorted(len(node.seen) for node in link.nodes.values()) == [1, 2]
    assert link.now < 2 + 1  # with the next census, not after `again`


def test_a_site_that_is_asked_again_gets_the_form_that_every_site_can_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link = Superlink({1: Node(3.0, offline=(1.0, 4.0)), 2: Node(0.5)})
    grid = grid_over(link)
    grid._replies.able |= {1, 2}
    pushed: list[tuple[set[int], set[int]]] = []
    push, forgotten = grid._requests.push, set()

    def note(messages: list[Message], able: set[int]) -> list[str]:
        pushed.append(({m.metadata.dst_node_id for m in messages}, set(able)))
        return push(messages, able)

    monkeypatch.setattr(grid._requests, "push", note)
    monkeypatch.setattr(grid._requests, "forget", lambda ids: forgotten.update(ids))
    assert nodes_of(grid.receive(requests(grid), timeout=60)) == [2, 1]
    assert pushed[0] == ({1, 2}, {1, 2})
    assert pushed[1:] == [({1}, {2})]
    assert forgotten == {"1-0", "1-1", "2-0"}  # nothing is kept of a round that is over


def test_a_site_that_was_away_is_asked_when_it_connects() -> None:
    link = Superlink({1: Node(1.0), 2: Node(1.0, offline=(0.0, 20.0))})
    grid = grid_over(link)
    assert nodes_of(grid.send_and_receive(requests(grid), timeout=100.0)) == [1, 2]
    assert len(link.nodes[2].seen) == 2
    assert link.now < 25.0


def test_a_round_with_enough_replies_does_not_wait_for_absent_sites() -> None:
    link = Superlink({1: Node(1.0), 2: Node(1.0, offline=(0.0, 1e9))})
    grid = grid_over(link, patience=Patience(absence=60.0))
    assert nodes_of(grid.send_and_receive(requests(grid), timeout=3600.0)) == [1]
    assert 60.0 <= link.now < 65.0
    link = Superlink({1: Node(1.0), 2: Node(1.0, offline=(0.0, 1e9))})
    grid = grid_over(link, enough=2)
    assert nodes_of(grid.send_and_receive(requests(grid), timeout=3600.0)) == [1]
    assert link.now == pytest.approx(3600.0)


def test_a_site_that_was_waited_for_in_vain_is_waited_for_again_when_it_is_back() -> None:
    link = Superlink({1: Node(1.0), 2: Node(1.0, offline=(0.0, 200.0))})
    grid = grid_over(link, patience=Patience(absence=60.0))
    assert nodes_of(grid.send_and_receive(requests(grid), timeout=3600.0)) == [1]
    before = link.now
    assert nodes_of(grid.send_and_receive(requests(grid), timeout=3600.0)) == [1]
    assert link.now - before < 5.0
    link.now = 300.0
    assert nodes_of(grid.send_and_receive(requests(grid), timeout=3600.0)) == [1, 2]


def test_a_slow_site_that_is_connected_is_waited_for() -> None:
    link = Superlink({1: Node(1.0), 2: Node(900.0)})
    grid = grid_over(link, patience=Patience(absence=60.0))
    assert nodes_of(grid.send_and_receive(requests(grid), timeout=3600.0)) == [1, 2]
    assert len(link.nodes[2].seen) == 1


def test_unmasking_ends_soon_after_enough_answers() -> None:
    nodes = {1: Node(0.2), 2: Node(0.4), 3: Node(1.0), 4: Node(1e6)}
    link = Superlink(dict(nodes))
    grid = grid_over(link, enough=2)
    found = grid.send_and_receive(requests(grid, "query.unmask"), timeout=3600.0)
    assert nodes_of(found) == [1, 2, 3]  # the third is not much later than the others
    assert link.now == pytest.approx(0.4 + Patience().linger, abs=0.2)
    link = Superlink({1: Node(20.0), 2: Node(30.0), 3: Node(55.0), 4: Node(1e6)})
    grid = grid_over(link, enough=2)
    found = grid.send_and_receive(requests(grid, "query.unmask"), timeout=3600.0)
    assert nodes_of(found) == [1, 2, 3]
    assert link.now == pytest.approx(60.0, abs=1.0)


def test_one_answer_short_of_enough_is_waited_for() -> None:
    link = Superlink({1: Node(0.2), 2: Node(500.0)})
    grid = grid_over(link, enough=2)
    found = grid.send_and_receive(requests(grid, "query.unmask"), timeout=3600.0)
    assert nodes_of(found) == [1, 2]


def test_a_connected_site_that_never_replies_holds_one_exchange_to_its_deadline() -> None:
    link = Superlink({1: Node(1.0), 2: Node(1e6)})
    grid = grid_over(link)
    assert nodes_of(grid.send_and_receive(requests(grid), timeout=600.0)) == [1]
    assert link.now == pytest.approx(600.0)
    before = link.now
    assert nodes_of(grid.send_and_receive(requests(grid), timeout=600.0)) == [1]
    assert link.now - before == pytest.approx(1.0 + Patience().linger, abs=0.2)
    link.nodes[2].delay = 2.5  # it replies within the others' time again: it is waited for again
    assert nodes_of(grid.send_and_receive(requests(grid), timeout=600.0)) == [1, 2]
    link.nodes[2].delay, before = 100.0, link.now
    assert nodes_of(grid.send_and_receive(requests(grid), timeout=600.0)) == [1, 2]
    assert link.now - before == pytest.approx(100.0, abs=2.0)


def test_a_request_that_flower_would_not_take_is_tried_again() -> None:
    link = Superlink({1: Node(1.0)})
    link.rejects = {1}
    grid = grid_over(link)
    relent = grid_over(link)
    assert list(grid.send_and_receive(requests(grid), timeout=4.0)) == []
    replies = relent.receive(requests(relent), 100.0)
    original = link.sleep

    def sleep(seconds: float) -> None:
        original(seconds)
        link.rejects = set()

    relent._sleep = sleep
    assert nodes_of(replies) == [1]


def test_a_reply_of_another_node_is_not_taken() -> None:
    link = Superlink({1: Node(1.0)})
    link.stranger = True
    grid = grid_over(link)
    assert list(grid.send_and_receive(requests(grid), timeout=10.0)) == []


def test_a_damaged_package_reaches_the_schema_check_as_it_is() -> None:
    link = Superlink({1: Node()})
    grid = grid_over(link)
    [name] = grid.push_messages(requests(grid))
    _, reply = link.due[name]
    package = reply.content.array_records["adapter"]["package"]
    package.data = package.data[:-1]
    [found] = grid.pull_messages([name])
    with pytest.raises(MessageError):
        from_record(found.content.array_records.get("adapter", ArrayRecord()), SCHEMA)


def test_it_waits_for_sites_to_connect() -> None:
    link = Superlink({1: Node(), 2: Node(offline=(0.0, 7.0))})
    assert grid_over(link).wait_for_sites(30.0) == 2
    assert 7.0 <= link.now < 10.0
    link = Superlink({1: Node(), 2: Node(offline=(0.0, 70.0))})
    assert grid_over(link).wait_for_sites(30.0) == 1
    assert link.now == pytest.approx(30.0)
