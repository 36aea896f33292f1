"""`fedgraft audit` as an auditor uses it, and as whoever gets the report does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from fedgraft_client.account import export
from fedgraft_client.entry import Charge
from fedgraft_client.ledger import Ledger
from fedgraft_common.accounting import SamplingEvent
from fedgraft_common.cli import main

PLAN = "b" * 64


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Audit = Callable[..., Outcome]


@pytest.fixture
def audit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Audit:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FEDGRAFT_AUDITOR_KEY", str(tmp_path / "auditor.key"))

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr("sys.argv", ["fedgraft", "audit", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    file = tmp_path / "ledger.jsonl"
    with Ledger(tmp_path / "site", "x-rays") as ledger:
        for number in (1, 2, 3):
            event = SamplingEvent(0.25, 2.0, 1)
            charge = Charge("xray", PLAN, number, "train", "local", "record", event)
            ledger.commit(ledger.reserve(charge), PLAN, number, f"{number:064}", b"content")
        file.write_text(export(ledger.entries()))
    return file


def test_a_ledger_is_audited_from_its_export_alone(
    audit: Audit, exported: Path, tmp_path: Path
) -> None:
    outcome = audit("--ledger", str(exported), "--out", "report")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("PASS  The account holds.")
    assert "digits" not in (tmp_path / "report" / "audit.json").read_text()
    assert "auditor.key" not in outcome.out
    assert (tmp_path / "auditor.key").stat().st_mode & 0o077 == 0
    checked = audit("--verify", "report")
    assert (checked.code, checked.out.splitlines()[-1]) == (0, "verdict    pass")


def test_a_tampered_ledger_fails_with_a_signed_report(
    audit: Audit, exported: Path, tmp_path: Path
) -> None:
    exported.write_text(
        exported.read_text().replace('"noise_multiplier": 2.0', '"noise_multiplier": 4.0')
    )
    outcome = audit("--ledger", str(exported), "--out", "report")
    assert outcome.code == 1
    assert "signature is not this site's" in outcome.out
    report = json.loads((tmp_path / "report" / "audit.json").read_text())["report"]
    assert report["verdict"] == "fail"
    assert audit("--verify", "report").code == 0


def test_a_site_file_holds_its_policy_against_the_ledger(
    audit: Audit, exported: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site.toml"
    site.write_text(
        'classes = ["a", "b"]\n[data]\nname = "x-rays"\nsource = "x.npz"\nnominal_size = 60\n'
        '[policy]\ntasks = ["ct-*"]\n'
    )
    outcome = audit("--ledger", str(exported), "--site", str(site), "--out", "report")
    assert outcome.code == 1
    assert "task xray" in outcome.out


def test_a_cut_tail_shows_against_an_earlier_export(
    audit: Audit, exported: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(exported.read_text().splitlines(keepends=True)[:-2]))
    assert audit("--ledger", str(cut), "--out", "report").code == 0
    outcome = audit("--ledger", str(cut), "--witness", str(exported), "--out", "report")
    assert outcome.code == 1
    assert "goes on to line 7" in outcome.out
    outcome = audit("--ledger", str(exported), "--site-key", "ab" * 32, "--out", "report")
    assert outcome.code == 1
    assert "that you know" in outcome.out


def test_a_report_that_was_altered_is_refused(audit: Audit, exported: Path, tmp_path: Path) -> None:
    audit("--ledger", str(exported), "--out", "report")
    page = tmp_path / "report" / "audit.html"
    page.write_text(page.read_text().replace("PASS", "FAIL"))
    outcome = audit("--verify", "report")
    assert outcome.code == 1
    assert "altered after it was signed" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--part", "moon"], "ledger, egress, mechanism"),
        (["--effort", "huge"], "quick, full"),
        (["--ledger", "nowhere.jsonl"], "ledger export"),
        (["--verify", "nowhere"], "audit.json"),
        (["--part", "ledger", "nowhere.toml"], "no such file"),
        (["--part", "ledger", "--evidence", "."], "new or empty"),
        (["--witness", "ledger.jsonl"], "--ledger"),
    ],
)
def test_bad_input_gets_one_line(
    audit: Audit, exported: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    outcome = audit(*arguments)
    assert outcome.code == 1
    assert says in outcome.err
    assert not (tmp_path / "runs").exists()
    assert "Traceback" not in outcome.err


def test_parts_of_a_plan_run_alone_and_keep_their_evidence(audit: Audit, tmp_path: Path) -> None:
    outcome = audit(
        "--part", "egress,ledger", "--effort", "quick", "--set", "rounds.count=2",
        "--set", "sites.count=3", "--evidence", "evidence", "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.out + outcome.err
    report = json.loads(outcome.out)
    assert [part["name"] for part in report["parts"]] == ["egress", "ledger"]
    assert "mechanism" in report["not_run"]
    assert sorted(p.name for p in (tmp_path / "evidence").iterdir()) == [
        "egress", "ledger", "rehearsal",
    ]  # fmt: skip
    assert (tmp_path / "runs" / "digits" / "audit" / "audit.html").exists()
