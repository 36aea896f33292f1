"""Rounds of a real federation that computes nothing: gateway, mutual TLS, ledgers and all."""

from __future__ import annotations

import sys
import time
from itertools import pairwise
from pathlib import Path

from fedgraft_common.backbone import load_backbone
from fedgraft_common.plan import Plan
from fedgraft_simulations.federation.__main__ import begin, follow
from fedgraft_simulations.federation.processes import Federation
from fedgraft_simulations.partition import partition

SITE = f"{__package__}.idle_site"
LOOK = 0.01  # seconds


def production_rounds(plan: Plan, directory: Path) -> tuple[float, ...]:
    """Seconds of each round but the first two, which set the sites up.

    Args:
        plan: says how many sites and rounds; a backbone of its own is pinned here, as sites ask.
        directory: new; holds server and sites.

    Raises:
        ServerError: the run failed.
    """
    if plan.backbone.source.startswith("dir:"):
        plan = plan.replace({"backbone.sha256": load_backbone(plan.backbone).sha256})
    ends: dict[int, float] = {}
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
            time.sleep(LOOK)
        follow(federation, folder, lambda _: None)
    times = [ends[number] for number in sorted(ends)][1:]
    return tuple(later - earlier for earlier, later in pairwise(times))


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # an old checkpoint that was removed at this moment
        return 0.0
