"""`fedgraft server up` as a process, with a real SuperLink behind its gateway."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from flwr.proto.control_pb2 import ListNodesRequest, StartRunRequest
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error.http import INTERNAL_SERVER_ERROR_MESSAGE
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.runtime.runtime_http_client import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedgraft_client.identity import Identity
from fedgraft_common.errors import ServerError
from fedgraft_server.gateway import FLEET_PATHS
from fedgraft_server.runs import STUB, Runs, stub

if TYPE_CHECKING:
    from conftest import Federation  # type: ignore[import-not-found]
else:
    Federation = Any

COMMAND = "from fedgraft_common.cli import main; main()"


@dataclass
class Server:
    """A running `fedgraft server up`."""

    federation: Federation
    process: subprocess.Popen[bytes]
    log: Path

    def wait_for(self, text: str, count: int = 1) -> None:
        deadline = time.monotonic() + 150  # the machine may be busy
        while self.log.read_text().count(text) < count:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def child(self, program: str) -> psutil.Process:
        """`flower-superlink` or `flower-superexec`."""
        children = psutil.Process(self.process.pid).children()
        (child,) = [c for c in children if program in " ".join(c.cmdline())]
        return child

    def superlink(self) -> psutil.Process:
        """The one that carries messages."""
        return self.child("flower-superlink")

    def loopback(self) -> tuple[str, ssl.SSLContext]:
        """What only this machine can reach."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.federation.directory.ca[0])
        return f"https://127.0.0.1:{self.federation.settings.superlink.port}", context


@contextlib.contextmanager
def running(federation: Federation, log: Path) -> Iterator[Server]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "server", "up", str(federation.directory.path)],
            stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ),
        )  # fmt: skip
    try:
        server = Server(federation, process, log)
        server.wait_for("action=ready")
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, new_federation: Callable[[Path], Federation]
) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("federation")
    with running(new_federation(path), path / "log") as started:
        yield started


@pytest.fixture(scope="module")
def north(server: Server) -> Identity:
    identity: Identity = server.federation.join("north")
    server.wait_for("[ControlServicer.RegisterNode] Created node_id")
    return identity


@pytest.fixture(scope="module")
def south(server: Server, north: Identity) -> Identity:
    identity: Identity = server.federation.join("south")
    server.wait_for("[ControlServicer.RegisterNode] Created node_id", 2)
    return identity


def fleet(
    server: Server, context: ssl.SSLContext, keys: tuple[Any, Any]
) -> contextlib.closing[FleetHttpClient]:
    """Flower's own client, as a site uses it."""
    return contextlib.closing(
        FleetHttpClient(
            f"https://{server.federation.settings.gateway_address}",
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(*keys),
            ],
            verify=context,
            timeout=10.0,
        )
    )


@contextlib.contextmanager
def active(server: Server, identity: Identity) -> Iterator[tuple[FleetHttpClient, Node]]:
    """A site's node, online."""
    with fleet(server, identity.ssl_context(), identity.node_keys) as client:
        key = public_key_to_bytes(identity.node_keys[1])
        request = ActivateNodeRequest(public_key=key, heartbeat_interval=10)
        node = Node(node_id=client.ActivateNode(request).node_id)
        yield client, node
        client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))


def test_a_site_activates_beats_and_pulls(server: Server, north: Identity) -> None:
    with active(server, north) as (client, node):
        beat = SendNodeHeartbeatRequest(node=node, heartbeat_interval=10)
        assert client.SendNodeHeartbeat(beat).success
        assert not client.PullMessages(PullMessagesRequest(node=node)).messages_list
        with server.federation.registry as registry:
            assert registry.node_ids(names=["north"]) == {"north": node.node_id}


def test_the_superlink_listens_on_loopback_only(server: Server) -> None:
    listening = [c for c in server.superlink().net_connections() if c.status == "LISTEN"]
    table = server.federation.settings.superlink
    found = {(c.laddr.ip.removeprefix("::ffff:"), c.laddr.port) for c in listening}
    assert found == {("127.0.0.1", table.port), ("127.0.0.1", table.fleet_port)}


