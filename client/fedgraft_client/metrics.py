"""What Prometheus may know about a site: how rounds went, and what they cost.

Epsilon, rounds and statuses follow from plans and from the clock; a loss, an accuracy or a count of
records is never here. How long a round takes follows the size of its batches, which is private:
these numbers are for the site's own machines (`fedgraft_common.metrics_port`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fedgraft_client.health import Health
from fedgraft_common.accounting import SamplingEvent, epsilon, epsilon_bound
from fedgraft_common.messages import Status

ROUND: Final = "train"
"""Flower's type of the messages that are rounds."""

SECONDS: Final = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
MANY: Final = 8  # mechanisms beyond which the accountant rounds up on a coarser grid


class Metrics:
    """One site's metrics, in a registry of their own.

    Args:
        spent: the ledger's events; `Ledger.spent`. Asked when somebody reads the metrics.
        limit: `policy.maximum_epsilon`.
        delta: `policy.maximum_delta`.
    """

    def __init__(
        self, spent: Callable[[], Sequence[SamplingEvent]], limit: float, delta: float
    ) -> None:
        self.registry = CollectorRegistry()
        self._spent, self._delta = spent, delta
        self._known: tuple[tuple[SamplingEvent, ...], float] = ((), 0.0)
        self._lock = threading.Lock()
        self._rounds = Counter(
            "fedgraft_rounds", "Rounds answered since the start, by status.", ["status"],
            registry=self.registry,
        )  # fmt: skip
        for status in Status:
            if status is not Status.KEPT:  # answers another kind of message
                self._rounds.labels(status.value)
        self._seconds = Histogram(
            "fedgraft_round_seconds", "Seconds from a round's request to its reply.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        Gauge(
            "fedgraft_epsilon_spent", "Epsilon that this data set has spent in its lifetime.",
            registry=self.registry,
        ).set_function(self._epsilon)  # fmt: skip
        Gauge("fedgraft_epsilon_limit", "Epsilon that it may spend.", registry=self.registry).set(
            limit
        )
        self._connected = Gauge(
            "fedgraft_connected", "1 while the server is reached, else 0.", registry=self.registry
        )
        self._last = Gauge(
            "fedgraft_last_round", "Number of the last round answered with an adapter.",
            registry=self.registry,
        )  # fmt: skip

    def on_change(self, health: Health) -> None:
        """For `Daemon.on_change`."""
        self._connected.set(health.connected)
        self._last.set(health.round)

    def on_answer(self, kind: str, status: Status, seconds: float) -> None:
        """For `Daemon.on_answer`; counts rounds, not other messages.

        Args:
            kind: Flower's message type.
            status: what the reply said.
            seconds: from the request to the reply.
        """
        if kind.partition(".")[0] == ROUND:
            self._rounds.labels(status.value).inc()
            self._seconds.observe(seconds)

    def _epsilon(self) -> float:
        """Computed in the reader's thread, and only when the ledger has grown."""
        events = tuple(self._spent())
        with self._lock:
            if events != self._known[0]:
                compose = epsilon_bound if len(events) > MANY else epsilon
                self._known = events, compose(events, self._delta)
            return self._known[1]
