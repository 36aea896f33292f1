"""The table and the plot of what federating is worth, from the results of `utility`.

    python -m fedgraft_simulations.benchmarks.utility_table RESULTS.json deploy/utility

prints the table as Markdown and writes `deploy/utility.svg`. A cell without all seeds is left out
of both.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from fedgraft_simulations.benchmarks.utility import ALONE, EPSILONS, SEEDS, SITES

LINES = {
    "local-fixed": ("local, fixed head", "#b2662b", "-"),
    "distributed-private": ("distributed, private head", "#7a9cc6", "--"),
    "distributed-fixed": ("distributed, fixed head", "#1f5fa8", "-"),
}
"""Rows under DP: name, colour and stroke."""
NO_DP = ("none-fixed", "none-private")

Key = tuple[str, int, str, float]


class Table:
    """Accuracies over seeds.

    Args:
        results: what `utility` wrote.
    """

    def __init__(self, results: Path) -> None:
        found: defaultdict[Key, dict[int, float]] = defaultdict(dict)
        for key, facts in json.loads(results.read_text(encoding="utf-8")).items():
            name, sites, seed, row, epsilon = key.split("/")[:5]
            if int(seed) in SEEDS:
                found[name, int(sites), row, float(epsilon)][int(seed)] = facts["accuracy"]
        self._seeds = {
            key: tuple(by_seed.values())
            for key, by_seed in found.items()
            if len(by_seed) == len(SEEDS)
        }
        self.data = tuple(dict.fromkeys(key[0] for key in self._seeds))

    def seeds(self, data: str, sites: int, row: str, epsilon: float = 0.0) -> tuple[float, ...]:
        """One accuracy for each seed; empty if one is missing."""
        return self._seeds.get((data, sites, row, epsilon), ())

    def mean(self, data: str, sites: int, row: str, epsilon: float = 0.0) -> float | None:
        """Over the seeds."""
        values = self.seeds(data, sites, row, epsilon)
        return fmean(values) if values else None

    def best(self, data: str, sites: int, rows: tuple[str, ...]) -> float | None:
        """The best row without DP, by its mean."""
        means = [m for row in rows if (m := self.mean(data, sites, row)) is not None]
        return max(means, default=None)

    def markdown(self) -> str:
        """One line a row; a number in bold is at least the better of staying alone."""
        names = ("data, sites", "alone", "epsilon", *(n for n, _, _ in LINES.values()), "no DP")
        lines = [_line(names), "|---" * len(names) + "|"]
        for data in self.data:
            for sites in SITES:
                alone, without = self.best(data, sites, ALONE), self.best(data, sites, NO_DP)
                for number, epsilon in enumerate(EPSILONS):
                    cells = [self._cell(data, sites, row, epsilon, alone) for row in LINES]
                    left = (f"{data}, {sites}", _text(alone)) if number == 0 else ("", "")
                    right = _text(without) if number == 0 else ""
                    lines.append(_line((*left, f"{epsilon:g}", *cells, right)))
        return "\n".join(lines)

    def _cell(self, data: str, sites: int, row: str, epsilon: float, alone: float | None) -> str:
        mean = self.mean(data, sites, row, epsilon)
        pays = mean is not None and alone is not None and mean >= alone
        return f"**{_text(mean)}**" if pays else _text(mean)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}".lstrip("0")


def plot(table: Table) -> Any:
    """One panel for each data set and number of sites: accuracy over epsilon."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.2, 3.1 * len(table.data) + 0.6), facecolor="white")
    grid = figure.subplots(len(table.data), len(SITES), sharex=True, sharey="row", squeeze=False)
    for panels, data in zip(grid, table.data, strict=True):
        for axes, sites in zip(panels, SITES, strict=True):
            _panel(axes, table, data, sites)
        panels[0].set_ylabel("accuracy, mean over sites")
    for axes in grid[-1]:
        axes.set_xlabel("epsilon of a site")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.6 / figure.get_figheight() * 0.8, 1, 1))
    return figure


def _panel(axes: Any, table: Table, data: str, sites: int) -> None:
    for rows, name, stroke in ((ALONE, "alone, no DP", ":"), (NO_DP, "federated, no DP", "-.")):
        if (level := table.best(data, sites, rows)) is not None:
            axes.axhline(level, color="#555555", linestyle=stroke, linewidth=1.2, label=name)
    for row, (name, colour, stroke) in LINES.items():
        known = [e for e in EPSILONS if table.seeds(data, sites, row, e)]
        seeds = [table.seeds(data, sites, row, e) for e in known]
        means = [fmean(values) for values in seeds]
        axes.plot(known, means, stroke, color=colour, marker="o", markersize=4, label=name)
        axes.fill_between(
            known, [min(v) for v in seeds], [max(v) for v in seeds], color=colour, alpha=0.12, lw=0
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
    axes.set_title(f"{data}, {sites} sites", fontsize=11)
    axes.grid(visible=True, color="#e5e5e5", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def main(
    results: Annotated[Path, typer.Argument(help="JSON file of `utility`.")],
    target: Annotated[Path, typer.Argument(help="The plot's path without its suffix.")],
) -> None:
    """Print the table and write the plot."""
    from matplotlib import style

    table = Table(results)
    print(table.markdown())
    nobody = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with style.context({"svg.fonttype": "none", "svg.hashsalt": "utility"}):
        plot(table).savefig(target.with_suffix(".svg"), metadata=nobody)


if __name__ == "__main__":
    typer.run(main)