def test_the_calls_of_a_round_go_over_grpc(server: Server, north: Identity) -> None:
    """Flower calls HTTP paths in its log, and gRPC's by name: none of these is among the paths."""
    with active(server, north) as (client, node):
        client.PullMessages(PullMessagesRequest(node=node))
        missing = ConfirmMessageReceivedRequest(node=node, run_id=1, message_object_id="0" * 64)
        with pytest.raises(httpx.HTTPStatusError) as caught:  # there is no such run
            client.ConfirmMessageReceived(missing)
    assert caught.value.response.json() == {"detail": INTERNAL_SERVER_ERROR_MESSAGE}
    log = server.log.read_text()
    assert "/v1/fleet/activate-node" in log
    assert "/v1/fleet/pull-messages" not in log
    assert "/v1/fleet/confirm-message-received" not in log


# --- attackers


def outsider(server: Server, north: Identity, south: Identity) -> tuple[ssl.SSLContext, Any]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(server.federation.directory.ca[0])
    return context, generate_key_pairs()


def with_a_stolen_node_key(
    server: Server, north: Identity, south: Identity
) -> tuple[ssl.SSLContext, Any]:
    return outsider(server, north, south)[0], north.node_keys


def with_a_stolen_node_key_and_another_certificate(
    server: Server, north: Identity, south: Identity
) -> tuple[ssl.SSLContext, Any]:
    return south.ssl_context(), north.node_keys


def a_site(server: Server, north: Identity, south: Identity) -> tuple[ssl.SSLContext, Any]:
    return south.ssl_context(), south.node_keys


ATTEMPTS: dict[str, Callable[[Any], object]] = {
    "register": lambda c: c(FleetHttpClient).RegisterNode(
        RegisterNodeFleetRequest(public_key=public_key_to_bytes(generate_key_pairs()[1]))
    ),
    "get-fab": lambda c: c(FleetHttpClient).GetFab(GetFabRequest(run_id=1, hash_str="0" * 64)),
    "start-run": lambda c: c(ControlHttpClient).StartRun(StartRunRequest()),
    "list-nodes": lambda c: c(ControlHttpClient).ListNodes(ListNodesRequest()),
    "acquire-task": lambda c: c(RuntimeHttpClient).AcquireTask(AcquireTaskRequest()),
}


ATTACKERS: list[Callable[..., tuple[ssl.SSLContext, Any]]] = [
    outsider,
    with_a_stolen_node_key,
    with_a_stolen_node_key_and_another_certificate,
    a_site,
]


@pytest.mark.parametrize("attempt", ATTEMPTS)
@pytest.mark.parametrize("attacker", ATTACKERS)
def test_attacks_end_at_the_gateway(
    server: Server,
    north: Identity,
    south: Identity,
    attempt: str,
    attacker: Callable[..., tuple[ssl.SSLContext, Any]],
) -> None:
    context, keys = attacker(server, north, south)
    before = server.log.read_text().count("[uvicorn.access]")
    with contextlib.ExitStack() as stack:

        def client(kind: Any) -> Any:
            return stack.enter_context(
                contextlib.closing(
                    kind(
                        f"https://{server.federation.settings.gateway_address}",
                        interceptors=[NodeAuthHttpInterceptor(*keys)],
                        verify=context,
                        timeout=10.0,
                    )
                )
            )

        with pytest.raises(httpx.HTTPError) as caught:
            ATTEMPTS[attempt](client)
    has_certificate = attacker in (a_site, with_a_stolen_node_key_and_another_certificate)
    if has_certificate:
        assert isinstance(caught.value, httpx.HTTPStatusError)
        assert caught.value.response.status_code == 403
        assert "refuse-path" in server.log.read_text()
    else:
        assert isinstance(caught.value, httpx.TransportError)
        assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in server.log.read_text()
    assert server.log.read_text().count("[uvicorn.access]") == before  # nothing got through


