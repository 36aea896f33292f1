"""What an operator and an auditor do with a ledger, as commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fedgraft_client.entry import Charge
from fedgraft_client.opening import open_site
from fedgraft_client.site import Site
from fedgraft_common.accounting import SamplingEvent
from fedgraft_common.adapted import adapted_backbone
from fedgraft_common.plan import load_plan

SITE = """
name = "north"
classes = ["even", "odd"]
[data]
name = "digits-2026"
source = "train.npz"
nominal_size = 60
[policy]
maximum_epsilon = 4.0
"""
PLAN = """
name = "parity"
[adapter]
method = "film"
layers = "last:1"
[training]
expected_batch = 15
[privacy]
epsilon = 2.0
[rounds]
count = 20
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    images = generator.random((60, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "train.npz", images=images, labels=np.arange(60) % 2)
    (tmp_path / "site.toml").write_text(SITE)
    (tmp_path / "plan.toml").write_text(PLAN)
    return tmp_path


@contextmanager
def opened(home: Path) -> Iterator[Site]:
    site = open_site(home / "site.toml")
    try:
        yield site
    finally:
        site.store.close()


def spend(home: Path, *runs: tuple[str, float, int]) -> None:
    with opened(home) as site:
        for run, sigma, steps in runs:
            event = SamplingEvent(0.25, sigma, steps)
            made = Charge(run, run * 8, 1, "train", "local", "record", event)
            site.store.ledger.commit(site.store.ledger.reserve(made), run * 8, 1, "d" * 64, b"x")


def fedgraft(home: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("fedgraft")), *arguments],
        cwd=home,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def ledger(home: Path) -> str:
    return str(home / "home" / "digits-2026" / "ledger.sqlite3")


def test_a_budget_before_and_after_spending(home: Path) -> None:
    text = fedgraft(home, "site", "budget").stdout
    assert "Spent 0.00 of epsilon 4" in text
    spend(home, ("lungs", 4.0, 50), ("hearts", 4.0, 50))
    text = fedgraft(home, "site", "budget").stdout
    assert "lungs" in text and "hearts" in text and "█" in text
    assert max(map(len, text.splitlines())) <= 80
    found = json.loads(fedgraft(home, "site", "budget", "--json").stdout)
    assert [run["run"] for run in found["runs"]] == ["lungs", "hearts"]
    assert found["spent"] == found["runs"][-1]["lifetime"] < 4
    assert found["left"] == pytest.approx(4 - found["spent"])


def test_the_cost_of_a_plan(home: Path) -> None:
    text = fedgraft(home, "site", "cost", "plan.toml").stdout
    assert "affordable     20 of 20 rounds" in text
    spend(home, ("lungs", 2.0, 35))
    found = json.loads(fedgraft(home, "site", "cost", "plan.toml", "--json").stdout)
    assert found["rounds"] < found["asked"] == 20
    assert found["after"] > 4
    assert "The site would refuse" in fedgraft(home, "site", "cost", "plan.toml").stdout


def test_a_plan_outside_the_policy(home: Path) -> None:
    (home / "plan.toml").write_text(PLAN.replace("epsilon = 2.0", "epsilon = 5.0"))
    done = fedgraft(home, "site", "cost", "plan.toml", code=1)
    assert "privacy.epsilon: found 5.0; allowed: at most 4 (policy.maximum_epsilon)" in done.stderr


def test_plans_wait_and_are_approved(home: Path) -> None:
    plan = load_plan(home / "plan.toml")
    with opened(home) as site:
        assert not site.store.approved(plan)
    assert f"{plan.hash[:12]}  waiting   parity" in fedgraft(home, "site", "plans").stdout
    done = fedgraft(home, "site", "approve", "ffff", code=1)
    assert f"one waiting plan: {plan.hash[:12]}" in done.stderr
    assert "Approved" in fedgraft(home, "site", "approve", plan.hash[:8]).stdout
    with opened(home) as site:
        assert site.store.approved(plan)


