"""What a round costs over a real SuperLink when nobody computes: in production, and stock.

Both ways run the same server loop (aggregation and a durable checkpoint), the same ClientApp and
an unmodified SuperLink on loopback:

    stock      Flower's grid, two `flower-supernode` without TLS: polls every 3 s, a new process per
               message, every tensor an object of its own
    resident   `fedgraft server up`: Fedgraft's grid, the adapter packed into one object, the
               gateway; two resident daemons that joined with invites, mutual TLS
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import psutil
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from fedgraft_client.connection import FleetConnection
from fedgraft_client.identity import load_identity
from fedgraft_client.up import Link
from fedgraft_common.adapted import adapted_backbone
from fedgraft_common.plan import Plan
from fedgraft_server.runs import STUB, Runs, stub
from fedgraft_server.settings import ServerDirectory
from fedgraft_server.superlink import SuperLink
from fedgraft_simulations.benchmarks.flower_processes import superlink, supernode
from fedgraft_simulations.benchmarks.glyph_vit import glyph_vit
from fedgraft_simulations.benchmarks.measure import Ratio, Report, Way
from fedgraft_simulations.federation.processes import Federation

SITES = 2
TARGET = 20.0
PATIENCE = 300.0  # seconds a run may take
HERE = __package__


@dataclass(frozen=True, slots=True)
class Measured:
    """One run.

    Attributes:
        rounds: seconds of each round after the first.
        spent: seconds of those rounds that the server's loop spent in each part, in total.
        processors: processor seconds of a round, of all processes.
        idle: seconds of a site's question that has no answer; 0 if it was not asked.
    """

    rounds: tuple[float, ...]
    spent: dict[str, float]
    processors: float
    idle: float = 0.0


def measure(repetitions: int = 10, stock_rounds: int = 4) -> Report:
    """Runs both ways, one after the other.

    Args:
        repetitions: rounds that are timed with resident sites.
        stock_rounds: rounds that are timed with stock SuperNodes.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        plan = large_plan(directory)
        state = adapted_backbone(plan).state()
        size = sum(t.nbytes for t in state.values())
        resident = in_production(plan, directory / "resident", repetitions)
        stock = in_stock(plan, directory / "stock", stock_rounds)
    ratio = Ratio(
        "a round", Way("stock SuperNodes", stock.rounds), Way("resident", resident.rounds), TARGET
    )
    each = {part: seconds / len(resident.rounds) for part, seconds in resident.spent.items()}
    whole = sum(resident.rounds) / len(resident.rounds)
    figures = {
        "stock: a round, s (median)": ratio.slow.median,
        "resident: a round, s (median)": ratio.fast.median,
        "resident: a round, s (fastest)": min(resident.rounds),
        "resident: a round, s (mean)": whole,
        "of it asking: packing and pushing requests, s": each.get("asking", 0.0),
        "of it waiting between looks for replies, s": each.get("waiting", 0.0),
        "of it looking for and fetching replies, s": each.get("fetching", 0.0),
        "of it aggregation, durable checkpoint, the rest, s": whole - sum(each.values()),
        "a site's question without an answer, ms": 1000 * resident.idle,
        "stock: processor seconds of a round": stock.processors,
        "resident: processor seconds of a round": resident.processors,
    }
    return Report(
        "federation_overhead",
        f"{SITES} sites over a SuperLink, {size / 1e6:.1f} MB in {len(state)} tensors, no compute",
        ratios=(ratio,),
        figures=figures,
        notes=(
            f"Rounds after the first: {len(resident.rounds)} resident, {len(stock.rounds)} stock.",
            "While the server waits, a request lies up to 0.1 s until its site asks, and the site "
            "fetches, unpacks, packs and sends, through the gateway with mutual TLS. The stock "
            "way has no TLS at all.",
        ),
    )


def large_plan(directory: Path) -> Plan:
    """1.1 MB of adapters in 120 tensors, as in `round_overhead`."""
    return Plan().replace(
        {
            "privacy.mechanism": "none",
            "backbone.source": f"dir:{glyph_vit(directory, steps=0)}",
            "adapter.method": "lora",
            "adapter.layers": "last:10",
            "rounds.deadline": PATIENCE,
            "aggregation.sites": SITES,
        }
    )


