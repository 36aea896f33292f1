"""Real federations on loopback: server, gateway, daemons; runs from signature to final adapter."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedgraft_client.account import read_ledger, verify
from fedgraft_client.entry import Kind
from fedgraft_common.errors import ServerError
from fedgraft_common.files import load_tensors, save_tensors
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan, load_plan
from fedgraft_server.run_folder import RunFolder
from fedgraft_simulations.cli import PLANS
from fedgraft_simulations.federation.processes import Federation, free_ports
from fedgraft_simulations.federation.reference import EXPORT, undisturbed
from fedgraft_simulations.partition import partition

ROUNDS = 3
NAMES = ("branch-00", "branch-01", "branch-02")
EAST = NAMES[1:]
CHOOSY = "branch-02"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan(
        PLANS / "digits.toml",
        ["sites.count=3", "aggregation.minimum_sites=2", f"rounds.count={ROUNDS}",
         "privacy.mechanism=local"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def federation(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three sites, two of them in the group `east`; one answers plans of certain names only."""
    with Federation(tmp_path_factory.mktemp("real") / "federation", plan) as made:
        made.start_server()
        for share in partition(plan):
            made.join(share, plan, ["all", "east"] if share.name in EAST else ["all"])
            if share.name == CHOOSY:
                with (made.directory / share.name / "site.toml").open("a") as file:
                    file.write('tasks = ["*[!y]"]\n')
            made.start_site(share.name)
        yield made


def until(done: Callable[[], bool], seconds: float, federation: Federation) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            logs = "\n".join(f"{n}: {federation.log(n)[-2000:]}" for n in federation.processes)
            raise AssertionError(f"not within {seconds} s\n{logs}")
        time.sleep(0.1)


def reaches(federation: Federation, folder: RunFolder, number: int, seconds: float = 300) -> None:
    """Waits for a round; not for one of a run that has ended before it."""
    until(lambda: folder.round >= number or folder.outcome is not None, seconds, federation)
    assert folder.round >= number, folder.outcome


def start(federation: Federation, plan: Plan, *options: str) -> RunFolder:
    """`fedgraft run`, as soon as the SuperLink knows the sites."""
    file = federation.directory / f"{plan.name}.json"
    file.write_text(plan.model_dump_json())
    printed: list[str] = []

    def started() -> bool:
        try:
            printed.append(federation.fedgraft("run", str(file), *options))
        except ServerError as error:
            if "SuperLink" not in str(error):
                raise
        return bool(printed)

    until(started, 60, federation)
    return RunFolder(federation.server / "runs" / printed[0].split()[1])


def of_sites(plan: Plan, count: int) -> Plan:
    """As `fedgraft run` signs it: how many sites take part is part of a plan."""
    return plan.replace({"aggregation.sites": count})


def completed(federation: Federation, *folders: RunFolder) -> None:
    until(lambda: all(f.outcome is not None for f in folders), 500, federation)
    assert [f.outcome.word for f in folders if f.outcome] == ["completed"] * len(folders)


def assert_same(folder: RunFolder, expected: Tensors) -> None:
    found = load_file(folder.path / EXPORT)
    assert found.keys() == expected.keys()
    assert max(float(t.abs().max()) for t in expected.values()) > 0
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)


def answered(federation: Federation, name: str, folder: RunFolder) -> list[int]:
    """The rounds of a run that a site has committed, in order; its ledger is whole."""
    ledger = federation.directory / name / "home" / "records" / "ledger.sqlite3"
    entries = read_ledger(ledger)
    assert verify(entries, 1e-5, ledger.with_name("ledger.witness")).faults == ()
    mine = {
        e.seq: int(e.body["round"]) for e in entries
        if e.kind is Kind.RESERVE and e.body["plan"] == folder.plan.hash
    }  # fmt: skip
    done = [e.body["reserve"] for e in entries if e.kind is Kind.COMMIT]
    return [mine[number] for number in done if number in mine]


