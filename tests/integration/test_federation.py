"""A real federation on loopback: server, gateway, daemons, one plan from signature to refit."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from safetensors.torch import load_file

from fedgraft_client.account import read_ledger, verify
from fedgraft_common.errors import ServerError
from fedgraft_common.plan import Plan, load_plan
from fedgraft_simulations.cli import PLANS
from fedgraft_simulations.federation.processes import Federation
from fedgraft_simulations.partition import partition
from fedgraft_simulations.simulate import simulate

ROUNDS = 6


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan(
        PLANS / "digits.toml",
        [
            "sites.count=2", "aggregation.sites=2", "aggregation.minimum_sites=2",
            f"rounds.count={ROUNDS}", "privacy.mechanism=local",
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def federation(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with Federation(tmp_path_factory.mktemp("real") / "federation", plan) as made:
        made.start_server()
        for share in partition(plan):
            made.join(share.name, share.classes, share.train.unit_count, plan)
            made.start_site(share.name)
        yield made


@pytest.fixture(scope="module")
def expected(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The adapter of the same plan in a simulation."""
    directory = tmp_path_factory.mktemp("simulated")
    simulate(plan, directory, ("local",))
    return load_file(directory / "local" / "adapter" / "adapter_model.safetensors")


def until(done: Callable[[], bool], seconds: float, federation: Federation) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            logs = "\n".join(f"{n}: {federation.log(n)[-2000:]}" for n in federation.processes)
            raise AssertionError(f"not within {seconds} s\n{logs}")
        time.sleep(0.5)


def start(federation: Federation, *options: str) -> str:
    """Starts the plan's run as soon as the SuperLink knows the sites; returns its name."""
    printed: list[str] = []

    def started() -> bool:
        try:
            printed.append(federation.fedgraft("run", str(federation.plan_file), *options))
        except ServerError as error:
            if "SuperLink" not in str(error):
                raise
        return bool(printed)

    until(started, 60, federation)
    return printed[0].split()[1]


def state(federation: Federation, run: str) -> dict[str, object]:
    rows = json.loads(federation.fedgraft("runs", "--json"))
    return next(row for row in rows if row["run"] == run)


def adapter_of(federation: Federation, run: str) -> dict[str, torch.Tensor]:
    return load_file(federation.server / "runs" / run / "adapter" / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[n], t, rtol=0, atol=1e-6) for n, t in other.items()
    )


@pytest.mark.timeout(600)
def test_real_processes_give_the_simulations_adapter(
    federation: Federation, plan: Plan, expected: dict[str, torch.Tensor]
) -> None:
    """And survive a SIGKILL of a site and of the whole server on the way."""
    run = start(federation)
    until(lambda: int(str(state(federation, run)["round"])) >= 1, 120, federation)
    federation.processes["branch-01"].send_signal(signal.SIGKILL)
    federation.processes["branch-01"].wait()
    federation.start_site("branch-01")
    until(lambda: int(str(state(federation, run)["round"])) >= 3, 180, federation)
    federation.processes["server"].send_signal(signal.SIGKILL)
    federation.processes["server"].wait()
    federation.start_server()

    def ended() -> bool:
        try:
            now = state(federation, run)
            if now["state"] in ("failed", "stopped"):
                federation.fedgraft("resume", run)
            return now["state"] == "completed"
        except ServerError:
            return False  # the server is starting

    until(ended, 240, federation)
    assert same(adapter_of(federation, run), expected)
    finals = list(federation.directory.glob("branch-*/home/records/*/final.safetensors"))
    assert len(finals) == 2
    for ledger in federation.directory.glob("branch-*/home/records/ledger.sqlite3"):
        found = verify(read_ledger(ledger), 1e-5, ledger.with_name("ledger.witness"))
        assert found.faults == ()
        commits = [e for e in read_ledger(ledger) if e.kind.value == "commit"]
        assert len(commits) == ROUNDS


@pytest.mark.timeout(120)
def test_the_same_plan_is_not_run_twice(federation: Federation) -> None:
    with pytest.raises(ServerError, match="a plan that was not run here yet"):
        federation.fedgraft("run", str(federation.plan_file))


@pytest.mark.timeout(120)
def test_a_run_needs_its_sites(federation: Federation) -> None:
    with pytest.raises(ServerError, match="one of: branch-00, branch-01"):
        federation.fedgraft("run", str(federation.plan_file), "--site", "branch-09")
    with pytest.raises(ServerError, match=r"aggregation\.sites"):
        federation.fedgraft(
            "run", str(federation.plan_file), "--site", "branch-00",
            "--set", "aggregation.minimum_sites=1", "--set", "name=alone",
        )  # fmt: skip


@pytest.mark.timeout(180)
def test_sites_drain_on_sigterm(federation: Federation) -> None:
    process = federation.processes["branch-00"]
    process.terminate()
    assert process.wait(60) == 0
    status = json.loads((federation.directory / "branch-00" / "home" / "status.json").read_text())
    assert status["state"] == "stopped"
    federation.start_site("branch-00")
