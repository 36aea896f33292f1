"""What an auditor gets from a ledger alone: whole or not, and what it cost."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fedgraft_client.account import document, export, read_ledger, runs, verify
from fedgraft_client.entry import Charge, spent
from fedgraft_client.ledger import Ledger
from fedgraft_common.accounting import SamplingEvent, epsilon
from fedgraft_common.errors import LedgerError


def fill(directory: Path, *mechanisms: tuple[float, float, int]) -> Path:
    with Ledger(directory, "x-rays") as ledger:
        for number, (q, sigma, steps) in enumerate(mechanisms):
            event = SamplingEvent(q, sigma, steps)
            made = Charge(f"run-{number}", f"{number:064x}", 1, "train", "local", "record", event)
            ledger.commit(ledger.reserve(made), made.plan, 1, "d" * 64, b"private features")
    return directory / "ledger.sqlite3"


def test_the_golden_composition_comes_out_of_a_ledger(tmp_path: Path) -> None:
    """PRIVACY.md: (0.05, 1.5, 100) + (0.1, 2, 200) + (0.02, 1, 300) is 4.3935, PRV 4.4037."""
    ledger = fill(tmp_path, (0.05, 1.5, 100), (0.1, 2, 200), (0.02, 1, 300))
    found = verify(read_ledger(ledger), 1e-5, tmp_path / "ledger.witness")
    assert (f"{found.epsilon:.4f}", f"{found.second:.4f}") == ("4.3935", "4.4037")
    assert (found.entries, found.faults, found.reserved) == (7, (), 0)
    assert document(found)["whole"] is True


def test_a_long_history_is_checked_on_coarser_grids(tmp_path: Path) -> None:
    many = [(0.05, 1.5 + 0.1 * i, 20) for i in range(10)]
    entries = read_ledger(fill(tmp_path, *many))
    found = verify(entries, 1e-5)
    exact = epsilon(spent(entries), 1e-5)
    assert exact <= found.epsilon <= exact * 1.01
    assert abs(found.second - exact) <= found.tolerance == pytest.approx(0.2 + found.epsilon / 100)


@pytest.mark.parametrize("count", [1, 10])
def test_two_accountants_agree_on_a_large_budget(tmp_path: Path, count: int) -> None:
    ledger = fill(tmp_path, *[(0.25, 2 + 0.01 * i, 1600 // count) for i in range(count)])
    found = verify(read_ledger(ledger), 1e-5)
    assert found.epsilon > 30
    assert found.faults == ()


def test_a_reservation_without_a_commit_is_reported_and_counts(tmp_path: Path) -> None:
    ledger = fill(tmp_path, (0.25, 2, 90))
    with Ledger(tmp_path, "x-rays") as opened:
        event = SamplingEvent(0.25, 2, 10)
        opened.reserve(Charge("late", "e" * 64, 2, "train", "local", "record", event))
    found = verify(read_ledger(ledger), 1e-5)
    assert found.reserved == 1
    assert f"{found.epsilon:.5f}" == "6.44915"


def test_an_export_is_all_an_auditor_needs_and_holds_no_reply(tmp_path: Path) -> None:
    entries = read_ledger(fill(tmp_path, (0.25, 2, 100)))
    text = export(entries)
    (tmp_path / "export.jsonl").write_text(text)
    assert read_ledger(tmp_path / "export.jsonl") == entries
    assert "features" not in text
    changed = text.replace('"steps": 100', '"steps": 10')
    assert changed != text
    (tmp_path / "export.jsonl").write_text(changed)
    found = verify(read_ledger(tmp_path / "export.jsonl"), 1e-5)
    assert "entry 2: the signature is not this site's" in found.faults[0]
    assert document(found)["whole"] is False


def test_a_cut_export_shows_with_the_witness(tmp_path: Path) -> None:
    entries = read_ledger(fill(tmp_path, (0.25, 2, 100)))
    found = verify(entries[:-1], 1e-5, tmp_path / "ledger.witness")
    assert found.faults == ("the witness has seen entry 3; the end is missing",)


def test_it_can_be_read_while_the_daemon_holds_it(tmp_path: Path) -> None:
    with Ledger(tmp_path, "x-rays") as ledger:
        event = SamplingEvent(0.25, 2, 100)
        ledger.reserve(Charge("run", "e" * 64, 1, "train", "local", "record", event))
        assert len(read_ledger(ledger.path)) == 2


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b'{"format": "other"}\n', b"SQLite format 3"]
)
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="fedgraft ledger export"):
        read_ledger(path)


def test_a_ledger_without_a_beginning_cannot_be_checked(tmp_path: Path) -> None:
    entries = read_ledger(fill(tmp_path, (0.25, 2, 100)))
    with pytest.raises(LedgerError, match="whole export"):
        verify(entries[1:], 1e-5)


def test_what_each_run_cost(tmp_path: Path) -> None:
    ledger = fill(tmp_path, (0.25, 2, 50), (0.25, 2, 50))
    with Ledger(tmp_path, "x-rays") as opened:
        opened.seal(f"{0:064x}")
    first, second = runs(read_ledger(ledger), 1e-5)
    assert (
        first.epsilon
        == first.lifetime
        == second.epsilon
        == pytest.approx(epsilon([SamplingEvent(0.25, 2, 50)], 1e-5))
    )
    assert f"{second.lifetime:.5f}" == "6.44915"
    assert (first.sealed, second.sealed) == (True, False)
    assert (first.rounds, first.steps) == (1, 50)


def test_recovered_lines_are_what_they_were(tmp_path: Path) -> None:
    fill(tmp_path, (0.25, 2, 100))
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite3")) as connection, connection:
        connection.execute("DELETE FROM entries WHERE seq > 1")
        connection.execute("DELETE FROM rounds")
    Ledger(tmp_path, "x-rays", recover=True).close()
    entries = read_ledger(tmp_path / "ledger.sqlite3")
    (only,) = runs(entries, 1e-5)
    assert (only.run, only.steps, f"{only.lifetime:.5f}") == ("run-0", 100, "6.44915")
    assert json.loads(export(entries).splitlines()[-1])["kind"] == "recover"


def test_an_auditor_who_knows_the_key_notices_another(tmp_path: Path) -> None:
    entries = read_ledger(fill(tmp_path, (0.25, 2, 100)))
    own = verify(entries, 1e-5)
    assert verify(entries, 1e-5, expected_key=own.key).faults == ()
    assert not own.witnessed
    other = verify(entries, 1e-5, expected_key="ab" * 32)
    assert "names the key" in other.faults[0]
