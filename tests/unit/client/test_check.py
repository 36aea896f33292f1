"""What `fedgraft site check` says of sites that are ready and of sites that are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from fedgraft_client import check_cli
from fedgraft_client.check import Checkup, Result, check_clock, check_disk, connect
from fedgraft_client.device_check import check_device
from fedgraft_client.entry import Charge
from fedgraft_client.health import Health, State
from fedgraft_client.ledger import Ledger
from fedgraft_client.ledger_check import check_policy
from fedgraft_client.site_file import load_site_file
from fedgraft_common.accounting import SamplingEvent
from fedgraft_common.errors import DeviceError, IdentityError, LinkError, PolicyError, PrivacyError
from fedgraft_common.plan import Plan

SITE = """
name = "north"
classes = ["even", "odd"]
device = "cpu"
[data]
name = "digits-2026"
source = "train.npz"
nominal_size = 60
[policy]
maximum_epsilon = 4.0
"""
CHANGES = {
    "adapter.method": "film",
    "adapter.layers": "last:1",
    "training.expected_batch": 15,
    "privacy.epsilon": 2.0,
    "rounds.count": 20,
}
NAMES = ["site file", "data", "classes", "ledger", "budget", "identity", "connection", "clock",
         "device", "backbone", "disk", "policy", "DP step"]  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan().replace(CHANGES)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save(tmp_path)
    (tmp_path / "site.toml").write_text(SITE)
    return tmp_path


def save(directory: Path, **changes: Any) -> None:
    images = np.random.default_rng(0).random((60, 8, 8), dtype=np.float32)
    arrays: dict[str, Any] = {"images": images, "labels": np.arange(60) % 2, **changes}
    np.savez(directory / "train.npz", **arrays)


def checked(home: Path, plan: Plan | None = None) -> dict[str, Result]:
    return {result.name: result for result in Checkup(home / "site.toml", plan).run()}


@pytest.fixture
def no_bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves out the checks that load a model."""
    found = (None, False)
    monkeypatch.setattr("fedgraft_client.check.find_backbone", lambda *_: found)
    yield


def open_ledger(home: Path) -> Ledger:
    return Ledger(home / "home" / "digits-2026", "digits-2026")


def spend(ledger: Ledger, sigma: float = 2.0, steps: int = 10) -> None:
    event = SamplingEvent(0.25, sigma, steps)
    made = Charge("run", "p" * 64, 1, "train", "local", "record", event)
    ledger.commit(ledger.reserve(made), "p" * 64, 1, "d" * 64, b"x")


def test_a_site_that_has_not_joined_is_checked_as_far_as_possible(home: Path, plan: Plan) -> None:
    before = sorted(home.rglob("*"))
    found = checked(home, plan)
    assert list(found) == NAMES
    assert {n: r.ok for n, r in found.items() if r.ok is not True} == {
        "identity": False, "connection": None, "clock": None,
    }  # fmt: skip
    assert found["identity"].found == "identity: not joined"
    assert "fedgraft site join INVITE" in found["identity"].action
    assert found["connection"].found == "not joined"
    assert "60 records; 60 units declared" in found["data"].found
    assert found["classes"].found == "even 30, odd 30"
    assert "glyphs" in found["backbone"].found
    assert "20 of 20 rounds paid" in found["policy"].found
    assert "exact to" in found["DP step"].found
    assert "64 synthetic records" in found["DP step"].found
    assert sorted(home.rglob("*")) == before, "a check leaves nothing behind"


def test_without_a_site_file_the_machine_is_still_checked(tmp_path: Path) -> None:
    found = checked(tmp_path)
    assert found["site file"].ok is False
    assert "Check the path and the file" in found["site file"].action
    assert {n for n, r in found.items() if r.ok} == {"device", "backbone", "disk", "DP step"}


@pytest.mark.usefixtures("no_bench")
def test_records_and_labels_are_told_apart(home: Path) -> None:
    save(home, labels=np.arange(60) % 3)
    found = checked(home)
    assert (found["data"].ok, found["classes"].ok) == (True, False)
    assert "Correct the label map" in found["classes"].action
    save(home, images=np.full((60, 8, 8), np.nan, dtype=np.float32))
    found = checked(home)
    assert (found["data"].ok, found["classes"].ok) == (False, None)
    assert "NaN" in found["data"].found


