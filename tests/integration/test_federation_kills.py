"""SIGKILL to any process of a federation at any moment: every run completes, as if nothing was.

The kinds and pauses come from a seed, which is printed; FEDGRAFT_KILL_SEED repeats it. When within
a round a kill lands depends on the machine.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fedgraft_client.account import read_ledger, verify
from fedgraft_client.entry import Kind
from fedgraft_common.backbone import embedded_directory
from fedgraft_common.backbone_protocol import ManifestRequest
from fedgraft_common.errors import ServerError
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan, load_plan
from fedgraft_server.backbone_library import BackboneLibrary
from fedgraft_server.run_folder import RunFolder
from fedgraft_simulations.cli import PLANS
from fedgraft_simulations.federation.kills import Kills, words
from fedgraft_simulations.federation.processes import Federation
from fedgraft_simulations.federation.reference import EXPORT, undisturbed
from fedgraft_simulations.partition import partition

BACKBONE = embedded_directory("glyphs")
SITE = Path(__file__).with_name("watched_site.py")


def new_federation(directory: Path, plan: Plan, bandwidth: int) -> tuple[Federation, Plan]:
    """A server that runs and sites that have joined and run; the backbone comes from the server.

    Args:
        directory: new.
        plan: with the embedded backbone.
        bandwidth: of the backbone service, bytes a second, so that a kill can hit a transfer.

    Returns:
        The federation, and the plan with the server's backbone.
    """
    made = Federation(directory, plan)
    settings = made.server / "federation.toml"
    text = settings.read_text().replace(
        "# total_bytes_per_second =", f"total_bytes_per_second = {bandwidth}"
    )
    assert f"total_bytes_per_second = {bandwidth}" in text
    settings.write_text(text)
    pinned = json.loads(
        made.fedgraft("server", "backbone", "add", str(BACKBONE), "--server", str(made.server),
                      "--json")
    )  # fmt: skip
    plan = plan.replace({f"backbone.{key}": value for key, value in pinned.items()})
    made.plan_file.write_text(plan.model_dump_json())
    made.start_server()
    for share in partition(plan):
        made.join(share, plan)
        start_site(made, share.name)
    return made, plan


def start_site(federation: Federation, name: str) -> None:
    """The watched site's daemon."""
    home = federation.directory / name
    number = str(federation.names.index(name))
    command = [
        sys.executable,
        str(SITE),
        str(home / "site.toml"),
        str(federation.plan_file),
        number,
    ]
    federation.start(name, command)


def handed_out(plan: Plan, server: Path) -> Path:
    """The backbone of a plan on the server."""
    config = plan.backbone
    request = ManifestRequest(sha256=config.sha256, manifest_sha256=config.manifest_sha256)
    return BackboneLibrary(server / "backbones").assembled(request)


def start_run(federation: Federation, plan: Plan, meanwhile: Callable[[], None]) -> RunFolder:
    """`fedgraft run`, as often as it takes while the server dies and comes back."""
    file = federation.directory / f"{plan.name}.json"
    file.write_text(plan.model_dump_json())
    end = time.monotonic() + 300
    while True:
        try:
            printed = federation.fedgraft("run", str(file))
            return RunFolder(federation.server / "runs" / printed.split()[1])
        except ServerError as error:
            known = RunFolder.all(federation.server / "runs")
            if mine := [f for f in known if f.name.startswith(f"{plan.name}-")]:
                return mine[0]
            if "SuperLink" not in str(error) or time.monotonic() > end:
                raise
            meanwhile()
            time.sleep(0.2)


