"""Lets others on the machine see how a daemon does: status file, metrics, health service."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fedgraft_client.daemon import Daemon
from fedgraft_client.health import Health, heartbeat
from fedgraft_client.site_file import SiteFile
from fedgraft_common.accounting import SamplingEvent
from fedgraft_common.errors import PolicyError


@contextlib.contextmanager
def monitored(
    daemon: Daemon, file: SiteFile, status: Path, spent: Callable[[], Sequence[SamplingEvent]]
) -> Iterator[None]:
    """Hooks everything that the site file asks for to a daemon that does not run yet.

    Args:
        daemon: its `on_change` goes on being called, first.
        file: `[monitoring]` and the policy's limits.
        status: the status file, which a heartbeat keeps fresh.
        spent: the ledger's events; `Ledger.spent`.

    Raises:
        PolicyError: a port of `[monitoring]` is taken.
    """
    one_at_a_time = threading.Lock()  # or the heartbeat could put an older state back

    def save(health: Health) -> None:
        with one_at_a_time:
            health.write(status)

    def beat() -> None:
        if daemon.health.since:  # it has begun
            save(daemon.health)

    listeners: list[Callable[[Health], None]] = [daemon.on_change, save]
    ports = file.monitoring
    with contextlib.ExitStack() as stack:
        if ports.metrics_port is not None:
            from fedgraft_client.metrics import Metrics
            from fedgraft_common.metrics_port import serve_metrics

            policy = file.policy
            metrics = Metrics(spent, policy.maximum_epsilon, policy.maximum_delta)
            address = f"127.0.0.1:{ports.metrics_port}"
            stack.enter_context(serve_metrics(metrics.registry, address, PolicyError))
            listeners.append(metrics.on_change)
            daemon.on_answer = metrics.on_answer
        if ports.health_port is not None:
            from fedgraft_client.health_service import serve_health

            served = stack.enter_context(serve_health(f"127.0.0.1:{ports.health_port}"))
            listeners.append(served.on_change)
        stack.enter_context(heartbeat(beat))

        def tell(health: Health) -> None:
            for listener in listeners:
                listener(health)

        daemon.on_change = tell
        yield
