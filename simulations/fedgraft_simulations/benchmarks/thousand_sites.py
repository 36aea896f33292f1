"""A thousand simulated sites in one process: time per round and peak memory.

    python -m fedgraft_simulations.benchmarks.thousand_sites PLAN.json DIRECTORY

runs the job itself; `measure` starts it in a process of its own, so that the peak is its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from fedgraft_client.app import client_app
from fedgraft_common.plan import Plan, parse_plan
from fedgraft_server.federation import RoundSummary, server_app
from fedgraft_simulations.benchmarks.measure import Report, peak_memory
from fedgraft_simulations.local_grid import LocalGrid, local_context
from fedgraft_simulations.sites import SimulatedSites

LIMIT = 2e9  # bytes aimed at
MODULE = "fedgraft_simulations.benchmarks.thousand_sites"


def measure(
    sites: int = 1000,
    rounds: int = 3,
    records: int = 20,
    mechanism: str = "distributed",
    backbone: str = "embedded:glyphs",
) -> Report:
    """Runs a federation over synthetic 8x8 images.

    Args:
        sites: how many.
        rounds: how many.
        records: per site, a fifth of them held out.
        mechanism: `local` or `distributed`.
        backbone: as in a plan.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_images(directory / "images.npz", sites * records)
        plan = crowd_plan(directory, sites, rounds, records, mechanism, backbone)
        path = directory / "plan.json"
        path.write_text(plan.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", MODULE, str(path), str(directory / "run")]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return Report(
        "thousand_sites",
        f"{sites} sites of {records} records, {rounds} rounds, {mechanism} mechanism",
        figures=figures,
        notes=(f"Aim: a peak below {LIMIT / 1e9:g} GB, and no process per site.",),
    )


def crowd_plan(
    directory: Path, sites: int, rounds: int, records: int, mechanism: str, backbone: str
) -> Plan:
    """Many small sites, half of whose records are in a step; images are in `directory`.

    Sums are in the open: each masks with every other, which `secure_aggregation` measures.
    """
    return Plan().replace(
        {
            "name": "thousand-sites",
            "backbone.source": backbone,
            "adapter.method": "film",
            "training.sample_rate": 0.5,
            "training.expected_batch": records * 0.4,
            "privacy.mechanism": mechanism,
            "privacy.secure_aggregation": "summed",
            "aggregation.sites": sites,
            "rounds.count": rounds,
            "data.source": f"npz:{directory / 'images.npz'}",
            "sites.count": sites,
            "sites.partitioner": "IidPartitioner",
        }
    )


def write_images(path: Path, count: int) -> None:
    """Random 8x8 images of ten classes, as a plan's `npz:` source."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 8, 8), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(count) % 10)


def run(plan: Plan, directory: Path) -> dict[str, float]:
    """The job: figures by name."""
    started = time.perf_counter()
    before = len(psutil.Process().children(recursive=True))
    finished: list[float] = []

    def note(_: RoundSummary) -> None:
        finished.append(time.perf_counter())

    sites = SimulatedSites(plan, directory / "sites", "cpu")
    sites.all()
    built = time.perf_counter()
    server = server_app(plan, directory / "server", note, durable=False)
    server(LocalGrid(client_app(sites), plan.sites.count), local_context(0, 1))
    rounds = [b - a for a, b in zip([built, *finished[:-1]], finished, strict=True)]
    return {
        "making the sites, s": built - started,
        "first round (loads, checks, caches), s": rounds[0],
        "a later round, s": median(rounds[1:] or rounds),
        "peak memory, GB": peak_memory() / 1e9,
        "child processes": float(len(psutil.Process().children(recursive=True)) - before),
    }


if __name__ == "__main__":
    import logging

    logging.disable(logging.WARNING)
    loaded = parse_plan(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sys.argv[1])
    print(json.dumps(run(loaded, Path(sys.argv[2]))))