def check_run(federation: Federation, plan: Plan, folder: RunFolder, expected: Tensors) -> None:
    """What holds after a run, whatever was killed."""
    assert folder.outcome is not None and folder.outcome.word == "completed", folder.outcome
    found = load_file(folder.path / EXPORT)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)
    assert folder.round == plan.rounds.count
    rounds = list(range(1, plan.rounds.count + 1))
    for name in federation.names:
        home = federation.directory / name / "home" / "records"
        entries = read_ledger(home / "ledger.sqlite3")
        reserved = {
            e.seq: int(e.body["round"]) for e in entries
            if e.kind is Kind.RESERVE and e.body["plan"] == folder.plan.hash
        }  # fmt: skip
        commits = [e for e in entries if e.kind is Kind.COMMIT and e.body["reserve"] in reserved]
        assert [reserved[e.body["reserve"]] for e in commits] == rounds  # each once, in order
        voided = {e.body["reserve"] for e in entries if e.kind is Kind.VOID}
        charged = Counter(number for seq, number in reserved.items() if seq not in voided)
        lines = (federation.directory / name / "looked").read_text().splitlines()
        looked = Counter(
            int(line.split()[1]) for line in lines if line.split()[0] == folder.plan.hash
        )
        assert set(looked) == set(rounds)
        assert all(charged[number] >= count for number, count in looked.items())
        assert (home / folder.plan.hash / "final.safetensors").exists()


def check_ledgers(federation: Federation, delta: float) -> list[int]:
    """Whole, witnessed, recomputed twice; returns how many reservations have no commit."""
    open_ones = []
    for name in federation.names:
        ledger = federation.directory / name / "home" / "records" / "ledger.sqlite3"
        found = verify(read_ledger(ledger), delta, ledger.with_name("ledger.witness"))
        assert found.faults == (), name
        open_ones.append(found.reserved)
    return open_ones


def say(text: str) -> None:
    """For whoever runs it with `-s`, or looks at a failure."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def make_plan(rounds: int) -> Plan:
    """Two sites, a backbone of 1.6 MB from the server, a tiny adapter."""
    return load_plan(
        PLANS / "digits.toml",
        [
            "sites.count=2", "aggregation.sites=2", "aggregation.minimum_sites=2",
            f"rounds.count={rounds}", "rounds.deadline=1800", "privacy.mechanism=local",
        ],
    )  # fmt: skip


def disturb(
    directory: Path, count: int, pause: float, patience: float, rounds: int, longest: float
) -> Kills:
    """Runs one plan after the other until all kills are made; then checks every run."""
    seed = int(os.environ.get("FEDGRAFT_KILL_SEED", secrets.randbelow(10**6)))
    federation, plan = new_federation(directory / "federation", make_plan(rounds), 1_000_000)
    runs: list[tuple[Plan, RunFolder]] = []
    with federation:
        kills = Kills(federation, partial(start_site, federation), seed, count, pause, patience)
        say(f"kill schedule: seed {seed}, {count} kills")
        while not runs or not kills.is_over:
            named = plan.replace({"name": f"killed-{len(runs) + 1}"})
            began = time.monotonic()
            folder = start_run(federation, named, kills.step)
            runs.append((named, folder))
            while folder.outcome is None:
                assert time.monotonic() - began < longest, trouble(federation, kills)
                kills.step((folder.name, folder.round))
                time.sleep(0.02)
            say(f"{folder.name}: {folder.outcome}, {time.monotonic() - began:.0f} s")
        log = federation.fedgraft("logs", runs[-1][1].name)
    uncommitted = check_ledgers(federation, plan.privacy.delta)
    say(f"kills: {kills.counts()}; reservations without a commit: {uncommitted}")
    backbone = handed_out(plan, federation.server)
    for named, folder in runs:
        expected = undisturbed(named, directory / folder.name, backbone=backbone)
        check_run(federation, named, folder, expected)
    finished = Counter(re.findall(r"round (\d+): 2 updates", log))
    assert finished and set(finished.values()) == {1}  # a round is never aggregated twice
    assert len(kills.done) == count
    assert not [p for p in psutil.process_iter() if str(federation.directory) in words(p)]
    return kills


def trouble(federation: Federation, kills: Kills) -> str:
    logs = "\n".join(f"--- {n}\n{federation.log(n)[-3000:]}" for n in federation.processes)
    return f"not in time, seed {kills.seed}, killed {kills.done}\n{logs}"


@pytest.mark.timeout(600)
def test_ten_kills(tmp_path: Path) -> None:
    disturb(tmp_path, count=10, pause=0.5, patience=4, rounds=15, longest=400)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_kills(tmp_path: Path) -> None:
    kills = disturb(tmp_path, count=100, pause=1.0, patience=60, rounds=40, longest=3600)
    assert min(kills.counts().values()) >= 5