SHUT = sorted({path for _, path in PROTOBUF_REQUEST_TYPES} - set(FLEET_PATHS.values()))


@pytest.mark.parametrize("attacker", ATTACKERS)
def test_every_other_call_of_flower_ends_at_the_gateway(
    server: Server,
    north: Identity,
    south: Identity,
    attacker: Callable[..., tuple[ssl.SSLContext, Any]],
) -> None:
    """Control and Runtime as a whole, and what is left of Fleet, self-registration among it."""
    kinds = {path.split("/")[2] for path in SHUT}
    assert {"control", "runtime"} <= kinds and "/v1/fleet/register-node" in SHUT
    assert len(SHUT) > 60
    context, keys = attacker(server, north, south)
    before = server.log.read_text().count("[uvicorn.access]")
    url = f"https://{server.federation.settings.gateway_address}"
    signing = NodeAuthHttpInterceptor(*keys)
    with httpx.Client(verify=context, timeout=10.0) as client:

        def ask(path: str) -> int:
            request = client.build_request("POST", url + path)
            asked = ProtobufRequestContext("", Node(), request)
            return signing.intercept(asked, lambda c: client.send(c.request)).status_code

        for path in (*SHUT, "/health"):
            try:
                assert ask(path) == 403, path
            except httpx.TransportError:
                assert attacker in (outsider, with_a_stolen_node_key), path
            else:
                assert attacker not in (outsider, with_a_stolen_node_key), path
    assert server.log.read_text().count("[uvicorn.access]") == before


HOSTILE = """
from pathlib import Path
from flwr.serverapp import ServerApp
Path({marker!r}).write_text("ran")
app = ServerApp()
@app.main()
def main(grid, context):
    pass
"""


def test_nobody_runs_a_program_on_the_server(
    server: Server, north: Identity, south: Identity, tmp_path: Path
) -> None:
    """A whole run with a program in it; on the port that the gateway hides, it is executed."""
    marker = tmp_path / "marker"
    text = stub()[STUB].decode().replace("fedgraft_server.app:app", "hostile:app")
    files = {STUB: text.encode(), "hostile.py": HOSTILE.format(marker=str(marker)).encode()}
    for attacker in ATTACKERS:
        context, _ = attacker(server, north, south)
        with (
            Runs(server.federation.settings.gateway_address, context) as runs,
            pytest.raises(ServerError, match=r"HTTP 403|ReadError|ConnectError|RemoteProtocol"),
        ):
            runs.start_bundle(files, {})
    url, context = server.loopback()
    with Runs(url.removeprefix("https://"), context) as runs:
        assert runs.all() == []
        runs.start_bundle(files, {})
        deadline = time.monotonic() + 120
        while not marker.exists():
            assert time.monotonic() < deadline, server.log.read_text()
            time.sleep(0.2)


def test_the_same_attacks_work_on_the_port_the_gateway_hides(server: Server) -> None:
    """So that the test above tests something."""
    url, context = server.loopback()
    with ControlHttpClient(url, verify=context) as control:
        control.ListNodes(ListNodesRequest())
        with pytest.raises(httpx.HTTPStatusError) as caught:
            control.StartRun(StartRunRequest())
        assert caught.value.response.status_code not in (401, 403, 404)
    with RuntimeHttpClient(url, verify=context) as runtime:
        runtime.AcquireTask(AcquireTaskRequest())


