"""Whether a federation that runs for long grows: memory, file handles, threads, disk.

Everything is as in production: `fedgraft server up`, two site daemons with their ledgers, mutual
TLS, one plan of many small rounds over few records. Now and then the memory, handles and threads of
each process are read, and the size of what each keeps on disk. What grows is told for a thousand
rounds, by a line through the samples after the first fifth, when every cache is warm.

On purpose are kept: a site's ledger and its witness, log lines, and what Flower's database keeps.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import psutil

from fedgraft_common.plan import Plan, load_plan
from fedgraft_simulations.benchmarks.measure import Report
from fedgraft_simulations.cli import PLANS
from fedgraft_simulations.federation.__main__ import begin, follow
from fedgraft_simulations.federation.processes import Federation
from fedgraft_simulations.partition import partition

SITES: Final = 2
SAMPLES: Final = 20
WARM: Final = 0.2  # of the rounds
MIB: Final = 1 << 20
PURPOSE: Final = ("ledger", "witness", "logs", "flower")
"""Kinds of files that grow because something is kept."""
_PROGRAMS: Final = {
    "flower-superlink": "superlink", "flower-superexec": "superexec", "flwr-serverapp": "run",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """A look at everything.

    Attributes:
        round: finished rounds.
        seconds: since the run began.
        memory: bytes that only this process has, by process.
        handles: open files and connections, by process.
        threads: by process.
        disk: bytes, by kind of file.
    """

    round: int
    seconds: float
    memory: dict[str, int]
    handles: dict[str, int]
    threads: dict[str, int]
    disk: dict[str, int]


def measure(repetitions: int = 200) -> Report:
    """Runs so many rounds.

    Args:
        repetitions: rounds; 2,000 for a soak, which takes a quarter of an hour on a quiet machine.
    """
    samples = watch(repetitions)
    last = samples[-1]
    figures = {f"memory of {n}, MiB / 1,000 rounds": v / MIB for n, v in growth(samples, "memory")}
    figures |= {f"handles of {n} / 1,000 rounds": v for n, v in growth(samples, "handles")}
    figures |= {f"disk: {n}, kB / 1,000 rounds": v / 1000 for n, v in growth(samples, "disk")}
    rows = [
        {
            "round": float(sample.round),
            **{f"{name}, MiB": size / MIB for name, size in sample.memory.items()},
            "handles": float(sum(sample.handles.values())),
            "threads": float(sum(sample.threads.values())),
            **{f"{kind}, kB": size / 1000 for kind, size in sample.disk.items()},
        }
        for sample in samples
    ]
    return Report(
        "soak",
        f"{last.round} rounds, {SITES} sites, everything as in production",
        figures=figures,
        rows=tuple(rows),
        notes=(
            f"{last.seconds:.0f} s, {last.seconds / max(last.round, 1):.2f} s a round.",
            f"Kept on purpose: {', '.join(PURPOSE)}.",
        ),
    )


def plan_of(rounds: int) -> Plan:
    """The demo's plan with a few records a round."""
    changes = [
        f"sites.count={SITES}", f"aggregation.sites={SITES}", f"aggregation.minimum_sites={SITES}",
        f"rounds.count={rounds}", "rounds.deadline=600", "privacy.mechanism=local",
        "training.sample_rate=0.05",
    ]  # fmt: skip
    return load_plan(PLANS / "digits.toml", changes)


def watch(rounds: int, note: Callable[[Sample], None] = lambda _: None) -> list[Sample]:
    """Runs a federation and samples it.

    Args:
        rounds: of the run.
        note: told about each sample.
    """
    plan = plan_of(rounds)
    samples: list[Sample] = []
    with (
        tempfile.TemporaryDirectory(prefix="fedgraft-soak-") as name,
        Federation(Path(name) / "federation", plan) as federation,
    ):
        federation.start_server()
        for share in partition(plan):
            federation.join(share, plan)
            federation.start_site(share.name)
        folder = begin(federation)
        started = time.monotonic()

        def tell(finished: int) -> None:
            begun = samples[-1].round if samples else 0
            if finished - begun >= rounds / SAMPLES or finished == rounds > begun:
                samples.append(look(federation, folder, finished, time.monotonic() - started))
                note(samples[-1])

        follow(federation, folder, tell)
    return samples


def look(federation: Federation, folder: Path, finished: int, seconds: float) -> Sample:
    """One sample."""
    family = {name: psutil.Process(child.pid) for name, child in federation.processes.items()}
    for child in family["server"].children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = " ".join(child.cmdline())
            for program, called in _PROGRAMS.items():
                if program in words:
                    family[called] = child
    memory, handles, threads = {}, {}, {}
    for name, process in sorted(family.items()):
        with contextlib.suppress(psutil.NoSuchProcess):
            memory[name] = int(process.memory_full_info().uss)
            handles[name] = process.num_fds()
            threads[name] = process.num_threads()
    return Sample(finished, seconds, memory, handles, threads, disk(federation, folder))


def disk(federation: Federation, folder: Path) -> dict[str, int]:
    """Bytes of every file below the federation's directory, by kind."""
    kinds = dict.fromkeys((*PURPOSE, "checkpoints", "other"), 0)
    for file in federation.directory.rglob("*"):
        with contextlib.suppress(OSError):  # it was replaced meanwhile
            if file.is_file() and not file.is_symlink():
                kinds[_kind(file, folder)] += file.stat().st_size
    return kinds


def _kind(file: Path, folder: Path) -> str:
    if file.name.startswith("ledger.sqlite3"):
        return "ledger"
    if file.suffix in (".log", ".jsonl"):
        return "logs"
    if file.name.startswith("flower.sqlite"):
        return "flower"
    if file.name.startswith("ledger.witness"):
        return "witness"
    return "checkpoints" if folder in file.parents else "other"


def growth(samples: list[Sample], what: str) -> list[tuple[str, float]]:
    """Slope for a thousand rounds of each part of `memory`, `handles`, `threads` or `disk`."""
    warm = [s for s in samples if s.round >= WARM * samples[-1].round]
    slopes = []
    for name in getattr(warm[0], what):
        points = [(s.round, getattr(s, what)[name]) for s in warm if name in getattr(s, what)]
        at, values = np.array(points, dtype=float).T
        slope = float(np.polyfit(at, values, 1)[0]) if len(points) > 1 else 0.0
        slopes.append((name, 1000 * slope))
    return slopes