@pytest.mark.usefixtures("no_bench")
def test_a_used_ledger_is_whole_and_reading_it_spends_nothing(home: Path) -> None:
    with open_ledger(home) as ledger:
        spend(ledger)
        before = ledger.entries()
        held = checked(home)
        assert "held by a running process" in held["ledger"].found
        assert ledger.entries() == before
    found = checked(home)
    assert (found["ledger"].ok, found["ledger"].found) == (True, "3 entries, chain whole, free")
    assert "of 4 left" in found["budget"].found
    with open_ledger(home) as ledger:  # the lock was given back
        assert ledger.entries() == before


@pytest.mark.usefixtures("no_bench")
def test_what_is_wrong_with_a_ledger(home: Path) -> None:
    at = home / "home" / "digits-2026"
    with open_ledger(home) as ledger:
        spend(ledger)
    old = (at / "ledger.sqlite3").read_bytes()
    with open_ledger(home) as ledger:
        spend(ledger)
    new = (at / "ledger.sqlite3").read_bytes()
    (at / "ledger.sqlite3").write_bytes(old)
    found = checked(home)
    assert found["ledger"].ok is False
    assert "An old copy was put back" in found["ledger"].action
    assert (found["budget"].ok, found["policy"].ok) == (None, None)
    (at / "ledger.sqlite3").write_bytes(new)
    witness = (at / "ledger.witness").read_bytes()
    (at / "ledger.witness").write_bytes(b"".join(witness.splitlines(keepends=True)[:-2]))
    assert "An old copy of the witness" in checked(home)["ledger"].action
    (at / "ledger.witness").write_bytes(witness)
    for name, text in (("ledger.key", "Put it back from a backup"), ("ledger.witness", "disk")):
        content = (at / name).read_bytes()
        (at / name).unlink()
        found = checked(home)
        assert found["ledger"].ok is False
        assert text in found["ledger"].action
        (at / name).write_bytes(content)
    assert checked(home)["ledger"].ok
    (at / "ledger.sqlite3").unlink()
    assert "its witness is there" in checked(home)["ledger"].found
    shutil.rmtree(at)
    assert "none yet" in checked(home)["ledger"].found


@pytest.mark.usefixtures("no_bench")
def test_a_spent_budget_is_red(home: Path) -> None:
    with open_ledger(home) as ledger:
        spend(ledger, sigma=0.5, steps=60)
    found = checked(home)["budget"]
    assert found.ok is False
    assert "used up" in found.action


def test_a_plan_is_held_against_policy_and_budget(home: Path, plan: Plan) -> None:
    file = load_site_file(home / "site.toml")
    assert "no --plan" in check_policy(file, None, [])[0]
    with pytest.raises(PolicyError, match=r"privacy\.epsilon: found 9"):
        check_policy(file, plan.replace({"privacy.epsilon": 9.0}), [])
    with pytest.raises(PolicyError, match="what the budget pays"):
        check_policy(file, plan, [SamplingEvent(0.25, 0.8, 60)])
    shared = plan.replace(
        {
            "privacy.mechanism": "distributed",
            "training.sample_rate": 0.25,
            "aggregation.sites": 4,
        }
    )
    with pytest.raises(PrivacyError, match="at a site with real data"):
        check_policy(file, shared.replace({"privacy.secure_aggregation": "summed"}), [])
    with pytest.raises(PolicyError, match=r"policy\.mechanisms"):
        check_policy(file, shared, [])
    rules = file.policy.model_copy(update={"mechanisms": ("distributed",)})
    check_policy(file.model_copy(update={"policy": rules}), shared, [])


class Site:
    """An identity, as far as `connect` looks at it."""

    class facts:  # noqa: N801
        site = "north"
        gateway = "gateway:9443"


