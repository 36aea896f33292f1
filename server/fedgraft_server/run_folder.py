"""A run's directory on the server: what the coordinator wants, how far it came, who works on it.

    DIR/runs/NAME-HASH/run.json       plan, signature, sites; whether the coordinator stopped it
                       outcome.json   how it ended, once its process itself said so
                       worker         Flower's number of the newest process that worked on it
                       worker.lock    held by that process while it lives
                       change.lock    held by whoever starts or stops the run
                       log.jsonl      what the run's processes logged
                       round-*        checkpoints
                       adapter/       the final adapter in PEFT's format

Flower's own state says what became of a process. What is wanted, and whether the work is done, is
here: so a run whose process, SuperLink or whole server was killed is known to be unfinished.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from fedgraft_common.atomic import remove_leftovers, write_atomically
from fedgraft_common.errors import ServerError
from fedgraft_common.plan import Plan, parse_plan

COMPLETED: Final = "completed"
FAILED: Final = "failed"
STOPPED: Final = "stopped"
INTERRUPTED: Final = "interrupted"
RUNNING: Final = "running"
LOG: Final = "log.jsonl"
_TURN: Final = 60.0  # seconds a process waits for its predecessor to end


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a run was started with.

    Attributes:
        plan: canonical, as a JSON document.
        signature: the operator's, on the plan.
        sites: names.
        stopped: whether the coordinator stopped it.
    """

    plan: dict[str, Any]
    signature: str
    sites: tuple[str, ...]
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, by its own account.

    Attributes:
        word: `completed` or `failed`.
        reason: why it failed.
    """

    word: str
    reason: str = ""


class RunFolder:
    """One run.

    Args:
        path: its directory; need not exist yet.

    Attributes:
        path: the same.
        name: of the run.
        log: the file with its log lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self._file = path / "run.json"
        self._outcome = path / "outcome.json"
        self._worker = path / "worker"
        self.log = path / LOG

    @classmethod
    def all(cls, runs: Path) -> list[RunFolder]:
        """Every run of a server, by name."""
        return [cls(file.parent) for file in sorted(runs.glob("*/run.json"))]

    @classmethod
    def find(cls, runs: Path, name: str) -> RunFolder:
        """The run whose name begins so.

        Raises:
            ServerError: none or several.
        """
        known = cls.all(runs)
        found = [folder for folder in known if folder.name.startswith(name)]
        exact = [folder for folder in found if folder.name == name]
        if len(exact or found) != 1:
            names = ", ".join(folder.name for folder in known)
            raise ServerError(
                "run", name, f"one of: {names or 'no run was started here'}",
                "List them: `fedgraft runs`.",
            )  # fmt: skip
        return (exact or found)[0]

    def exists(self) -> bool:
        """Whether the run was ever started."""
        return self._file.exists()

    @property
    def facts(self) -> RunFacts:
        """What it was started with.

        Raises:
            ServerError: run.json is damaged.
        """
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            return RunFacts(
                found["plan"], found["signature"], tuple(found["sites"]), found["stopped"]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ServerError(
                str(self._file), f"{type(error).__name__}: {error}", "a file written by fedgraft",
                "Restore the run's directory from a backup, or move it away.",
            ) from None  # fmt: skip

    def write(self, facts: RunFacts) -> None:
        """Replaces run.json."""
        document = {
            "plan": facts.plan,
            "signature": facts.signature,
            "sites": list(facts.sites),
            "stopped": facts.stopped,
        }
        write_atomically(self._file, (json.dumps(document, indent=2) + "\n").encode())

    def forget(self) -> None:
        """Takes `write` back: the run was never started."""
        self._file.unlink(missing_ok=True)

    def set_stopped(self, stopped: bool) -> None:
        """Writes down what the coordinator wants."""
        self.write(replace(self.facts, stopped=stopped))

    @property
    def plan(self) -> Plan:
        """The run's plan.

        Raises:
            ServerError: run.json is damaged.
            PlanError: it holds no plan of this version.
        """
        return parse_plan(self.facts.plan, origin=str(self._file))

    @property
    def round(self) -> int:
        """The newest finished round; 0 before the first."""
        finished = sorted(self.path.glob("round-*.safetensors"))
        return int(finished[-1].stem.partition("-")[2]) if finished else 0

    # --- who works on it, and how it ended

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None if its process never said so."""
        try:
            return Outcome(**json.loads(self._outcome.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None  # written in one step: so it is not there

    def end(self, outcome: Outcome) -> None:
        """Writes down how it ended."""
        document = {"word": outcome.word, "reason": outcome.reason}
        write_atomically(self._outcome, (json.dumps(document, indent=2) + "\n").encode())

    def reopen(self) -> None:
        """Forgets how it ended: it is about to go on."""
        self._outcome.unlink(missing_ok=True)

    @property
    def worker(self) -> int:
        """Flower's number of the newest process that worked on it; 0 before the first."""
        try:
            return int(self._worker.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0

    def is_worked_on(self) -> bool:
        """Whether a process works on it now; the kernel lets go of the lock of a dead one."""
        return self._is_held("worker")

    def is_changing(self) -> bool:
        """Whether somebody starts or stops it now."""
        return self._is_held("change")

    def take(self, number: int, timeout: float = _TURN) -> FileLock:
        """Makes this process the one that works on the run, until it ends or lets go of the lock.

        Two processes on one run would aggregate a round twice. What a predecessor was writing when
        it was killed is removed.

        Args:
            number: Flower's number of the run.
            timeout: seconds to wait for a predecessor.

        Raises:
            ServerError: another process works on it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self._lock("worker")
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            raise ServerError(
                f"run {self.name}", f"worked on by another process (run {self.worker} of Flower)",
                "one process for each run", "Wait for it, or stop it with `fedgraft stop`.",
            ) from None  # fmt: skip
        remove_leftovers(self.path)
        write_atomically(self._worker, str(number).encode(), durable=False)
        return lock

    @contextmanager
    def changing(self, timeout: float = _TURN) -> Iterator[None]:
        """Nobody else starts or stops the run meanwhile.

        Raises:
            ServerError: somebody else does.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with self._lock("change").acquire(timeout=timeout):
                yield
        except Timeout:
            raise ServerError(
                f"run {self.name}", "being started or stopped by another command",
                "one command at a time", "Try again in a moment.",
            ) from None  # fmt: skip

    def _is_held(self, name: str) -> bool:
        lock = self._lock(name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.path / f"{name}.lock", poll_interval=0.05)
