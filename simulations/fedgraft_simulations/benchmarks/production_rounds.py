"""Rounds of a real federation that computes nothing: gateway, mutual TLS, ledgers and all.

    secure, 3 sites    1.1 MB of adapters in 120 tensors, secure aggregation
    secure, 8 sites    the demo plan's adapter (6 kB), secure aggregation

The local mechanism is in `federation_overhead`, beside stock Flower.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Final

import psutil

from fedgraft_common.adapted import adapted_backbone
from fedgraft_common.backbone import load_backbone
from fedgraft_common.plan import Plan, load_plan
from fedgraft_simulations.benchmarks.glyph_vit import glyph_vit
from fedgraft_simulations.benchmarks.idle_site import TRAFFIC
from fedgraft_simulations.benchmarks.measure import Report
from fedgraft_simulations.cli import PLANS
from fedgraft_simulations.federation.__main__ import begin, follow
from fedgraft_simulations.federation.kills import words
from fedgraft_simulations.federation.processes import Federation
from fedgraft_simulations.partition import partition

SITE = f"{__package__}.idle_site"
LOOK = 0.01  # seconds
FIRST: Final = 2  # rounds that are not counted: they set the sites up
_PROCESSES: Final = {
    "flower-superlink": "SuperLink", "flwr-serverapp": "ServerApp", "server up": "gateway",
    SITE: "sites",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Production:
    """One run.

    Attributes:
        rounds: seconds of each counted round.
        processors: processor seconds of a round, by process.
        sent: bytes of a site in a round, headers of requests included, TLS not.
        received: the same, contents of answers.
        calls: of a site in a round.
    """

    rounds: tuple[float, ...]
    processors: dict[str, float]
    sent: float
    received: float
    calls: float

    def figures(self, name: str) -> dict[str, float]:
        """For a report."""
        found = {
            f"{name}: a round, s (median)": median(self.rounds),
            f"{name}: a round, s (fastest)": min(self.rounds),
            f"{name}: a round, s (mean)": fmean(self.rounds),
        }
        for process, seconds in self.processors.items():
            found[f"{name}: processor seconds of a round, {process}"] = seconds
        return found | {
            f"{name}: a site and round, kB sent": self.sent / 1e3,
            f"{name}: a site and round, kB received": self.received / 1e3,
            f"{name}: a site and round, calls": self.calls,
        }


def measure(repetitions: int = 20) -> Report:
    """Runs both federations, one after the other.

    Args:
        repetitions: rounds that are counted.
    """
    count = {"rounds.count": repetitions + FIRST}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        large, demo = large_plan(directory), load_plan(PLANS / "digits.toml")
        secure = {"privacy.mechanism": "distributed", "training.sample_rate": 0.5, **count}
        figures: dict[str, float] = {}
        for plan, sites in ((large, 3), (demo, 8)):
            plan = plan.replace({**secure, "sites.count": sites, "aggregation.sites": sites})
            size = sum(tensor.nbytes for tensor in adapted_backbone(plan).state().values())
            found = production_rounds(plan, directory / f"{sites}-sites")
            figures |= found.figures(f"{sites} sites, {size / 1e3:.3g} kB")
    return Report(
        "production_rounds",
        "rounds as in production, secure aggregation, no compute",
        figures=figures,
        notes=(f"{repetitions} rounds each, after {FIRST} that set the sites up.",),
    )


def large_plan(directory: Path) -> Plan:
    """1.1 MB of adapters in 120 tensors, as in `round_overhead`; makes their backbone."""
    return Plan().replace(
        {
            "backbone.source": f"dir:{glyph_vit(directory, steps=0)}",
            "adapter.method": "lora",
            "adapter.layers": "last:10",
        }
    )


def production_rounds(plan: Plan, directory: Path) -> Production:
    """Runs a plan and times every round but the first two.

    Args:
        plan: says how many sites and rounds; a backbone of its own is pinned here, as sites ask.
        directory: new; holds server and sites.

    Raises:
        ServerError: the run failed.
    """
    if plan.backbone.source.startswith("dir:"):
        plan = plan.replace({"backbone.sha256": load_backbone(plan.backbone).sha256})
    ends: dict[int, float] = {}
    spent: list[dict[str, float]] = []
    with Federation(directory, plan) as federation:
        federation.start_server()
        for number, share in enumerate(partition(plan)):
            federation.join(share, plan)
            site_file = str(directory / share.name / "site.toml")
            command = ["-m", SITE, site_file, str(federation.plan_file), str(number)]
            federation.start(share.name, [sys.executable, *command])
        folder = begin(federation)
        while len(ends) < plan.rounds.count and not (folder / "outcome.json").exists():
            for path in folder.glob("round-*.safetensors"):
                ends.setdefault(int(path.stem[6:]), _written(path))
            ends.pop(0, None)
            if len(spent) == 0 and len(ends) >= FIRST:
                spent.append(processor_seconds())
            time.sleep(LOOK)
        spent.append(processor_seconds())
        follow(federation, folder, lambda _: None)
    times = [ends[number] for number in sorted(ends)][FIRST - 1 :]
    rounds = tuple(later - earlier for earlier, later in pairwise(times))
    processors = {
        name: (seconds - spent[0].get(name, 0.0)) / len(rounds)
        for name, seconds in spent[-1].items()
    }
    return Production(rounds, processors, *_traffic(directory))


def processor_seconds() -> dict[str, float]:
    """Of the federation's processes so far; those of a kind together."""
    total = dict.fromkeys(_PROCESSES.values(), 0.0)
    for child in psutil.Process().children(recursive=True):
        line = words(child)
        kind = next((kind for word, kind in _PROCESSES.items() if word in line), None)
        if kind is not None:
            times = child.cpu_times()
            total[kind] += times.user + times.system
    return total


def _traffic(directory: Path) -> tuple[float, float, float]:
    """Bytes sent, bytes received and calls of a site in a round, of all sites and later rounds."""
    found: list[tuple[float, ...]] = []
    for file in sorted(directory.glob(f"*/{TRAFFIC}")):
        totals = json.loads(file.read_text(encoding="utf-8"))[FIRST:]
        found += [
            tuple(b - a for a, b in zip(before, after, strict=True))
            for before, after in pairwise(totals)
        ]
    sent, received, calls = (fmean(column) for column in zip(*found, strict=True))
    return sent, received, calls


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # an old checkpoint that was removed at this moment
        return 0.0
