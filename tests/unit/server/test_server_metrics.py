"""Counts of runs, kept in their directories and added up for Prometheus."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from prometheus_client import CollectorRegistry

from fedgraft_common.errors import ServerError
from fedgraft_common.messages import STATUS, Status
from fedgraft_server.federation import RoundSummary
from fedgraft_server.metrics import FILE, RunMetrics, Totals, read_counts, serve
from fedgraft_server.registry import Registry
from fedgraft_server.runs import NodeState, Runs
from fedgraft_server.settings import (
    FederationTable,
    MonitoringTable,
    ServerDirectory,
    Settings,
)


def reply(status: str, kind: str = "train") -> Message:
    metadata = Metadata(7, "m", 1, 5, "r", "", 0.0, 1e9, kind)
    content = RecordDict({STATUS: ConfigRecord({"round": 1, "status": status})})
    return make_message(metadata=metadata, content=content)


def summary(number: int) -> RoundSummary:
    return RoundSummary(number, {"a": torch.zeros(2)}, sites=2, bytes_received=16)


def test_rounds_and_replies_are_counted_and_kept(tmp_path: Path) -> None:
    metrics = RunMetrics(tmp_path / FILE)
    for status in (Status.OK, Status.OK, Status.FAILED):
        metrics.on_reply(reply(status.value))
    metrics.on_reply(reply("patient 4711"))
    metrics.on_reply(reply(Status.KEPT.value, "query"))
    metrics.on_reply(reply(Status.OK.value, "evaluate"))
    metrics.on_round(summary(1))
    updates = "fedgraft_server_updates"
    assert read_counts(tmp_path / FILE) == {
        ("fedgraft_server_rounds", ""): 1.0,
        (updates, "ok"): 2.0,
        (updates, "failed"): 2.0,  # with the one that cannot be read
    }
    assert "4711" not in (tmp_path / FILE).read_text()


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    for number in (1, 2):
        metrics = RunMetrics(tmp_path / FILE)
        metrics.on_reply(reply("ok"))
        metrics.on_round(summary(number))
    assert set(read_counts(tmp_path / FILE).values()) == {2.0}


def test_a_damaged_file_does_not_stop_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_bytes(b"\xff fedgraft_server_rounds_total x")
    with caplog.at_level(logging.WARNING):
        metrics = RunMetrics(tmp_path / FILE)
    assert "counting from zero" in caplog.text
    metrics.on_round(summary(1))
    assert read_counts(tmp_path / FILE) == {("fedgraft_server_rounds", ""): 1.0}


def test_runs_are_added_up(tmp_path: Path) -> None:
    for run, count in (("a-1", 2), ("b-2", 3)):
        (tmp_path / run).mkdir()
        metrics = RunMetrics(tmp_path / run / FILE)
        for number in range(count):
            metrics.on_reply(reply("ok"))
            metrics.on_round(summary(number + 1))
    (tmp_path / "c-3").mkdir()  # began, finished nothing
    registry = CollectorRegistry()
    registry.register(Totals(tmp_path, lambda: 4))
    value = registry.get_sample_value
    assert value("fedgraft_server_rounds_total") == 5
    assert value("fedgraft_server_updates_total", {"status": "ok"}) == 5
    assert value("fedgraft_server_updates_total", {"status": "failed"}) == 0
    assert value("fedgraft_server_sites_connected") == 4


def test_a_server_without_superlink_says_nothing_about_sites(tmp_path: Path) -> None:
    def connected() -> int:
        raise ServerError("SuperLink", "nothing", "an answer", "Wait.")

    registry = CollectorRegistry()
    registry.register(Totals(tmp_path / "none", connected))
    assert registry.get_sample_value("fedgraft_server_sites_connected") is None
    assert registry.get_sample_value("fedgraft_server_rounds_total") == 0


def test_the_port_is_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    import urllib.request

    monkeypatch.setattr("fedgraft_server.metrics.SuperLink.client_context", lambda self: None)
    nodes = [NodeState(i, "n", s, b"", "") for i, s in enumerate(("online", "offline", "online"))]
    monkeypatch.setattr(Runs, "nodes", lambda self: nodes)
    directory = ServerDirectory(tmp_path)
    federation = FederationTable(name="test", host="localhost")
    directory.write_settings(Settings(federation=federation))
    with Registry(directory.registry) as registry:
        with serve(directory, registry) as port:
            assert port == 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            number = free.getsockname()[1]
        table = MonitoringTable(metrics_port=number)
        directory.write_settings(Settings(federation=federation, monitoring=table))
        with serve(directory, registry) as port:
            assert port == number
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                text = answer.read().decode()
            assert "fedgraft_server_sites_connected 2.0" in text
            with (
                pytest.raises(ServerError, match=r"metrics address.*Choose another port"),
                serve(directory, registry),
            ):
                pass


def test_the_servers_process_does_without_torch() -> None:
    code = "import sys, fedgraft_server.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
