"""What a round costs over a real SuperLink when nobody computes: resident sites against stock ones.

Both ways run the same server loop (aggregation and a durable checkpoint), the same ClientApp and
an unmodified SuperLink on loopback, without TLS. They differ in who polls, and how adapters travel:

    stock      Flower's grid, two `flower-supernode`: polls every 3 s, a new process per message,
               every tensor an object of its own
    resident   Fedgraft's grid, two resident daemons, the adapter packed into one object
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedgraft_client.connection import FleetConnection
from fedgraft_common.adapted import adapted_backbone
from fedgraft_common.plan import Plan
from fedgraft_server.runs import STUB, Runs, stub
from fedgraft_simulations.benchmarks.flower_processes import process, superlink, supernode
from fedgraft_simulations.benchmarks.glyph_vit import glyph_vit
from fedgraft_simulations.benchmarks.measure import Ratio, Report, Way

SITES = 2
TARGET = 20.0
PATIENCE = 300.0  # seconds a run may take
HERE = __package__


@dataclass(frozen=True, slots=True)
class Measured:
    """One run.

    Attributes:
        rounds: seconds of each round after the first.
        spent: seconds of those rounds that the server spent in each part, in total.
    """

    rounds: tuple[float, ...]
    spent: dict[str, float]


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
        idle = idle_poll(directory / "idle")
        resident = run(plan, directory / "resident", repetitions, resident_sites, "fedgraft_app")
        stock = run(plan, directory / "stock", stock_rounds, stock_sites, "flower_app")
    ratio = Ratio(
        "a round", Way("stock SuperNodes", stock.rounds), Way("resident", resident.rounds), TARGET
    )
    each = {part: seconds / len(resident.rounds) for part, seconds in resident.spent.items()}
    whole = sum(resident.rounds) / len(resident.rounds)
    figures = {
        "stock: a round, s (median)": ratio.slow.median,
        "resident: a round, s (median)": ratio.fast.median,
        "resident: a round, s (mean)": whole,
        "of it asking: packing and pushing requests, s": each.get("asking", 0.0),
        "of it waiting between looks for replies, s": each.get("waiting", 0.0),
        "of it looking for and fetching replies, s": each.get("fetching", 0.0),
        "of it aggregation, durable checkpoint, the rest, s": whole - sum(each.values()),
        "a site's question without an answer, ms": 1000 * idle,
    }
    return Report(
        "federation_overhead",
        f"{SITES} sites over a SuperLink, {size / 1e6:.1f} MB in {len(state)} tensors, no compute",
        ratios=(ratio,),
        figures=figures,
        notes=(
            f"Rounds after the first: {len(resident.rounds)} resident, {len(stock.rounds)} stock.",
            "While the server waits, a request lies up to 0.1 s until its site asks, and the site "
            "fetches, unpacks, packs and sends. Loopback without TLS and gateway.",
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


def run(plan: Plan, directory: Path, rounds: int, sites: object, server: str) -> Measured:
    """One run of `rounds` timed rounds and one before them."""
    directory.mkdir()
    plan = plan.replace({"rounds.count": rounds + 1})
    with ExitStack() as stack:
        address = stack.enter_context(superlink(directory))
        runs = stack.enter_context(Runs(address))
        stack.enter_context(sites(address, runs, directory))  # type: ignore[operator]
        nodes = wait_for_nodes(runs)
        config = {
            "plan": plan.canonical,
            "directory": str(directory),
            "sites": ",".join(map(str, nodes)),
        }
        number = runs.start_bundle(bundle(server), config)
        finish(runs, number)
    document = json.loads((directory / "measured.json").read_text(encoding="utf-8"))
    ends = document["ends"]
    seconds = tuple(later - earlier for earlier, later in pairwise(ends))
    return Measured(seconds, document["spent"])


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


def finish(runs: Runs, number: int) -> None:
    """Waits until a run has finished.

    Raises:
        RuntimeError: it failed, or takes too long.
    """
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        state = runs.state(number)
        if state.status == "finished":
            if state.outcome != "completed":
                raise RuntimeError(
                    f"{state.outcome}: {state.details}\n{''.join(runs.logs(number))}"
                )
            return
        time.sleep(0.2)
    raise RuntimeError(f"run {number} did not finish in {PATIENCE:g} s")


def new_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A node key, kept in a PEM file."""
    key = ec.generate_private_key(ec.SECP384R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.touch(mode=0o600)
    path.write_bytes(pem)
    return key


@contextmanager
def resident_sites(address: str, runs: Runs, directory: Path) -> Iterator[None]:
    """Two resident daemons, each in its own process."""
    with ExitStack() as stack:
        for number in range(SITES):
            file = directory / f"site-{number}.pem"
            runs.register(public_key_to_bytes(new_key(file).public_key()), file.stem)
            command = ["python", "-m", f"{HERE}.echo_site", address, str(file)]
            log = directory / f"site-{number}.log"
            stack.enter_context(process(command, directory / f"home-{number}", log))
        yield


@contextmanager
def stock_sites(address: str, runs: Runs, directory: Path) -> Iterator[None]:
    """Two stock SuperNodes, which register themselves."""
    with ExitStack() as stack:
        for number in range(SITES):
            stack.enter_context(supernode(address, directory, f"site-{number}"))
        yield


def idle_poll(directory: Path, count: int = 50) -> float:
    """Seconds of a question that has no answer yet."""
    directory.mkdir()
    with superlink(directory) as address, Runs(address) as runs:
        key = new_key(directory / "idle.pem")
        runs.register(public_key_to_bytes(key.public_key()), "idle")
        with FleetConnection(address, key, tls=None) as connection:
            connection.receive()
            started = time.perf_counter()
            for _ in range(count):
                connection.receive()
            return (time.perf_counter() - started) / count