def status(federation: Federation, name: str) -> dict[str, object]:
    """What a site's daemon says of itself; nothing before it has begun."""
    file = federation.directory / name / "home" / "status.json"
    return json.loads(file.read_text()) if file.exists() else {}


def listed(federation: Federation, folder: RunFolder) -> dict[str, object]:
    rows: list[dict[str, object]] = json.loads(federation.fedgraft("runs", "--json"))
    return next(row for row in rows if row["run"] == folder.name)


@pytest.mark.timeout(600)
def test_runs_at_once_and_afterwards_do_not_disturb_each_other(
    federation: Federation, plan: Plan, tmp_path: Path
) -> None:
    """One site is in both; each run addresses its own sites only."""
    at_once = [
        (plan.replace({"name": "named"}), NAMES[:2], ["--site", NAMES[0], "--site", NAMES[1]]),
        (plan.replace({"name": "group"}), EAST, ["--group", "east"]),
    ]
    folders = [start(federation, p, *options) for p, _, options in at_once]
    completed(federation, *folders)
    assert len({folder.worker for folder in folders}) == 2
    choosy = plan.replace({"name": "choosy"})
    last = start(federation, choosy)
    completed(federation, last)
    for folder, (asked, names, _) in zip(folders, at_once, strict=True):
        assert_same(folder, undisturbed(of_sites(asked, 2), tmp_path / folder.name, names))
        for name in NAMES:
            rounds = list(range(1, ROUNDS + 1)) if name in names else []
            assert answered(federation, name, folder) == rounds

    # A plan outside a site's policy: that site says one word, and the others go on without it.
    assert_same(last, undisturbed(of_sites(choosy, 3), tmp_path / "two", NAMES[:2]))
    assert answered(federation, CHOOSY, last) == []
    assert (
        f'fedgraft_server_updates_total{{status="refused-policy"}} {ROUNDS}.0'
        in (last.path / "metrics.prom").read_text()
    )
    assert "plan: name: found 'choosy'" in federation.log(CHOOSY)
    log = federation.fedgraft("logs", last.name)
    assert re.findall(r"round (\d+): 2 updates", log) == [str(n + 1) for n in range(ROUNDS)]
    state = listed(federation, last)
    assert (state["state"], state["round"], state["sites"]) == ("completed", ROUNDS, [*NAMES])


@pytest.mark.timeout(120)
def test_what_fedgraft_run_refuses(federation: Federation, plan: Plan) -> None:
    file = str(federation.plan_file)
    with pytest.raises(ServerError, match="a plan that was not run here yet"):
        start(federation, plan.replace({"name": "choosy"}))
    with pytest.raises(ServerError, match="one of: branch-00, branch-01"):
        federation.fedgraft("run", file, "--site", "branch-09")
    with pytest.raises(ServerError, match="one of: all, east"):
        federation.fedgraft("run", file, "--group", "west")
    with pytest.raises(ServerError, match=r"aggregation\.minimum_sites"):
        federation.fedgraft("run", file, "--site", "branch-00", "--set", "name=alone")
    assert not [f for f in RunFolder.all(federation.server / "runs") if "alone" in f.name]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_run_stays_stopped_and_what_is_altered_meanwhile_is_refused(
    federation: Federation, plan: Plan, tmp_path: Path
) -> None:
    """By whoever has the server, but not the operator's key or the sites' goodwill."""
    long = plan.replace({"name": "stopped", "rounds.count": 30})
    folder = start(federation, long, "--group", "east")
    reaches(federation, folder, 2)
    assert federation.fedgraft("stop", folder.name) == f"stopped     {folder.name}\n"
    until(lambda: not folder.is_worked_on(), 60, federation)
    reached = folder.round
    time.sleep(2)  # several looks of the server at its runs
    assert (folder.round, listed(federation, folder)["state"]) == (reached, "stopped")
    with pytest.raises(ServerError, match="a run that is under way"):
        federation.fedgraft("stop", folder.name)

    kept = Path(shutil.copytree(folder.path, tmp_path / "kept"))
    before = [answered(federation, name, folder) for name in EAST]
    alter_plan(folder)
    assert "(refused-plan)" in failure(federation, folder)
    assert "plan: signature" in federation.log(EAST[0])
    restore(kept, folder)
    alter_adapter(folder, float("nan"))
    assert "(refused-message)" in failure(federation, folder)
    restore(kept, folder)
    alter_adapter(folder, 1e30)
    assert "(refused-message)" in failure(federation, folder)
    assert listed(federation, folder)["state"] == "failed"
    restore(kept, folder)
    assert [answered(federation, name, folder) for name in EAST] == before

    federation.fedgraft("resume", folder.name)
    with pytest.raises(ServerError, match="a run that has ended"):
        federation.fedgraft("resume", folder.name)
    completed(federation, folder)
    assert_same(folder, undisturbed(of_sites(long, 2), tmp_path / "reference", EAST))
    log = federation.fedgraft("logs", folder.name)  # of both halves
    finished = [int(number) for number in re.findall(r"round (\d+): 2 updates", log)]
    assert finished == sorted(set(finished))
    assert min(finished) <= reached < max(finished)


