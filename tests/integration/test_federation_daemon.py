"""Resident sites at a real SuperLink on loopback, against the same run in one process."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import psutil
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedgraft_client.app import client_app, packed
from fedgraft_client.connection import Dialler, FleetConnection, RunOver
from fedgraft_client.daemon import Daemon, Pace
from fedgraft_client.health import State, read_health
from fedgraft_common.errors import LinkError, ServerError
from fedgraft_common.messages import Status, Tensors, write_reply
from fedgraft_common.plan import Plan, load_plan
from fedgraft_server.checkpoint import newest_checkpoint
from fedgraft_server.federation import server_app
from fedgraft_server.metrics import FILE, read_counts
from fedgraft_server.runs import Runs
from fedgraft_simulations.benchmarks.federation_overhead import bundle, finish, new_key
from fedgraft_simulations.benchmarks.flower_processes import process, superlink, supernode
from fedgraft_simulations.cli import PLANS
from fedgraft_simulations.local_grid import LocalGrid, local_context
from fedgraft_simulations.sites import SimulatedSites

SITES = 2
WAIT = 120.0  # seconds; the machine may be busy


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    directory = tmp_path_factory.mktemp("superlink")
    with superlink(directory) as address, Runs(address) as runs:
        yield runs


@pytest.fixture
def plan() -> Plan:
    """The demo's data and backbone, for two sites and three rounds of the local mechanism.

    The distributed one needs three sites and keys of theirs: test_secure_federation.py
    """
    changes = {"sites.count": SITES, "rounds.count": 3, "rounds.deadline": 600.0}
    plan = load_plan(PLANS / "digits.toml").replace(
        changes | {"aggregation.sites": SITES, "sites.partitioner": "IidPartitioner",
                   "privacy.mechanism": "local"}
    )  # fmt: skip
    return plan.replace({"sites.options": {}, "sites.label_sets": ()})


@contextmanager
def resident(runs: Runs, apps: list[ClientApp], pace: Pace | None = None) -> Iterator[list[Daemon]]:
    """One daemon per app, each in a thread; stopped at the end."""
    daemons, threads = [], []
    for number, app in enumerate(apps):
        key = ec.generate_private_key(ec.SECP384R1())
        runs.register(public_key_to_bytes(key.public_key()), f"site {number}")
        dial = Dialler(runs.address, key, tls=None)
        daemon = Daemon(f"site {number}", dial, app, pace or Pace())
        thread = threading.Thread(target=daemon.run, daemon=True)
        thread.start()
        daemons.append(daemon)
        threads.append(thread)
    try:
        yield daemons
    finally:
        for daemon in daemons:
            daemon.stop()
        for thread in threads:
            thread.join(WAIT)
            assert not thread.is_alive()


def nodes_of(runs: Runs, *names: str) -> list[int]:
    return [node.id for node in runs.nodes() if node.name in names and node.status == "online"]


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.05)


def in_process(plan: Plan, directory: Path) -> Tensors:
    sites = SimulatedSites(plan, directory / "sites", "cpu")
    grid = LocalGrid(client_app(sites), SITES)
    server_app(plan, directory / "run", durable=False)(grid, local_context(0, 1))
    return final_adapter(plan, directory / "run")


def final_adapter(plan: Plan, directory: Path) -> Tensors:
    checkpoint = newest_checkpoint(directory, plan)
    assert checkpoint is not None
    assert checkpoint.round == plan.rounds.count
    return checkpoint.adapter


def assert_same(found: Tensors, expected: Tensors, plan: Plan) -> None:
    from fedgraft_common.adapted import adapted_backbone

    start = adapted_backbone(plan).state()
    moved = max(float((expected[name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-3, "nothing was trained: the comparison would mean nothing"
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)


def test_resident_sites_give_the_adapter_of_the_simulation(
    server: Runs, plan: Plan, tmp_path: Path
) -> None:
    expected = in_process(plan, tmp_path / "local")

    lock = threading.Lock()  # a site has a process of its own; Python's warnings are global

    def app(number: int) -> ClientApp:
        sites = SimulatedSites(plan, tmp_path / f"site-{number}", "cpu")
        answer = client_app(lambda context: sites[number])

        def one_at_a_time(message: Message, context: Context) -> Message:
            with lock:
                return answer(message, context)

        return cast(ClientApp, one_at_a_time)

    with resident(server, [app(0), app(1)]) as daemons:
        until(lambda: all(d.health.connected for d in daemons), "both connected")
        nodes = nodes_of(server, "site 0", "site 1")
        number = server.start(plan, tmp_path / "run", nodes)
        finish(server, number)
    assert_same(final_adapter(plan, tmp_path / "run"), expected, plan)
    assert [d.health.answered for d in daemons] == [4, 4]  # three rounds and the final adapter
    assert [d.health.round for d in daemons] == [3, 3]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert read_counts(tmp_path / "run" / FILE) == {
        ("fedgraft_server_rounds", ""): 3.0,
        ("fedgraft_server_updates", "ok"): 6.0,
    }
    log = "".join(server.logs(number))
    assert "round 3: 2 updates" in log
    with pytest.raises(ServerError, match=r"was not stopped|HTTP"):
        server.stop(number)


HOSTILE = """
from pathlib import Path
from typing import cast
Path({marker!r}).write_text("a site ran code from the network")
raise SystemExit("hostile")
"""
ASKS = """
from flwr.app import Message, RecordDict, ConfigRecord
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    nodes = [int(part) for part in context.run_config["sites"].split(",")]
    content = RecordDict({"x": ConfigRecord({"clientapp": "hostile:app", "n": 1})})
    requests = [Message(content, node, "train") for node in nodes]
    replies = list(grid.send_and_receive(requests, timeout=30))
    assert len(replies) == len(nodes), replies
    assert not any(reply.has_error() for reply in replies)
