"""A daemon with everything that watches it, and no server."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedgraft_client import monitoring
from fedgraft_client.connection import Outgoing
from fedgraft_client.daemon import Daemon
from fedgraft_client.health import Health, State, heartbeat, read_health
from fedgraft_client.monitoring import monitored
from fedgraft_client.site_file import Monitoring, SiteFile
from fedgraft_common.errors import PolicyError
from fedgraft_common.messages import Status, write_reply


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


def site_file(metrics: int | None, health: int | None) -> SiteFile:
    document = {
        "classes": ("a", "b"),
        "data": {"source": "train.npz", "nominal_size": 10},
        "policy": {"maximum_epsilon": 4.0},
        "monitoring": {"metrics_port": metrics, "health_port": health},
    }
    return SiteFile.model_validate(document)


class Server:
    """Sends one request, then tells the daemon to stop."""

    node_id = 5

    def __init__(self) -> None:
        plan = ConfigRecord({"plan": "{}", "round": 2})
        metadata = Metadata(7, "m", 1, 5, "", "", 0.0, 1e9, "train")
        self.messages: list[Message] = [
            make_message(metadata=metadata, content=RecordDict({"plan": plan}))
        ]
        self.daemon: Daemon | None = None
        self.look: Callable[[], None] = lambda: None

    def receive(self, wait: float = 0.0) -> Message | None:
        if self.messages:
            return self.messages.pop()
        self.look()
        assert self.daemon is not None
        self.daemon.stop()
        return None

    def prepare(self, reply: Message) -> Outgoing:
        return Outgoing(message_to_proto(reply), 7, ObjectTree(), {})

    def send(self, reply: Outgoing) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_daemon_is_seen_by_file_metrics_and_health(tmp_path: Path) -> None:
    metrics_port, health_port = free_ports()
    status = tmp_path / "status.json"
    server, app = Server(), ClientApp()
    changes: list[State] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return write_reply(message, 2, Status.OK)

    daemon = Daemon(
        "ward", lambda: server, app, on_change=lambda h: changes.append(h.state),
        sleep=lambda _: None,
    )  # fmt: skip
    server.daemon = daemon
    texts: list[str] = []
    words: list[int] = []

    def look() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", metrics_port, timeout=10)
        connection.request("GET", "/metrics")
        texts.append(connection.getresponse().read().decode())
        connection.close()
        with grpc.insecure_channel(f"127.0.0.1:{health_port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="fedgraft.Site")
            words.append(stub.Check(request, timeout=20, wait_for_ready=True).status)

    server.look = look
    with monitored(daemon, site_file(metrics_port, health_port), status, lambda: []):
        daemon.run()
    assert 'fedgraft_rounds_total{status="ok"} 1.0' in texts[0]
    assert "fedgraft_connected 1.0" in texts[0]
    assert "fedgraft_last_round 2.0" in texts[0]
    assert words == [health_pb2.HealthCheckResponse.SERVING]
    found = read_health(status)
    assert (found.state, found.status, found.round) == (State.STOPPED, "ok", 2)
    assert changes[-1] is State.STOPPED


def test_without_ports_only_the_file_is_kept(tmp_path: Path) -> None:
    server = Server()
    server.messages = []
    daemon = Daemon("ward", lambda: server, ClientApp(), sleep=lambda _: None)
    server.daemon = daemon
    with monitored(daemon, site_file(None, None), tmp_path / "s.json", lambda: []):
        daemon.run()
    assert read_health(tmp_path / "s.json").state is State.STOPPED
    assert Monitoring().metrics_port is None


def test_a_taken_port_stops_the_start_and_leaves_the_daemon_as_it_was(tmp_path: Path) -> None:
    daemon = Daemon("ward", lambda: Server(), ClientApp())
    before = daemon.on_change
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with (
            pytest.raises(PolicyError, match="metrics address"),
            monitored(daemon, site_file(taken, None), tmp_path / "s.json", lambda: []),
        ):
            pass
    assert daemon.on_change is before


def test_a_daemon_that_is_told_to_stop_in_a_long_round_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon itself writes nothing before the round is over; its heartbeat does."""
    monkeypatch.setattr(monitoring, "heartbeat", partial(heartbeat, seconds=0.01))
    status, server, app = tmp_path / "s.json", Server(), ClientApp()
    seen: list[Health] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        daemon.stop()
        end = time.monotonic() + 60
        while not read_health(status).draining and time.monotonic() < end:
            time.sleep(0.01)
        seen.append(read_health(status))
        return write_reply(message, 2, Status.OK)

    daemon = Daemon("ward", lambda: server, app, sleep=lambda _: None)
    server.daemon = daemon
    with monitored(daemon, site_file(None, None), status, lambda: []):
        time.sleep(0.05)
        assert not status.exists()  # nothing has begun
        daemon.run()
        time.sleep(0.05)  # some more beats
    assert [(health.state, health.draining) for health in seen] == [(State.WORKING, True)]
    assert read_health(status).state is State.STOPPED