def alter_plan(folder: RunFolder) -> None:
    """Under the signature of the old one; the checkpoints would be of another plan."""
    facts = folder.facts
    folder.write(replace(facts, plan={**facts.plan, "seed": 7}))
    for checkpoint in folder.path.glob("round-*"):
        checkpoint.unlink()


def alter_adapter(folder: RunFolder, value: float) -> None:
    """One value of the newest checkpoint, with a digest to match."""
    path = max(folder.path.glob("round-*"))
    tensors, facts = load_tensors(path)
    name = min(name for name, t in tensors.items() if t.is_floating_point())
    tensors[name].view(-1)[0] = value
    save_tensors(path, tensors, facts)


def failure(federation: Federation, folder: RunFolder) -> str:
    """Why the run fails when it is resumed."""
    federation.fedgraft("resume", folder.name)
    until(lambda: folder.outcome is not None, 120, federation)
    assert folder.outcome is not None and folder.outcome.word == "failed"
    until(lambda: not folder.is_worked_on(), 60, federation)
    return folder.outcome.reason


def restore(kept: Path, folder: RunFolder) -> None:
    for file in folder.path.glob("round-*"):
        file.unlink()
    shutil.copytree(kept, folder.path, dirs_exist_ok=True)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_site_that_was_away_for_many_rounds_comes_back(
    federation: Federation, plan: Plan
) -> None:
    """Frozen, so that it says no goodbye and its connections stay open, and rounds go on.

    Two rounds wait for it: one until Flower misses its heartbeat, one for what patience is left.
    The deadline is many times what a round takes, also the first one on a busy machine.
    """
    long = plan.replace({"name": "absent", "rounds.count": 40, "rounds.deadline": 60.0})
    folder = start(federation, long)
    reaches(federation, folder, 1)
    federation.processes["branch-00"].send_signal(signal.SIGSTOP)
    try:
        reaches(federation, folder, folder.round + 4, 600)
    finally:
        federation.processes["branch-00"].send_signal(signal.SIGCONT)
    completed(federation, folder)
    rounds = answered(federation, "branch-00", folder)
    assert rounds == sorted(set(rounds))
    assert rounds[-1] == folder.round, "it came back before the end"
    assert 0 < len(rounds) <= folder.round - 3
    assert answered(federation, "branch-01", folder) == list(range(1, folder.round + 1))
    final = federation.directory / "branch-00" / "home" / "records" / folder.plan.hash
    until((final / "final.safetensors").exists, 120, federation)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_moved_continues_its_runs(
    federation: Federation, plan: Plan, tmp_path: Path
) -> None:
    """Killed, its directory copied elsewhere, other ports: as the operator's guide says."""
    long = plan.replace({"name": "moved", "rounds.count": 30})
    folder = start(federation, long, "--group", "east")
    reaches(federation, folder, 2)
    federation.processes["server"].kill()
    federation.processes["server"].wait()
    until(lambda: not folder.is_worked_on(), 120, federation)
    reached = folder.round
    assert reached < 30
    moved = Path(shutil.copytree(federation.server, tmp_path / "elsewhere"))
    federation.server.rename(tmp_path / "gone")
    move_ports(moved / "federation.toml", free_ports(5))
    federation.server = moved
    federation.start_server()
    for name in NAMES:
        federation.processes[name].terminate()
        federation.processes[name].wait(120)
        facts = federation.directory / name / "home" / "identity" / "federation.json"
        facts.write_text(readdressed(facts.read_text(), moved / "federation.toml"))
        federation.start_site(name)
    folder = RunFolder(moved / "runs" / folder.name)
    completed(federation, folder)
    assert_same(folder, undisturbed(of_sites(long, 2), tmp_path / "reference", EAST))
    for name in EAST:
        assert answered(federation, name, folder) == list(range(1, 31))