def in_production(plan: Plan, directory: Path, rounds: int) -> Measured:
    """One run of `fedgraft server up` and two echo sites that joined."""
    with Federation(directory, plan.replace({"sites.count": SITES})) as federation:
        federation.start_server()
        identities = [federation.admit(name) for name in [*federation.names, "idle"]]
        for name, identity in zip(federation.names, identities, strict=False):
            federation.start(name, [sys.executable, "-m", f"{HERE}.echo_site", str(identity)])
        server = ServerDirectory(federation.server)
        link = SuperLink(server, server.settings())
        with Runs(link.address, link.client_context()) as runs:
            found = timed_run(plan, runs, directory / "run", rounds, "fedgraft_app")
        with Link(load_identity(identities[-1]), directory / "idle-node")() as connection:
            return replace(found, idle=idle_poll(connection))


def in_stock(plan: Plan, directory: Path, rounds: int) -> Measured:
    """One run of `flower-superlink` and two `flower-supernode`, which register themselves."""
    directory.mkdir()
    with ExitStack() as stack:
        address = stack.enter_context(superlink(directory))
        runs = stack.enter_context(Runs(address))
        for number in range(SITES):
            stack.enter_context(supernode(address, directory, f"site-{number}"))
        return timed_run(plan, runs, directory / "run", rounds, "flower_app")


def timed_run(plan: Plan, runs: Runs, directory: Path, rounds: int, server: str) -> Measured:
    """One run of `rounds` timed rounds and one before them."""
    directory.mkdir()
    plan = plan.replace({"rounds.count": rounds + 1})
    config = {
        "plan": plan.canonical,
        "directory": str(directory),
        "sites": ",".join(map(str, wait_for_nodes(runs))),
    }
    number = runs.start_bundle(bundle(server), config)
    _until(directory / "round-000001.safetensors", runs, number)
    before = processor_seconds()
    _until(directory / "measured.json", runs, number)
    spent = processor_seconds() - before
    finish(runs, number)
    document = json.loads((directory / "measured.json").read_text(encoding="utf-8"))
    ends = document["ends"]
    seconds = tuple(later - earlier for earlier, later in pairwise(ends))
    return Measured(seconds, document["spent"], spent / rounds)


def _until(file: Path, runs: Runs, number: int) -> None:
    """Waits for a file of the run; a run that is over without it failed."""
    asked = time.monotonic()
    while not file.exists():
        if time.monotonic() - asked > PATIENCE / 10:
            asked = time.monotonic()
            if runs.state(number).status == "finished":
                finish(runs, number)
        time.sleep(0.02)


def processor_seconds() -> float:
    """Of every process that this one started, and of those that they started."""
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def bundle(server: str) -> dict[str, bytes]:
    """Fedgraft's stub, naming the benchmark's apps."""
    text = stub()[STUB].decode()
    text = text.replace("fedgraft_server.app:app", f"{HERE}.federation_servers:{server}")
    text = text.replace("fedgraft_client.supernode:app", f"{HERE}.echo_site:app")
    return {STUB: text.encode()}


def wait_for_nodes(runs: Runs, count: int = SITES) -> list[int]:
    """Waits until the sites are connected; their node ids."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        online = [node.id for node in runs.nodes() if node.status == "online"]
        if len(online) >= count:
            return online
        time.sleep(0.2)
    raise RuntimeError(f"fewer than {count} sites connected")


def finish(runs: Runs, number: int, patience: float = PATIENCE) -> None:
    """Waits until a run has finished, at most so many seconds.

    Raises:
        RuntimeError: it failed, or takes too long.
    """
    end = time.monotonic() + patience
    while time.monotonic() < end:
        state = runs.state(number)
        if state.status == "finished":
            if state.outcome != "completed":
                raise RuntimeError(
                    f"{state.outcome}: {state.details}\n{''.join(runs.logs(number))}"
                )
            return
        time.sleep(0.2)
    raise RuntimeError(f"run {number} did not finish in {patience:g} s")


def new_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A node key, kept in a PEM file."""
    key = ec.generate_private_key(ec.SECP384R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.touch(mode=0o600)
    path.write_bytes(pem)
    return key


def idle_poll(connection: FleetConnection, count: int = 50) -> float:
    """Seconds of a question that has no answer yet."""
    connection.receive()
    started = time.perf_counter()
    for _ in range(count):
        connection.receive()
    return (time.perf_counter() - started) / count