"""


def test_a_hostile_bundle_does_nothing_at_a_site(
    server: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's bundle names a ClientApp and brings it along; the site answers with its own."""
    marker = tmp_path / "marker"
    home = tmp_path / "home"
    monkeypatch.setenv("FLWR_HOME", str(home))
    files = {
        "pyproject.toml": bundle("x")["pyproject.toml"]
        .decode()
        .replace("fedgraft_simulations.benchmarks.federation_servers:x", "asks:app")
        .replace("fedgraft_simulations.benchmarks.echo_site:app", "hostile:app")
        .encode(),
        "asks.py": ASKS.encode(),
        "hostile.py": HOSTILE.format(marker=str(marker)).encode(),
        "fedgraft_client/__init__.py": HOSTILE.format(marker=str(marker)).encode(),
        "fedgraft_client/app.py": HOSTILE.format(marker=str(marker)).encode(),
    }
    calls: list[str] = []
    original = FleetConnection.__init__

    def watched(self: FleetConnection, *arguments: object, **options: object) -> None:
        original(self, *arguments, **options)  # type: ignore[arg-type]
        send = self._client._send

        def note(context: object, *, stream: bool = False) -> object:
            calls.append(context.rpc_method.rpartition("/")[2])  # type: ignore[attr-defined]
            return send(context, stream=stream)  # type: ignore[arg-type]

        self._client._send = note  # type: ignore[method-assign,assignment]

    monkeypatch.setattr(FleetConnection, "__init__", watched)
    seen: list[str] = []
    app = ClientApp(mods=[packed])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen.append(message.metadata.message_id)
        return write_reply(message, 1, Status.OK)

    modules, path = set(sys.modules), list(sys.path)
    with resident(server, [app]) as [daemon]:
        until(lambda: daemon.health.connected, "connected")
        [node] = nodes_of(server, "site 0")
        number = server.start_bundle(files, {"sites": str(node)})
        finish(server, number)
    assert len(seen) == 1
    assert not marker.exists()
    assert not home.exists()  # where Flower would have put the bundle
    assert "hostile" not in set(sys.modules) - modules
    assert sys.path == path
    assert set(calls) <= {
        "PullMessages", "PullObject", "ConfirmMessageReceived", "PushMessages", "PushObject",
        "SendNodeHeartbeat", "DeactivateNode",
    }  # fmt: skip
    assert {"PullMessages", "PushMessages", "DeactivateNode"} <= set(calls)


def test_a_site_that_is_killed_and_restarted_takes_part_again(
    server: Runs, vit_directory: Path, tmp_path: Path
) -> None:
    plan = Plan().replace(
        {
            "backbone.source": f"dir:{vit_directory}",
            "backbone.pooling": "mean",
            "adapter.method": "lora",
            "privacy.mechanism": "none",
            "rounds.count": 8,
            "rounds.deadline": 600.0,
            "aggregation.sites": SITES,
        }
    )
    commands = []
    for number in range(SITES):
        file = tmp_path / f"killed-{number}.pem"
        server.register(public_key_to_bytes(new_key(file).public_key()), file.stem)
        status = str(tmp_path / f"killed-{number}.json")
        module = "fedgraft_simulations.benchmarks.echo_site"
        commands.append(["python", "-m", module, server.address, str(file), status])
    names = ["killed-0", "killed-1"]
    with ExitStack() as stack:

        def start(number: int) -> psutil.Process:
            log = tmp_path / f"{names[number]}.log"
            return stack.enter_context(process(commands[number], tmp_path / "home", log))

        def reached(round_number: int) -> bool:
            names = (path.stem for path in (tmp_path / "run").glob("round-*"))
            return max(names, default="") >= f"round-{round_number:06d}"

        processes = [start(0), start(1)]
        until(lambda: len(nodes_of(server, *names)) == SITES, "both connected")
        number = server.start(plan, tmp_path / "run", nodes_of(server, *names))
        for round_number in (2, 5):
            until(partial(reached, round_number), f"round {round_number} finished")
            processes[1].kill()
            processes[1].wait()
            processes[1] = start(1)
        finish(server, number)
        assert final_adapter(plan, tmp_path / "run")
        log = "".join(server.logs(number))
        assert log.count("2 updates") == plan.rounds.count

        processes[0].send_signal(signal.SIGTERM)
        until(lambda: not processes[0].is_running() or processes[0].status() == "zombie", "ended")
        health = read_health(tmp_path / "killed-0.json")
        assert (health.state, health.draining, health.connected) == (State.STOPPED, True, False)
        assert health.round == plan.rounds.count
        assert health.answered == plan.rounds.count + 1  # and the final adapter
        lines = (tmp_path / "killed-0.log").read_text(encoding="utf-8").splitlines()
        actions = [json.loads(line)["action"] for line in lines if line.startswith("{")]
        assert actions[0] == "connect"
        assert actions[-1] == "stop"
        until(lambda: len(nodes_of(server, *names)) == 1, "said goodbye")


