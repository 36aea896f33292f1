"""The port that Prometheus reads, on loopback only.

Metrics are for whoever looks after this machine. Anybody on it may read them, so nothing measured
on a record is among them; nobody else may, so no other address is listened on. A collector on this
machine (Prometheus itself, its agent, node_exporter) takes them further if the site wants that.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, start_http_server

from fedgraft_common.errors import FedgraftError

log = logging.getLogger(__name__)


def check_loopback(
    address: str, key: str, error: type[FedgraftError] = FedgraftError
) -> tuple[str, int]:
    """Host and port of a loopback address.

    Args:
        address: `127.0.0.1:PORT` or `[::1]:PORT`.
        key: what it was configured as, for the error.
        error: the kind of error.

    Raises:
        FedgraftError: of the kind given; another address, or none.
    """
    host, _, port = address.rpartition(":")
    try:
        is_loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
        number = int(port)
    except ValueError:
        is_loopback, number = False, -1
    if not is_loopback or not 0 <= number < 2**16:
        raise error(
            key, address, "127.0.0.1:PORT or [::1]:PORT",
            "Only this machine may read it; let a collector on this machine pass it on.",
        )  # fmt: skip
    return host.strip("[]"), number


@contextlib.contextmanager
def serve_metrics(
    registry: CollectorRegistry, address: str, error: type[FedgraftError] = FedgraftError
) -> Iterator[int]:
    """Answers Prometheus until the context ends.

    Args:
        registry: what is served; never the process' default one.
        address: loopback `host:port`; port 0 takes a free one.
        error: the kind of error to raise.

    Yields:
        The port.

    Raises:
        FedgraftError: of the kind given; not a loopback address, or the port is taken.
    """
    host, port = check_loopback(address, "metrics address", error)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as failure:
        raise error(
            "metrics address", f"{address}: {failure.strerror}", "a free port",
            "Choose another port, or stop what listens there.",
        ) from None  # fmt: skip
    log.info("metrics on port %d", server.server_port, extra={"action": "metrics-up"})
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
