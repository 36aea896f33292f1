"""`grpc.health.v1` at a site, on loopback, for whatever supervises the daemon there.

The empty name and `fedgraft.Site` are SERVING while the daemon runs and reaches the server, else
NOT_SERVING. Nothing but that is said.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedgraft_client.health import Health, State
from fedgraft_common.errors import PolicyError
from fedgraft_common.metrics_port import check_loopback

log = logging.getLogger(__name__)
SERVICE: Final = "fedgraft.Site"
_THREADS: Final = 4  # a watcher keeps one for as long as it watches
_GRACE: Final = 0.5  # seconds


@dataclass(frozen=True, slots=True)
class HealthService:
    """A running service.

    Attributes:
        port: where it listens.
        on_change: for `Daemon.on_change`.
    """

    port: int
    on_change: Callable[[Health], None]


@contextlib.contextmanager
def serve_health(address: str) -> Iterator[HealthService]:
    """Runs the service until the context ends; NOT_SERVING until it is told otherwise.

    Args:
        address: loopback `host:port`; port 0 takes a free one.

    Raises:
        PolicyError: not a loopback address, or the port is taken.
    """
    check_loopback(address, "health address", PolicyError)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="health") as pool:
        server = grpc.server(
            pool,
            options=(("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 4096)),
        )
        status: Any = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        try:
            port: int = server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if port == 0:
            raise PolicyError(
                "health address", address, "a free port",
                "Choose another port, or stop what listens there.",
            )  # fmt: skip

        def on_change(found: Health) -> None:
            well = found.connected and found.state is not State.STOPPED
            answer = health_pb2.HealthCheckResponse
            for name in ("", SERVICE):
                status.set(name, answer.SERVING if well else answer.NOT_SERVING)

        on_change(Health())
        server.start()
        log.info("health service on port %d", port, extra={"action": "health-up"})
        try:
            yield HealthService(port, on_change)
        finally:
            status.enter_graceful_shutdown()
            server.stop(_GRACE).wait()
