"""What a round costs over a real SuperLink when nobody computes: in production, and stock.

Both ways run the same server loop (aggregation and a durable checkpoint) over an unmodified
SuperLink on loopback:

    stock      Flower's grid, two `flower-supernode` without TLS: polls every 3 s, a new process per
               message, every tensor an object of its own
    resident   everything as in production: `fedgraft server up`, two site daemons that joined with
               invites, mutual TLS, gateway, signed plan, ledgers, egress guard; mechanism `local`
"""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from fedgraft_common.adapted import adapted_backbone
from fedgraft_common.plan import Plan
from fedgraft_server.runs import STUB, Runs, stub
from fedgraft_simulations.benchmarks.flower_processes import superlink, supernode
from fedgraft_simulations.benchmarks.measure import Ratio, Report, Way
from fedgraft_simulations.benchmarks.production_rounds import FIRST, large_plan, production_rounds

SITES = 2
TARGET = 20.0
PATIENCE = 300.0  # seconds a run may take
HERE = __package__


def measure(repetitions: int = 20, stock_rounds: int = 4) -> Report:
    """Runs both ways, one after the other.

    Args:
        repetitions: rounds that are timed with resident sites.
        stock_rounds: rounds that are timed with stock SuperNodes.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        plan = large_plan(directory).replace(
            {
                "privacy.mechanism": "local",
                "rounds.count": repetitions + FIRST,
                "rounds.deadline": PATIENCE,
                "sites.count": SITES,
                "aggregation.sites": SITES,
            }
        )
        state = adapted_backbone(plan).state()
        size = sum(t.nbytes for t in state.values())
        resident = production_rounds(plan, directory / "resident")
        stock = in_stock(plan, directory / "stock", stock_rounds)
    ratio = Ratio(
        "a round", Way("stock SuperNodes", stock), Way("resident", resident.rounds), TARGET
    )
    figures = {"stock: a round, s (median)": ratio.slow.median} | resident.figures("resident")
    return Report(
        "federation_overhead",
        f"{SITES} sites over a SuperLink, {size / 1e6:.1f} MB in {len(state)} tensors, no compute",
        ratios=(ratio,),
        figures=figures,
        notes=(
            f"Rounds: {len(resident.rounds)} resident, after {FIRST}; {len(stock)} stock, after 1.",
            "Resident sites have mutual TLS, gateway and ledgers; the stock way has no TLS at all.",
        ),
    )


def in_stock(plan: Plan, directory: Path, rounds: int) -> tuple[float, ...]:
    """Rounds of `flower-superlink` and two `flower-supernode`, which register themselves."""
    directory.mkdir()
    with ExitStack() as stack:
        address = stack.enter_context(superlink(directory))
        runs = stack.enter_context(Runs(address))
        for number in range(SITES):
            stack.enter_context(supernode(address, directory, f"site-{number}"))
        plan = plan.replace({"privacy.mechanism": "none"})  # it sums and steps as `local` does
        return timed_run(plan, runs, directory / "run", rounds)


def timed_run(plan: Plan, runs: Runs, directory: Path, rounds: int) -> tuple[float, ...]:
    """One run of `rounds` timed rounds and one before them."""
    directory.mkdir()
    plan = plan.replace({"rounds.count": rounds + 1})
    config = {
        "plan": plan.canonical,
        "directory": str(directory),
        "sites": ",".join(map(str, wait_for_nodes(runs))),
    }
    finish(runs, runs.start_bundle(bundle("flower_app"), config))
    ends = json.loads((directory / "measured.json").read_text(encoding="utf-8"))
    return tuple(later - earlier for earlier, later in pairwise(ends))


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
