"""The ServerApps of `federation_overhead`: the same rounds over two grids, timed.

A SuperLink loads them by name in a process of its own, so they read what to do from the run's
configuration and write what they measured to a file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedgraft_server.app import GATHERING, read_run_config
from fedgraft_server.federation import RoundSummary, run_federation
from fedgraft_server.superlink_grid import SuperlinkGrid


class Watch:
    """Seconds spent in each part of the work, and when each round ended."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.ends: list[float] = []

    def timed(self, part: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """Calls something and adds its seconds to a part; the first round is not counted."""
        started = time.perf_counter()
        try:
            return action(*arguments)
        finally:
            if self.ends:
                seconds = time.perf_counter() - started
                self.spent[part] = self.spent.get(part, 0.0) + seconds

    def note(self, summary: RoundSummary) -> None:
        """A round ended."""
        self.ends.append(time.perf_counter())

    def write(self, path: Path) -> None:
        """Leaves the measurements for the benchmark."""
        path.write_text(json.dumps({"ends": self.ends, "spent": self.spent}), encoding="utf-8")


class TimedGrid(SuperlinkGrid):
    """Fedgraft's grid with a watch on its parts."""

    def __init__(self, grid: Grid, sites: Collection[int], watch: Watch) -> None:
        super().__init__(grid, sites, sleep=lambda s: watch.timed("waiting", time.sleep, s))
        self._watch = watch

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Timed as `asking`."""
        ids: Iterable[str] = self._watch.timed("asking", super().push_messages, messages)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Timed as `fetching`."""
        replies: Iterable[Message] = self._watch.timed(
            "fetching", super().pull_messages, message_ids
        )
        return replies


fedgraft_app = ServerApp()
flower_app = ServerApp()


@fedgraft_app.main()
def fedgraft_main(grid: Grid, context: Context) -> None:
    """The run over Fedgraft's grid."""
    plan, directory, sites = read_run_config(context.run_config)
    watch = Watch()
    ours = TimedGrid(grid, sites, watch)
    ours.wait_for_sites(GATHERING)
    run_federation(plan, ours, directory, watch.note)
    watch.write(directory / "measured.json")


@flower_app.main()
def flower_main(grid: Grid, context: Context) -> None:
    """The run over Flower's own grid."""
    plan, directory, sites = read_run_config(context.run_config)
    watch = Watch()
    while len(list(grid.get_node_ids())) < len(sites):
        time.sleep(0.1)
    run_federation(plan, grid, directory, watch.note)
    watch.write(directory / "measured.json")