def move_ports(settings: Path, first: int) -> None:
    """Other ports, in the order of the file."""
    text, offset = settings.read_text(), iter(range(4))
    settings.write_text(
        re.sub(r"^((?:join_)?port) = \d+", lambda m: f"{m[1]} = {first + next(offset)}", text,
               flags=re.MULTILINE)
    )  # fmt: skip


def readdressed(facts: str, settings: Path) -> str:
    """A site's federation.json with the addresses of the server's new settings."""
    import tomllib

    tables = tomllib.loads(settings.read_text())
    document = json.loads(facts)
    for key in ("gateway", "backbone"):
        host = document[key].rpartition(":")[0]
        document[key] = f"{host}:{tables[key]['port']}"
    return json.dumps(document)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_round_is_abandoned_at_the_second_interrupt(federation: Federation, plan: Plan) -> None:
    """What it had reserved stays spent, and the site starts again."""
    changes = {"name": "long", "rounds.count": 1, "training.local_steps": 10_000}
    folder = start(
        federation, plan.replace({**changes, "aggregation.minimum_sites": 1}), "--site", EAST[0]
    )
    until(lambda: status(federation, EAST[0]).get("state") == "working", 120, federation)
    ledger = federation.directory / EAST[0] / "home" / "records" / "ledger.sqlite3"
    until(lambda: read_ledger(ledger)[-1].kind is Kind.RESERVE, 120, federation)
    site = federation.processes[EAST[0]]
    site.send_signal(signal.SIGINT)
    until(lambda: bool(status(federation, EAST[0]).get("draining")), 60, federation)
    assert site.poll() is None  # it wants to finish the round
    site.send_signal(signal.SIGINT)
    assert site.wait(120) == 130
    assert status(federation, EAST[0]).get("state") == "stopped"
    entries = read_ledger(ledger)
    last = entries[-1]
    assert (last.kind, last.body["plan"], last.body["steps"]) == (
        Kind.RESERVE, folder.plan.hash, 10_000
    )  # fmt: skip
    assert verify(entries, 1e-5, ledger.with_name("ledger.witness")).reserved >= 1
    federation.fedgraft("stop", folder.name)
    federation.start_site(EAST[0])
    until(lambda: status(federation, EAST[0]).get("state") == "waiting", 120, federation)


@pytest.mark.timeout(180)
def test_sites_drain(federation: Federation) -> None:
    for name, number in zip(NAMES[:2], (signal.SIGTERM, signal.SIGINT), strict=True):
        federation.processes[name].send_signal(number)
        assert federation.processes[name].wait(120) == 0
        assert status(federation, name)["state"] == "stopped"
