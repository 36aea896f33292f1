from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedgraft_common.errors import ServerError
from fedgraft_common.plan import Plan
from fedgraft_server.run_folder import COMPLETED, FAILED, Outcome, RunFacts, RunFolder


def make(runs: Path, name: str = "plan-0123") -> RunFolder:
    folder = RunFolder(runs / name)
    folder.write(RunFacts(json.loads(Plan().canonical), "signed", ("north", "south")))
    return folder


@contextmanager
def another_process(folder: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """Works on the run until it is killed."""
    process = subprocess.Popen(
        [
            sys.executable, "-c",
            "import sys, time; from pathlib import Path\n"
            "from fedgraft_server.run_folder import RunFolder\n"
            f"lock = RunFolder(Path({str(folder.path)!r})).take(7)\n"
            "print('works', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "works\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert folder.exists()
    assert folder.plan.hash == Plan().hash
    assert folder.facts == RunFacts(
        json.loads(Plan().canonical), "signed", ("north", "south"), stopped=False
    )
    folder.set_stopped(True)
    assert folder.facts.stopped
    assert folder.facts.sites == ("north", "south")
    folder.forget()
    assert not folder.exists()


def test_the_round_is_that_of_the_newest_checkpoint(tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert folder.round == 0
    for number in (9, 10):
        (folder.path / f"round-{number:06d}.safetensors").touch()
    (folder.path / ".round-000011.safetensors.42.tmp").touch()  # of a process that was killed
    assert folder.round == 10


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert (folder.is_worked_on(), folder.worker) == (False, 0)
    with another_process(folder) as other:
        assert (folder.is_worked_on(), folder.worker) == (True, 7)
        with pytest.raises(ServerError, match=r"run 7 of Flower.*one process for each run"):
            folder.take(8, timeout=0.1)
        assert folder.worker == 7
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert not folder.is_worked_on()
        lock = folder.take(8, timeout=0)
    assert (folder.is_worked_on(), folder.worker) == (True, 8)
    lock.release()
    assert not folder.is_worked_on()


def test_what_a_killed_process_had_begun_to_write_is_removed(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder.path / ".round-000003.safetensors.99.tmp").write_bytes(b"half")
    (folder.path / "round-000002.safetensors").write_bytes(b"whole")
    folder.take(1).release()
    assert {f.name for f in folder.path.iterdir()} >= {"run.json", "round-000002.safetensors"}
    assert not list(folder.path.glob(".*"))


def test_an_outcome_is_kept_until_the_run_goes_on(tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert folder.outcome is None
    folder.end(Outcome(FAILED, "too few sites"))
    assert folder.outcome == Outcome("failed", "too few sites")
    folder.reopen()
    assert folder.outcome is None
    folder.end(Outcome(COMPLETED))
    assert folder.outcome == Outcome("completed", "")


def test_one_command_at_a_time(tmp_path: Path) -> None:
    folder = make(tmp_path)
    entered, leave = threading.Event(), threading.Event()

    def change() -> None:
        with folder.changing():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=change)
    thread.start()
    assert entered.wait(10)
    assert folder.is_changing()
    with pytest.raises(ServerError, match="one command at a time"), folder.changing(0.1):
        raise AssertionError
    leave.set()
    thread.join()
    with folder.changing(0.1):
        assert not folder.is_worked_on()


def test_a_run_is_found_by_the_beginning_of_its_name(tmp_path: Path) -> None:
    for name in ("digits", "digits-2-ab", "digits-2-cd", "other-ef"):
        make(tmp_path, name)
    assert RunFolder.find(tmp_path, "oth").name == "other-ef"
    assert RunFolder.find(tmp_path, "digits").name == "digits"  # exactly
    for name in ("digits-2", "x"):
        with pytest.raises(ServerError, match="one of: digits, digits-2-ab"):
            RunFolder.find(tmp_path, name)
    with pytest.raises(ServerError, match="no run was started here"):
        RunFolder.find(tmp_path / "none", "x")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"plan": {}}', "null"])
def test_a_damaged_file_is_one_error(tmp_path: Path, content: str) -> None:
    folder = make(tmp_path)
    (folder.path / "run.json").write_text(content)
    with pytest.raises(ServerError, match=r"run\.json.*Restore the run's directory"):
        _ = folder.facts
    (folder.path / "outcome.json").write_text(content)
    assert folder.outcome is None
