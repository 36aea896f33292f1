"""The site as a Flower ClientApp."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedgraft_client.app import client_app
from fedgraft_client.data import Records
from fedgraft_client.runtime import Runtime
from fedgraft_client.site import Site, SiteConfig
from fedgraft_client.store import SiteStore
from fedgraft_common.messages import Status, read_status, to_record
from fedgraft_common.packing import is_packed, pack, unpack
from fedgraft_common.plan import Plan
from fedgraft_simulations.local_grid import LocalGrid

PRIVATE = "patient 4711, born 1950"


@pytest.fixture
def plan(vit_directory: Path) -> Plan:
    return Plan().replace(
        {
            "backbone.source": f"dir:{vit_directory}",
            "adapter.layers": "last:1",
            "privacy.mechanism": "none",
            "training.expected_batch": 4.0,
        }
    )


def content(plan: Plan, runtime: Runtime) -> RecordDict:
    adapter = to_record(runtime.workbench(plan).initial)
    config = ConfigRecord({"plan": plan.canonical, "round": 1})
    return RecordDict({"adapter": adapter, "plan": config})


def test_each_site_answers_its_own_message(plan: Plan, tmp_path: Path) -> None:
    runtime = Runtime("cpu")

    def site(number: int) -> Site:
        records = Records(torch.rand(6, 1, 16, 16), torch.arange(6) % 2)
        config = SiteConfig(f"site {number}", ("a", "b"), 6, simulated=True)
        return Site(config, records, runtime, SiteStore(tmp_path / str(number), durable=False))

    sites = [site(0), site(1), site(2)]
    asked: list[int] = []

    def find(context: Context) -> Site:
        asked.append(int(context.node_config["partition-id"]))
        return sites[asked[-1]]

    grid = LocalGrid(client_app(find), count=3)
    nodes = list(grid.get_node_ids())
    messages = [grid.create_message(content(plan, runtime), "train", n, "1") for n in nodes[1:]]
    replies = list(grid.send_and_receive(messages))
    assert asked == [1, 2]
    assert [read_status(reply) for reply in replies] == [Status.OK, Status.OK]
    assert [reply.metadata.src_node_id for reply in replies] == nodes[1:]
    first, second = (reply.content.array_records["adapter"] for reply in replies)
    assert set(first) == {s.name for s in runtime.workbench(plan).adapted.schema}
    assert any(first[name].data != second[name].data for name in first)
    assert sites[0].store.ledger.finished(plan.hash) is None


def test_a_site_that_cannot_be_made_says_nothing_about_why(plan: Plan) -> None:
    """Flower sends the text of an exception that leaves an app to the server."""

    def find(_: Context) -> Site:
        raise ValueError(PRIVATE)

    grid = LocalGrid(client_app(find), count=1)
    (node,) = grid.get_node_ids()
    message = grid.create_message(content(plan, Runtime("cpu")), "train", node, "1")
    (reply,) = grid.send_and_receive([message])
    assert read_status(reply) is Status.FAILED
    assert PRIVATE not in repr(reply.content) + repr(vars(reply.metadata))


@pytest.mark.parametrize("kind", ["query.other", "train.other"])
def test_other_kinds_of_message_are_not_answered(plan: Plan, kind: str) -> None:
    def find(_: Context) -> Site:
        raise AssertionError("no site is needed")

    grid = LocalGrid(client_app(find), count=1)
    (node,) = grid.get_node_ids()
    message = grid.create_message(content(plan, Runtime("cpu")), kind, node, "1")
    with pytest.raises(ValueError, match="function registered with name 'other'"):
        grid.send_and_receive([message])


def test_a_packed_request_gets_a_packed_reply_with_the_same_values(
    plan: Plan, tmp_path: Path
) -> None:
    runtime = Runtime("cpu")

    def answer(name: str, adapter: ArrayRecord) -> Message:
        records = Records(
            torch.rand(6, 1, 16, 16, generator=torch.manual_seed(0)), torch.arange(6) % 2
        )
        config = SiteConfig("site", ("a", "b"), 6, simulated=True)
        site = Site(config, records, runtime, SiteStore(tmp_path / name, durable=False))
        grid = LocalGrid(client_app(lambda context: site), count=1)
        whole = content(plan, runtime)
        whole["adapter"] = adapter
        [reply] = grid.send_and_receive([grid.create_message(whole, "train", 1, "1")])
        return reply

    adapter = to_record(runtime.workbench(plan).initial)
    plain = answer("plain", adapter).content.array_records["adapter"]
    packed = answer("packed", pack(adapter)).content.array_records["adapter"]
    assert not is_packed(plain)
    assert is_packed(packed)
    found = unpack(packed)
    assert list(found) == list(plain)
    assert all(found[name].data == array.data for name, array in plain.items())


def test_a_damaged_package_is_refused_without_a_look_at_the_data(
    plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime("cpu")
    asked: list[int] = []

    def find(context: Context) -> Site:
        asked.append(1)
        raise AssertionError

    grid = LocalGrid(client_app(find), count=1)
    whole = content(plan, runtime)
    whole["adapter"] = pack(whole.array_records["adapter"])
    package = whole.array_records["adapter"]["package"]
    package.data = package.data[:-1]
    [reply] = grid.send_and_receive([grid.create_message(whole, "train", 1, "1")])
    assert read_status(reply) is Status.MESSAGE
    assert not asked
    assert "packed adapter" in caplog.text
