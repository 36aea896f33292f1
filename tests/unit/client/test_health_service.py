"""grpc.health.v1 on loopback follows what the daemon says of itself."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedgraft_client.health import Health, State
from fedgraft_client.health_service import SERVICE, serve_health
from fedgraft_common.errors import PolicyError

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_it_serves_while_the_server_is_reached() -> None:
    with (
        serve_health("127.0.0.1:0") as served,
        grpc.insecure_channel(f"127.0.0.1:{served.port}") as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)

        def asked(name: str = "") -> int:
            request = health_pb2.HealthCheckRequest(service=name)
            return int(stub.Check(request, timeout=20, wait_for_ready=True).status)

        assert asked() == NOT_SERVING
        for state, connected, expected in (
            (State.WAITING, True, SERVING),
            (State.WORKING, True, SERVING),
            (State.CONNECTING, False, NOT_SERVING),
            (State.SENDING, True, SERVING),
            (State.STOPPED, False, NOT_SERVING),
        ):
            served.on_change(Health(state, connected=connected, last_error="patient 4711"))
            assert asked() == asked(SERVICE) == expected, state
        with pytest.raises(grpc.RpcError) as raised:
            asked("another")
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("address", ["0.0.0.0:0", "10.0.0.1:50051", "[::]:0"])
def test_other_machines_are_refused(address: str) -> None:
    with (
        pytest.raises(PolicyError, match=r"health address.*Only this machine may read it"),
        serve_health(address),
    ):
        pass


def test_a_taken_port_is_said() -> None:
    with (
        serve_health("127.0.0.1:0") as served,
        pytest.raises(PolicyError, match=r"health address.*a free port.*Choose another"),
        serve_health(f"127.0.0.1:{served.port}"),
    ):
        pass
