"""What Prometheus may know about a federation server, and how it gets from runs to one port.

A run computes in a process of its own, which Flower starts and ends. It writes its counts into its
run directory (`metrics.prom`, Prometheus' text format); `fedgraft server up` adds up the files of
all runs when somebody asks. So a count outlives its process, and a resumed run goes on counting.

The server's own process does without torch, so nothing that needs it is imported here.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from fedgraft_common.atomic import write_atomically
from fedgraft_common.errors import FedgraftError, ServerError
from fedgraft_common.metrics_port import serve_metrics
from fedgraft_server.registry import Registry
from fedgraft_server.runs import Runs
from fedgraft_server.settings import ServerDirectory
from fedgraft_server.superlink import SuperLink

if TYPE_CHECKING:
    from flwr.app import Message

    from fedgraft_server.federation import RoundSummary

log = logging.getLogger(__name__)
FILE: Final = "metrics.prom"
ROUNDS: Final = "fedgraft_server_rounds"
UPDATES: Final = "fedgraft_server_updates"
CONNECTED: Final = "fedgraft_server_sites_connected"
_WORD: Final = re.compile(r"[a-z][a-z-]{0,31}")
_ROUND: Final = "train"  # Flower's type of the messages that are rounds


class RunMetrics:
    """One run's counts.

    Args:
        file: where they are kept; what is there already is counted on. None: nowhere.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.registry = CollectorRegistry()
        self._file = file
        self._rounds = Counter(ROUNDS, "Rounds finished.", registry=self.registry)
        self._updates = Counter(
            UPDATES, "Replies of sites to rounds, by status.", ["status"], registry=self.registry
        )
        known = read_counts(file) if file is not None else {}
        for (name, status), value in known.items():
            counter = self._rounds if name == ROUNDS else self._updates.labels(status)
            counter.inc(value)

    def on_reply(self, reply: Message) -> None:
        """For `SuperlinkGrid`; counts replies to rounds, not to other messages."""
        if reply.metadata.message_type.partition(".")[0] != _ROUND:
            return
        from fedgraft_common.messages import read_status

        self._updates.labels(read_status(reply).value).inc()

    def on_round(self, summary: RoundSummary) -> None:
        """For `run_federation`: the round counts, and the file is written anew."""
        self._rounds.inc()
        if self._file is not None:
            write_atomically(self._file, generate_latest(self.registry), durable=False)


def read_counts(file: Path) -> dict[tuple[str, str], float]:
    """The counts of a run: (name, status) to value; empty if there are none or they are damaged.

    Counts are for looking at: a file that cannot be read must not stop a run.
    """
    counts: dict[tuple[str, str], float] = {}
    try:
        for family in text_string_to_metric_families(file.read_text(encoding="utf-8")):
            for sample in family.samples:
                status = sample.labels.get("status", "")
                is_ours = sample.name in (f"{ROUNDS}_total", f"{UPDATES}_total")
                if (
                    is_ours
                    and (family.name == ROUNDS or _WORD.fullmatch(status))
                    and sample.value >= 0
                ):
                    counts[family.name, status] = float(sample.value)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s: %s; counting from zero", file, error, extra={"action": "metrics"})
        return {}
    return counts


class Totals(Collector):
    """Adds up the counts of all runs each time they are asked for.

    Args:
        runs: holds one directory for each run.
        connected: how many sites are connected; may raise `FedgraftError`, then nothing is said.
    """

    def __init__(self, runs: Path, connected: Callable[[], int]) -> None:
        self._runs, self._connected = runs, connected

    def collect(self) -> Iterable[Metric]:
        """Three families."""
        totals = {(ROUNDS, ""): 0.0, (UPDATES, "ok"): 0.0, (UPDATES, "failed"): 0.0}
        for file in sorted(self._runs.glob(f"*/{FILE}")):
            for key, value in read_counts(file).items():
                totals[key] = totals.get(key, 0.0) + value
        yield CounterMetricFamily(ROUNDS, "Rounds finished.", totals.pop((ROUNDS, "")))
        updates = CounterMetricFamily(
            UPDATES, "Replies of sites to rounds, by status.", labels=["status"]
        )
        for (_, status), value in sorted(totals.items()):
            updates.add_metric([status], value)
        yield updates
        with contextlib.suppress(FedgraftError):
            yield GaugeMetricFamily(CONNECTED, "Sites connected.", self._connected())


def connected_sites(runs: Runs) -> int:
    """How many sites the SuperLink holds for connected.

    Raises:
        ServerError: it cannot be reached.
    """
    return sum(node.status == "online" for node in runs.nodes())


@contextlib.contextmanager
def serve(directory: ServerDirectory, registry: Registry) -> Iterator[int]:
    """The port of a server directory, beside its gateway (`fedgraft server up`).

    Args:
        directory: its `[monitoring] metrics_port` is served on 127.0.0.1.
        registry: not asked; every service gets it.

    Yields:
        The port; 0 if none is wanted.

    Raises:
        ServerError: the port is taken.
    """
    settings = directory.settings()
    port = settings.monitoring.metrics_port
    if port is None:
        yield 0
        return
    superlink = SuperLink(directory, settings)
    with Runs(superlink.address, superlink.client_context()) as runs:
        totals = CollectorRegistry()
        totals.register(Totals(directory.runs, lambda: connected_sites(runs)))
        with serve_metrics(totals, f"127.0.0.1:{port}", ServerError) as served:
            yield served
