"""Timing two ways of doing the same thing side by side, and showing what came out."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Way:
    """One way of doing something, timed.

    Attributes:
        name: for people.
        seconds: one entry per repetition.
        facts: other results, such as an accuracy.
    """

    name: str
    seconds: tuple[float, ...]
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return median(self.seconds)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Two ways compared.

    Attributes:
        name: what is compared.
        slow: the way that should be slower.
        fast: the way that should be faster.
        target: the ratio aimed at; None if there is none.
    """

    name: str
    slow: Way
    fast: Way
    target: float | None = None

    @property
    def value(self) -> float:
        """Median of the slow way over median of the fast way."""
        return self.slow.median / self.fast.median


@dataclass(frozen=True, slots=True)
class Report:
    """What one benchmark found.

    Attributes:
        name: of the benchmark.
        title: what was measured, in a line.
        ratios: the comparisons.
        figures: single numbers with their unit in the name.
        notes: what a reader must know.
        rows: a table of numbers, with the same names in each row.
    """

    name: str
    title: str
    ratios: tuple[Ratio, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    rows: tuple[dict[str, float], ...] = ()

    def document(self) -> dict[str, Any]:
        """JSON-ready data, with medians and ratios worked out."""
        document = asdict(self)
        for ratio, plain in zip(self.ratios, document["ratios"], strict=True):
            plain["ratio"] = ratio.value
            plain["slow"]["median"] = ratio.slow.median
            plain["fast"]["median"] = ratio.fast.median
        return document

    def show(self, console: Console) -> None:
        """Prints a table."""
        if self.ratios:
            table = Table("compared", "slow", "fast", "ratio", "target", title=self.title)
            for ratio in self.ratios:
                aim = f"{ratio.target:g}x" if ratio.target else ""
                table.add_row(
                    ratio.name, _told(ratio.slow), _told(ratio.fast), f"{ratio.value:.3g}x", aim
                )
            console.print(table)
        if self.figures:
            table = Table("figure", "value", title=None if self.ratios else self.title)
            for name, value in self.figures.items():
                table.add_row(name, f"{value:.4g}")
            console.print(table)
        if self.rows:
            table = Table(*self.rows[-1])
            for row in self.rows:
                table.add_row(*(f"{row.get(name, float('nan')):.4g}" for name in self.rows[-1]))
            console.print(table)
        for note in self.notes:
            console.print(f"- {note}")
        console.print()


def _told(way: Way) -> str:
    facts = "".join(f"\n{name} {value:.3f}" for name, value in way.facts.items())
    return f"{way.name}\n{_time(way.median)}{facts}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def alternate(ways: Sequence[Callable[[], float]], repetitions: int) -> list[tuple[float, ...]]:
    """Runs every way the same number of times, each time in the opposite order.

    Args:
        ways: each runs once and returns its seconds.
        repetitions: how often.

    Returns:
        The seconds of each way.
    """
    found: list[list[float]] = [[] for _ in ways]
    for repetition in range(repetitions):
        order = range(len(ways)) if repetition % 2 == 0 else reversed(range(len(ways)))
        for position in order:
            found[position].append(ways[position]())
    return [tuple(seconds) for seconds in found]


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def peak_memory() -> int:
    """The largest resident size this process has had, in bytes (VmHWM; Linux only, else 0)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    lines = status.read_text(encoding="ascii").splitlines()
    kibibytes = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), "0")
    return int(kibibytes) * 1024


def machine() -> str:
    """This machine, in a line."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return (
        f"{model or platform.processor()}, {os.cpu_count()} processors, load {load:.1f}, "
        f"torch {torch.__version__} with {torch.get_num_threads()} threads"
    )