def test_a_stolen_node_key_does_not_open_the_nine_calls(
    server: Server, north: Identity, south: Identity
) -> None:
    with (
        fleet(server, south.ssl_context(), north.node_keys) as client,
        pytest.raises(httpx.HTTPStatusError, match="403"),
    ):
        client.ActivateNode(
            ActivateNodeRequest(
                public_key=public_key_to_bytes(north.node_keys[1]), heartbeat_interval=10
            )
        )
    with (
        active(server, north) as (_, node),
        fleet(server, south.ssl_context(), south.node_keys) as client,
        pytest.raises(httpx.HTTPStatusError, match="401"),  # and Flower refuses another's number
    ):
        client.PullMessages(PullMessagesRequest(node=node))


def test_malformed_protobuf_hurts_nobody(server: Server, north: Identity) -> None:
    with active(server, north) as (client, node):
        for path in FLEET_PATHS.values():
            for body in (b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x0f", os.urandom(2000)):
                request = httpx.Request(
                    "POST", f"https://{server.federation.settings.gateway_address}{path}",
                    content=body, headers={"content-type": "application/x-protobuf"},
                )  # fmt: skip
                context = ProtobufRequestContext("", node, request)
                answer = NodeAuthHttpInterceptor(*north.node_keys).intercept(
                    context, lambda c: client._client.send(c.request)
                )
                assert 400 <= answer.status_code < 500, (path, answer.status_code)
        assert not client.PullMessages(PullMessagesRequest(node=node)).messages_list


# --- life


def test_revoked_while_the_server_runs(server: Server) -> None:
    west = server.federation.join("west")
    server.wait_for("joined  [action=join site=west]")
    time.sleep(0.5)
    subprocess.run(
        [sys.executable, "-c", COMMAND, "server", "revoke", "west",
         "--dir", str(server.federation.directory.path)],
        check=True, timeout=60,
    )  # fmt: skip
    with fleet(server, west.ssl_context(), west.node_keys) as client:
        key = public_key_to_bytes(west.node_keys[1])
        with pytest.raises(httpx.HTTPStatusError, match="403") as caught:
            client.ActivateNode(ActivateNodeRequest(public_key=key, heartbeat_interval=10))
        assert "site west, revoked on" in caught.value.response.json()["error"]
    url, context = server.loopback()
    deadline = time.monotonic() + 10
    with ControlHttpClient(url, verify=context) as control:
        while True:
            nodes = control.ListNodes(ListNodesRequest()).nodes_info
            if key not in {n.public_key for n in nodes if n.status != "unregistered"}:
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_killed_superlink_comes_back_and_knows_its_sites(server: Server, north: Identity) -> None:
    with server.federation.registry as registry:
        before = registry.node_ids(names=["north"])
    ready = server.log.read_text().count("action=ready")
    server.superlink().send_signal(signal.SIGKILL)
    with (
        fleet(server, north.ssl_context(), north.node_keys) as client,
        pytest.raises(httpx.HTTPStatusError, match="503"),
    ):
        client.PullMessages(PullMessagesRequest(node=Node(node_id=before["north"])))
    server.wait_for("action=ready", ready + 1)
    with active(server, north) as (client, node):
        assert {"north": node.node_id} == before
    assert "SuperLink ended with code -9" in server.log.read_text()


def test_killed_and_stopped_it_leaves_nothing_behind_and_starts_again(
    server: Server, north: Identity, tmp_path: Path
) -> None:
    """Last in this file: it ends the server the tests above share."""
    superlink = server.superlink()
    server.process.kill()
    server.process.wait()
    superlink.wait(10)
    with running(server.federation, tmp_path / "log") as second:
        with active(second, north) as (_, node):
            assert node.node_id
        superlink = second.superlink()
        second.process.send_signal(signal.SIGTERM)
        assert second.process.wait(20) == 0
        superlink.wait(1)
        assert "draining" in second.log.read_text()


def test_a_port_in_use_is_one_clear_line(
    tmp_path: Path, new_federation: Callable[[Path], Federation]
) -> None:
    federation = new_federation(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", federation.settings.gateway.port))
        taken.listen()
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, "server", "up", str(federation.directory.path)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "a free port on 127.0.0.1" in done.stderr
