"""What Prometheus may read at a site: these names, on this machine, and nothing private."""

from __future__ import annotations

import http.client
import socket

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedgraft_client.health import Health, State
from fedgraft_client.metrics import Metrics
from fedgraft_common.accounting import SamplingEvent, epsilon
from fedgraft_common.errors import PolicyError
from fedgraft_common.messages import Status
from fedgraft_common.metrics_port import check_loopback, serve_metrics

EVENT = SamplingEvent(0.1, 1.0, 20)


def metrics(events: list[SamplingEvent] | None = None) -> Metrics:
    return Metrics(lambda: events or [], limit=4.0, delta=1e-5)


def read(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def test_rounds_budget_and_connection_are_served() -> None:
    events = [EVENT]
    made = metrics(events)
    made.on_change(Health(State.WAITING, connected=True, round=7))
    made.on_answer("train", Status.OK, 2.0)
    made.on_answer("train", Status.OK, 0.2)
    made.on_answer("train", Status.BUDGET, 0.01)
    made.on_answer("query", Status.KEPT, 5.0)
    made.on_answer("evaluate", Status.OK, 5.0)
    with serve_metrics(made.registry, "127.0.0.1:0") as port:
        text = read(port)
        value = made.registry.get_sample_value
        assert value("fedgraft_rounds_total", {"status": "ok"}) == 2
        assert value("fedgraft_rounds_total", {"status": "refused-budget"}) == 1
        assert value("fedgraft_rounds_total", {"status": "failed"}) == 0
        assert value("fedgraft_round_seconds_count") == 3
        assert value("fedgraft_round_seconds_bucket", {"le": "1.0"}) == 2
        assert value("fedgraft_epsilon_spent") == pytest.approx(epsilon([EVENT], 1e-5))
        assert value("fedgraft_epsilon_limit") == 4.0
        assert (value("fedgraft_connected"), value("fedgraft_last_round")) == (1, 7)
        events.append(SamplingEvent(0.1, 2.0, 20))
        made.on_change(Health(State.CONNECTING, connected=False, round=7))
        assert "fedgraft_connected 0.0" in read(port)
        assert value("fedgraft_epsilon_spent") == pytest.approx(epsilon(events, 1e-5))
    assert 'fedgraft_rounds_total{status="ok"} 2.0' in text


def test_nothing_else_is_served() -> None:
    made = metrics()
    with serve_metrics(made.registry, "127.0.0.1:0") as port:
        families = {family.name for family in text_string_to_metric_families(read(port))}
    assert {name for name in families if not name.endswith("_created")} == {
        "fedgraft_rounds", "fedgraft_round_seconds", "fedgraft_epsilon_spent",
        "fedgraft_epsilon_limit", "fedgraft_connected", "fedgraft_last_round",
    }  # fmt: skip


def test_epsilon_is_computed_when_the_ledger_grew(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def compose(events: tuple[SamplingEvent, ...], delta: float) -> float:
        asked.append(len(events))
        return 1.0

    monkeypatch.setattr("fedgraft_client.metrics.epsilon", compose)
    events: list[SamplingEvent] = []
    made = metrics(events)
    made._spent = lambda: events
    for _ in range(3):
        assert made.registry.get_sample_value("fedgraft_epsilon_spent") == 0.0
    events.append(EVENT)
    for _ in range(3):
        assert made.registry.get_sample_value("fedgraft_epsilon_spent") == 1.0
    assert asked == [1]


@pytest.mark.parametrize(
    "address", ["0.0.0.0:9464", "192.168.1.4:9464", "[::]:9464", "localhost:9464", ":9464",
                "9464", "127.0.0.1:x", "127.0.0.1:99999", "127.0.0.1"],
)  # fmt: skip
def test_other_machines_are_refused(address: str) -> None:
    with (
        pytest.raises(PolicyError, match=r"127\.0\.0\.1:PORT.*Only this machine may read it"),
        serve_metrics(metrics().registry, address, PolicyError),
    ):
        pass


def test_loopback_addresses() -> None:
    assert check_loopback("127.0.0.1:1", "a") == ("127.0.0.1", 1)
    assert check_loopback("[::1]:2", "a") == ("::1", 2)


def test_a_taken_port_is_said_and_a_used_one_is_free_again() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with (
            pytest.raises(PolicyError, match=r"metrics address.*a free port.*Choose another"),
            serve_metrics(metrics().registry, address, PolicyError),
        ):
            pass
    for _ in range(2):
        with serve_metrics(metrics().registry, address, PolicyError) as port:
            assert address.endswith(str(port))
