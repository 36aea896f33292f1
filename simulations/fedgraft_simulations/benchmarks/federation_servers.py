"""The stock ServerApp of `federation_overhead`: Fedgraft's rounds over Flower's own grid, timed.

A SuperLink loads it by name in a process of its own, so it reads what to do from the run's
configuration and writes what it measured to a file.
"""

from __future__ import annotations

import json
import time

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedgraft_server.app import read_run_config
from fedgraft_server.federation import run_federation

flower_app = ServerApp()


@flower_app.main()
def flower_main(grid: Grid, context: Context) -> None:
    """The run; `measured.json` says when each round ended."""
    plan, directory, sites = read_run_config(context.run_config)
    ends: list[float] = []
    while len(list(grid.get_node_ids())) < len(sites):
        time.sleep(0.1)
    run_federation(plan, grid, directory, lambda _: ends.append(time.perf_counter()))
    (directory / "measured.json").write_text(json.dumps(ends), encoding="utf-8")