def test_connection_and_clock() -> None:
    moments = iter([100.0, 102.0] * 3)
    answer: dict[str, Any] = {"site": "north", "time": 111.0}
    identity: Any = Site()
    text, offset = connect(identity, lambda _: answer, lambda: next(moments))
    assert text == "gateway:9443 in 2000 ms over mutual TLS"
    assert offset == (10.0, 1.0)
    assert connect(identity, lambda _: {"site": "north"}, lambda: next(moments))[1] is None
    with pytest.raises(IdentityError, match="known as south"):
        connect(identity, lambda _: {"site": "south"}, lambda: next(moments))
    for ahead in (10.0, -10.0):
        with pytest.raises(LinkError, match=r"10.0 s (behind|ahead of) the server's.*NTP"):
            check_clock(ahead, 1.0)
    assert check_clock(-5.5, 1.0)[0] == "-5.5 s to the server's"


def test_disk_and_device(tmp_path: Path) -> None:
    assert "free" in check_disk(tmp_path / "not" / "yet", 0)[0]
    with pytest.raises(DeviceError, match=r"disk of .*GiB free.*Free some space"):
        check_disk(tmp_path, 2**60)
    assert check_device("cpu", 4.0)[1] == torch.device("cpu")


def test_a_device_that_is_not_here_leaves_the_step_to_the_cpu(home: Path) -> None:
    (home / "site.toml").write_text(SITE.replace('"cpu"', '"cuda:77"'))
    found = checked(home)
    assert found["device"].ok is False
    assert found["backbone"].ok
    assert "on cpu" in found["DP step"].found


def test_a_check_that_breaks_is_a_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*_: object) -> None:
        raise RuntimeError("driver")

    monkeypatch.setattr("fedgraft_client.check.load_bench", stumble)
    found = checked(home)
    assert (found["backbone"].ok, found["backbone"].found) == (False, "RuntimeError: driver")
    assert found["DP step"].ok is None
    assert found["disk"].ok


# --- commands


@pytest.fixture
def commands() -> typer.Typer:
    app = typer.Typer()
    app.command("check")(check_cli.check)
    app.command("status")(check_cli.status)
    return app


@pytest.mark.usefixtures("no_bench")
def test_the_table_and_its_exit_code(home: Path, commands: typer.Typer) -> None:
    site = ["--site", str(home / "site.toml")]
    shown = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1"}).invoke(commands, ["check", *site])
    assert shown.exit_code == 1
    assert "not joined" in shown.stdout
    assert "fedgraft site join INVITE" in " ".join(shown.stdout.split())
    lines = [line for line in shown.stdout.splitlines() if " fail " in line]
    assert len(lines) == 1
    found = json.loads(CliRunner().invoke(commands, ["check", *site, "--json"]).stdout)
    assert found["ok"] is False
    assert [check["name"] for check in found["checks"]] == NAMES
    assert set(found["checks"][0]) == {"name", "ok", "found", "action"}


def test_status_tells_whether_the_daemon_lives(
    home: Path, commands: typer.Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = ["status", "--site", str(home / "site.toml")]
    file = home / "home" / "status.json"

    def shown(*options: str) -> tuple[int, str]:
        result = CliRunner().invoke(commands, [*site, *options])
        return result.exit_code, result.stdout

    code, text = shown()
    assert (code, text.split(":")[0]) == (1, "daemon      absent")
    health = Health(
        State.WORKING, True, since=1.8e9, round=4, status="refused-hours", last_answer=1.8e9,
        last_error="time of day: found '12:00'",
    )  # fmt: skip
    health.write(file)
    code, text = shown()
    assert code == 0
    assert text.splitlines() == [
        "daemon      running, working since 2027-01-15 08:00:00 UTC",
        "connected   yes",
        "last round  4",
        "last status refused-hours",
        "last reply  2027-01-15 08:00:00 UTC",
        "last error  time of day: found '12:00'",
    ]
    code, text = shown("--json")
    found = json.loads(text)
    assert (code, found["daemon"], found["health"]["status"]) == (0, "running", "refused-hours")
    now = file.stat().st_mtime + 100
    monkeypatch.setattr("fedgraft_client.check_cli.time.time", lambda: now)
    code, text = shown()
    assert code == 1
    assert "no sign of life for 100 s" in text
    assert "connected   no" in text
    Health(State.STOPPED, since=1.8e9).write(file)
    code, text = shown()
    assert (code, text.splitlines()[0]) == (1, "daemon      stopped since 2027-01-15 08:00:00 UTC")
    assert "last reply  never" in text
    file.write_text("?")
    assert CliRunner().invoke(commands, site).exit_code == 1