def test_an_auditor_verifies_an_export(home: Path) -> None:
    spend(home, ("lungs", 2.0, 100))
    text = fedgraft(home, "ledger", "verify", ledger(home)).stdout
    assert "entries    3, whole" in text
    assert "witness    agrees" in text
    assert "epsilon    6.4492 at delta 1e-05 (PLD, decides)" in text
    assert "6.4595 (PRV" in text
    exported = fedgraft(home, "ledger", "export", ledger(home)).stdout
    (home / "export.jsonl").write_text(exported)
    assert "whole" in fedgraft(home, "ledger", "verify", "export.jsonl").stdout
    (home / "export.jsonl").write_text(exported.replace('"steps": 100', '"steps": 10'))
    done = fedgraft(home, "ledger", "verify", "export.jsonl", "--json", code=1)
    assert json.loads(done.stdout)["whole"] is False
    shown = fedgraft(home, "ledger", "show", ledger(home)).stdout
    assert "reserve" in shown and "sigma 2," in " ".join(shown.split())


def test_an_old_copy_is_refused_and_recovered(home: Path) -> None:
    spend(home, ("lungs", 4.0, 10))
    old = Path(ledger(home)).read_bytes()
    spend(home, ("hearts", 4.0, 20))
    Path(ledger(home)).write_bytes(old)
    done = fedgraft(home, "site", "refit", "plan.toml", "--adapter", "none", code=1)
    assert "fedgraft ledger recover" in done.stderr
    assert "Put back 2 entries" in fedgraft(home, "ledger", "recover").stdout
    assert "Nothing was missing" in fedgraft(home, "ledger", "recover").stdout


def test_a_refit_ends_the_run_here(home: Path) -> None:
    plan = load_plan(home / "plan.toml")
    done = fedgraft(home, "site", "refit", "plan.toml", "--adapter", "nowhere", code=1)
    assert "adapter_model.safetensors" in done.stderr
    adapted_backbone(plan).save(home / "adapter")
    text = fedgraft(home, "site", "refit", "plan.toml", "--adapter", "adapter").stdout
    assert "never takes part in a round again" in text
    with opened(home) as site:
        assert site.store.ledger.sealed(plan.hash)
    sealed = home / "home" / "digits-2026" / plan.hash / "sealed.safetensors"
    found = fedgraft(
        home, "predict", "train.npz", "--adapter", "adapter", "--head", str(sealed), "--json"
    ).stdout
    assert {row["label"] for row in json.loads(found)} == {"even", "odd"}


def test_a_ledger_that_the_daemon_holds(home: Path) -> None:
    with opened(home):
        assert "Spent 0.00" in fedgraft(home, "site", "budget").stdout
        done = fedgraft(home, "ledger", "recover", code=1)
        assert "in use by another process" in done.stderr


def test_the_readme_prints_what_the_commands_print(home: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = readme.split("## A site's ledger")[1].split("\n## ")[0]
    site_file = section.split("```toml\n")[1].split("```")[0]
    (home / "site.toml").write_text(site_file)
    blocks = {}
    for part in section.split("```console\n$ ")[1].split("```")[0].split("\n$ "):
        command, _, output = part.partition("\n")
        blocks[command] = output.strip("\n").splitlines()

    def printed(command: str) -> list[str]:
        lines = fedgraft(home, *command.split()[1:]).stdout.rstrip("\n").splitlines()
        return [re.sub(r"^(key +)[0-9a-f]{16}", r"\1KEY", line.rstrip()) for line in lines]

    blocks = {
        command: [re.sub(r"^(key +)[0-9a-f]{16}", r"\1KEY", line) for line in lines]
        for command, lines in blocks.items()
    }
    cost, budget, verify = blocks
    assert printed(cost) == blocks[cost]
    plan = load_plan(home / "plan.toml")
    with opened(home) as site:
        for run in (plan, plan.replace({"name": "parity-2", "privacy.epsilon": 1.5})):
            event = site.step(run).event
            assert event is not None
            site.store.ledger.approve(run.hash, run.name)
            for number in range(1, 21):
                one = SamplingEvent(event.sample_rate, event.noise_multiplier, 1)
                made = Charge(run.name, run.hash, number, "train", "local", "record", one)
                seq = site.store.ledger.reserve(made)
                site.store.ledger.commit(seq, run.hash, number, "d" * 64, b"x")
    assert printed(budget) == blocks[budget]
    assert printed(verify) == blocks[verify]