def test_a_request_that_was_lost_at_a_site_is_sent_again(
    server: Runs, vit_directory: Path, tmp_path: Path
) -> None:
    plan = Plan().replace(
        {
            "backbone.source": f"dir:{vit_directory}",
            "backbone.pooling": "mean",
            "privacy.mechanism": "none",
            "rounds.count": 1,
            "rounds.deadline": 600.0,
            "aggregation.sites": 1,
            "aggregation.minimum_sites": 1,
        }
    )
    key = ec.generate_private_key(ec.SECP384R1())
    node = server.register(public_key_to_bytes(key.public_key()), "forgetful")
    memory = tmp_path / "node"
    connection = Dialler(server.address, key, tls=None, memory=memory)()
    received: list[Message] = []

    def ask() -> bool:
        message = connection.receive()
        received.extend([message] if message is not None else [])
        return message is not None

    number = server.start(plan, tmp_path / "run", [node])
    until(ask, "asked")
    lost = connection  # killed: no reply and no goodbye
    connection = Dialler(server.address, key, tls=None, memory=memory)()
    assert connection.node_id == node
    until(ask, "asked again")
    first, second = received
    assert first.metadata.message_id != second.metadata.message_id
    assert first.content == second.content
    adapter = second.content.array_records["adapter"]
    reply = connection.prepare(write_reply(second, 1, Status.OK, adapter))
    connection.send(reply)
    connection.send(reply)  # a second time does no harm
    finish(server, number)
    assert "asking node" in "".join(server.logs(number))
    with pytest.raises(RunOver):
        connection.send(connection.prepare(write_reply(second, 2, Status.OK, adapter)))
    connection.close()
    lost.close()


def test_a_site_that_is_not_registered_is_told_so(server: Runs) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(LinkError, match=r"HTTP 4\d\d.*registered and not revoked"):
        FleetConnection(server.address, key, tls=None)
    assert os.getpid()  # and this process is still here


def test_runs_are_listed_and_unknown_ones_are_refused(server: Runs) -> None:
    assert all(state.status for state in server.all())
    with pytest.raises(ServerError, match="run: found 1; allowed: a run of this server"):
        server.state(1)
    with pytest.raises(ServerError, match="SuperLink 127"):
        server.stop(1)


@pytest.mark.slow
@pytest.mark.timeout(1500)  # a process that imports torch for each message, and few processors
def test_the_same_app_runs_under_a_stock_supernode(
    server: Runs, plan: Plan, tmp_path: Path
) -> None:
    expected = in_process(plan, tmp_path / "local")
    plan_file = tmp_path / "plan.json"
    plan_file.write_text(plan.model_dump_json(), encoding="utf-8")
    (tmp_path / "my_hospital.py").write_text(
        "from pathlib import Path\n"
        "from fedgraft_common.plan import Plan\n"
        "from fedgraft_simulations.sites import SimulatedSites\n"
        f"plan = Plan.model_validate_json(Path({str(plan_file)!r}).read_text())\n"
        f"sites = SimulatedSites(plan, Path({str(tmp_path / 'sites')!r}), 'cpu')\n"
        "def open_site(context):\n"
        "    return sites(context)\n",
        encoding="utf-8",
    )
    path = os.pathsep.join([str(tmp_path), *(part for part in sys.path if part)])
    before = {node.id for node in server.nodes()}
    with ExitStack() as stack:
        for number in range(SITES):
            config = f'site="my_hospital:open_site" partition-id={number} num-partitions={SITES}'
            name = f"stock-{number}"
            stack.enter_context(
                supernode(server.address, tmp_path, name, config, {"PYTHONPATH": path})
            )

        def joined() -> list[int]:
            return [n.id for n in server.nodes() if n.id not in before and n.status == "online"]

        until(lambda: len(joined()) == SITES, "both connected")
        finish(server, server.start(plan, tmp_path / "run", joined()), patience=1200)
    assert_same(final_adapter(plan, tmp_path / "run"), expected, plan)
