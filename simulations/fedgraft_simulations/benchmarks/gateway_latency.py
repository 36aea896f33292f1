"""What the gateway adds to a call: a real SuperLink, asked through the gateway and directly.

Both ways are TLS over loopback with Flower's own client on a connection that stays open, in turn,
against the same process. The gateway's way has mutual TLS, and a second TLS hop to the SuperLink.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedgraft_client.identity import Identity, join
from fedgraft_simulations.benchmarks.measure import Ratio, Report, Way, alternate, timed

_COMMAND = (sys.executable, "-c", "from fedgraft_common.cli import main; main()", "server")
_PADDING_FIELD = b"\x7a"  # field 15, length-delimited: Flower keeps and ignores what it lacks
_START = 60.0  # seconds a SuperLink may take to start


def measure(repetitions: int = 200) -> Report:
    """Times empty polls, and polls with 1.1 MB of padding in the request."""
    with tempfile.TemporaryDirectory() as name, _site(Path(name)) as (identity, port):
        direct = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        direct.load_verify_locations(identity.directory / "ca.pem")
        with (
            _client(f"https://127.0.0.1:{port}", direct, identity) as straight,
            _client(f"https://{identity.facts.gateway}", identity.ssl_context(), identity) as gated,
        ):
            key = (identity.directory / "node.pub").read_bytes()
            request = ActivateNodeRequest(public_key=key, heartbeat_interval=300)
            node = Node(node_id=gated.ActivateNode(request).node_id)
            ratios, figures = [], {}
            for what, size, times in (
                ("an empty poll", 0, repetitions),
                ("1.1 MB in a request", 1_100_000, max(repetitions // 4, 1)),
            ):
                poll = _padded(PullMessagesRequest(node=node), size)
                alternate([lambda p=poll: timed(lambda: gated.PullMessages(p))], 3)  # type: ignore[misc]
                through, past = alternate(
                    [
                        lambda p=poll: timed(lambda: gated.PullMessages(p)),  # type: ignore[misc]
                        lambda p=poll: timed(lambda: straight.PullMessages(p)),  # type: ignore[misc]
                    ],
                    times,
                )
                ratio = Ratio(what, Way("through the gateway", through), Way("directly", past))
                ratios.append(ratio)
                figures[f"added to {what}, ms"] = 1e3 * (ratio.slow.median - ratio.fast.median)
            gated.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
    return Report(
        "gateway_latency",
        "One Fleet call on loopback with TLS",
        ratios=tuple(ratios),
        figures=figures,
        notes=("A round takes about ten calls of a site, of which two or three carry tensors.",),
    )


def _padded(request: PullMessagesRequest, size: int) -> PullMessagesRequest:
    if size:
        length, digits = size, bytearray()
        while length > 0x7F:
            digits.append(length & 0x7F | 0x80)
            length >>= 7
        request.MergeFromString(_PADDING_FIELD + bytes([*digits, length]) + os.urandom(size))
    return request


def _client(
    url: str, context: ssl.SSLContext, identity: Identity
) -> contextlib.closing[FleetHttpClient]:
    authentication = NodeAuthHttpInterceptor(*identity.node_keys)
    return contextlib.closing(FleetHttpClient(url, interceptors=[authentication], verify=context))


@contextlib.contextmanager
def _site(directory: Path) -> Iterator[tuple[Identity, int]]:
    """A server with one site; yields its identity and the SuperLink's port."""
    port = _free_ports(5)
    server, log = str(directory / "server"), directory / "log"
    options = ["--host", "localhost", "--bind", "127.0.0.1", "--port", str(port)]
    subprocess.run([*_COMMAND, "init", server, *options], check=True, stdout=subprocess.DEVNULL)
    settings = directory / "server" / "federation.toml"
    settings.write_text(settings.read_text().replace("second = 100.0", "second = 100000.0"))
    with log.open("wb") as output:
        process = subprocess.Popen([*_COMMAND, "up", server], stdout=output, stderr=output)
    try:
        _wait(log, "action=ready")
        invite = subprocess.run(
            [*_COMMAND, "invite", "a", "--dir", server], check=True, capture_output=True, text=True
        )
        identity = join(invite.stdout, directory / "site")
        _wait(log, "Created node_id")
        yield identity, port + 3
    finally:
        process.terminate()
        process.wait(60)


def _wait(log: Path, text: str) -> None:
    deadline = time.monotonic() + _START
    while text not in log.read_text():
        if time.monotonic() > deadline:
            raise TimeoutError(log.read_text())
        time.sleep(0.1)


def _free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, OverflowError):
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            for following in range(port + 1, port + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", following))
            return port
