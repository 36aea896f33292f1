"""A study as text: the words for its numbers, its promise, and two tables for the terminal.

The words are shared with the HTML report, so that both say the same thing. Epsilon is rounded up,
never down: a printed promise is not smaller than the one that was accounted.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedgraft_common.mechanism import against
from fedgraft_common.plan import Plan
from fedgraft_simulations.comparison import Row, Study, Summary

if TYPE_CHECKING:  # which loads the whole simulation
    from fedgraft_simulations.continual import Kept

SHORT_TITLES = {
    "alone-head": "alone, head",
    "alone-adapter": "alone, adapter",
    "local": "local",
    "distributed": "distributed",
    "none": "no DP",
    "central": "pooled, DP",
    "central-none": "pooled",
}
NOT_APPLICABLE = "–"
MOST_ROWS_BESIDE_NOISE = 5  # in 80 columns

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class SiteLine:
    """One site, over all seeds.

    Each seed spreads the records anew, so what a site holds may differ between seeds: counts and
    noise are (smallest, largest) over seeds, accuracies are means.

    Attributes:
        name: of the site.
        train: records it trains on.
        test: records held out.
        classes: names of its classes.
        sample_rate: q.
        noise_multiplier: sigma; 0 without DP.
        epsilon: the largest over seeds; infinite without DP.
        accuracy: row key to mean accuracy after the refit, in [0, 1].
    """

    name: str
    train: Range
    test: Range
    classes: tuple[str, ...]
    sample_rate: Range
    noise_multiplier: Range
    epsilon: float
    accuracy: dict[str, float]


def site_lines(study: Study) -> list[SiteLine]:
    """Every site, most training records first."""
    lines = []
    for number, first in enumerate(study.comparisons[0].sites):
        sites = [comparison.sites[number] for comparison in study.comparisons]
        rows = zip(*(comparison.rows for comparison in study.comparisons), strict=True)
        lines.append(
            SiteLine(
                name=first.name,
                train=extent(site.train for site in sites),
                test=extent(site.test for site in sites),
                classes=tuple(dict.fromkeys(name for site in sites for name in site.classes)),
                sample_rate=extent(site.sample_rate for site in sites),
                noise_multiplier=extent(site.noise_multiplier for site in sites),
                epsilon=max(site.epsilon for site in sites),
                accuracy={same[0].key: fmean(row.refit[number] for row in same) for same in rows},
            )
        )
    return sorted(lines, key=lambda line: (-sum(line.train), line.name))


def extent(values: Iterable[float]) -> Range:
    """The smallest and the largest of some numbers."""
    found = list(values)
    return min(found), max(found)


def short_title(row: Row | Summary) -> str:
    """What a row is called where there is little room."""
    return SHORT_TITLES.get(row.key, row.title)


def title_of(score: str) -> str:
    """A score's name at the start of a sentence."""
    return score[:1].upper() + score[1:]


def percent(share: float | None) -> str:
    """A share in [0, 1] as a percentage without its sign; a dash for None and NaN."""
    return NOT_APPLICABLE if share is None or math.isnan(share) else f"{share * 100:.1f}"


def accuracy_words(summary: Summary, seeds: int) -> str:
    """Mean accuracy, with the standard deviation over seeds if there are several."""
    spread = f" ± {summary.deviation * 100:.1f}" if seeds > 1 else ""
    return percent(summary.refit) + spread


def epsilon_words(epsilon: float) -> str:
    """Epsilon to two decimals, rounded up; 0 is `nothing leaves`, infinity is `no DP`."""
    if epsilon == 0:
        return "nothing leaves"
    if math.isinf(epsilon):
        return "no DP"
    return f"{math.ceil(epsilon * 100 - 1e-6) / 100:.2f}"


def delta_words(delta: float) -> str:
    """Delta in scientific notation, as it is written in a plan; 0 is a dash."""
    if delta == 0:
        return NOT_APPLICABLE
    mantissa, exponent = f"{delta:.5e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def range_words(values: Range, digits: int = 3) -> str:
    """One number, or `smallest–largest` where they differ at this many significant digits."""
    low, high = (_significant(value, digits) for value in values)
    return low if low == high else f"{low}–{high}"


def unit_words(plan: Plan) -> str:
    """What the plan protects."""
    if plan.privacy.unit == "record":
        return "one record"
    return (
        f"all records of a site that share a value of {plan.privacy.unit} (at most "
        f"{plan.privacy.records_per_unit} of them are used in a step)"
    )


def _significant(value: float, digits: int) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.{digits}g}"


def promise(study: Study) -> list[tuple[str, str]]:
    """The privacy promise of the plan's own mechanism, item by item (PRIVACY.md)."""
    comparison = study.comparisons[0]
    plan = comparison.plan
    lines = site_lines(study)
    reproducible = (
        "The noise of a simulation is drawn from the plan's public seed. Whoever knows the seed "
        "can repeat it, so this simulation and its adapters promise nothing to anybody. The "
        "numbers say what the same plan promises with noise from the operating system."
    )
    if plan.privacy.mechanism == "none":
        return [
            ("Promise", "None. Updates leave the sites without noise; no epsilon is finite."),
            ("Unit", f"{plan.privacy.unit}; not protected"),
            ("Mechanism", "None: no clipping and no noise, for comparison only."),
            ("Rounds and runs", _rounds(study)),
        ]
    reached = epsilon_words(max(line.epsilon for line in lines))
    rates = range_words(extent(rate for line in lines for rate in line.sample_rate))
    noises = range_words(extent(sigma for line in lines for sigma in line.noise_multiplier), 4)
    return [
        (
            "Promise",
            "For each site, everything that leaves it in this run is (epsilon, delta)-"
            "differentially private with respect to one unit of its data, against the server, all "
            "other sites and anyone who later holds the adapters, all of whom may see every round.",
        ),
        ("Unit", unit_words(plan)),
        ("Neighbouring relation", "add or remove one unit"),
        (
            "Epsilon",
            f"at most {reached} at any site (target {plan.privacy.epsilon:g}), rounded up",
        ),
        ("Delta", delta_words(plan.privacy.delta) + ", less than 1 / (number of units)"),
        ("Mechanism and what it trusts", _trust(study)),
        (
            "Sampling",
            f"Poisson by unit, q = {rates}; noise multiplier sigma = {noises}, clipping norm "
            f"C = {plan.privacy.clipping_norm:g}",
        ),
        ("Accountant", "privacy loss distributions (PLD) of dp-accounting"),
        ("Rounds and runs", _rounds(study)),
        (
            "Not promised",
            "Protection of the site's own head or caches against someone inside the site; "
            "protection of the existence of the site or of its declared nominal size.",
        ),
        ("Simulated noise", reproducible),
    ]


def _trust(study: Study) -> str:
    comparison = study.comparisons[0]
    privacy = comparison.plan.privacy
    carried = (
        "Here it ran as in a federation, with throwaway keys."
        if comparison.plan.secure
        else "This simulation summed in place, without the cryptography."
    )
    if privacy.mechanism == "local":
        return "Local: every update is private on its own. It trusts nobody."
    sites = comparison.plan.aggregation.sites or len(comparison.sites)
    honest = sites - privacy.tolerated_dropouts - privacy.tolerated_colluders
    return (
        "Distributed: each site adds a share of the noise, and only the sum over sites is "
        f"private. The promise is against {against(comparison.plan)}. It rests on h = {honest} of "
        f"{sites} sites being "
        f"honest (tolerated dropouts: {privacy.tolerated_dropouts}, colluders: "
        f"{privacy.tolerated_colluders}) and on secure aggregation, which reveals only the sum. "
        + carried
    )


def _rounds(study: Study) -> str:
    plan = study.comparisons[0].plan
    seeds = len(study.comparisons)
    text = (
        f"{plan.rounds.count} rounds of {plan.training.local_steps} step"
        f"{'s' if plan.training.local_steps > 1 else ''}, T = {plan.steps} steps; runs included: "
        "1. Another run on the same records would be composed with this one."
    )
    if seeds > 1:
        text += f" Each of the {seeds} seeds is a run by itself; epsilon is that of one."
    return text


def summary_table(study: Study) -> Table:
    """The rows of a study: accuracy, epsilon and delta, in at most 80 columns."""
    seeds = len(study.comparisons)
    plan = study.comparisons[0].plan
    caption = f"> the plan's mechanism. {title_of(study.score)} in %, mean over sites"
    caption += (
        f" and {seeds} seeds, ± standard deviation over seeds." if seeds > 1 else "; one seed."
    )
    table = _table(f"Plan {plan.name}: {len(study.comparisons[0].sites)} sites", caption, gap=2)
    table.add_column("")
    table.add_column("after sealed\nrefit", justify="right", no_wrap=True)
    table.add_column("trained\nhead", justify="right", no_wrap=True)
    table.add_column("epsilon", justify="right", no_wrap=True)
    table.add_column("delta", justify="right", no_wrap=True)
    for summary in study.summaries:
        own = summary.key == plan.privacy.mechanism
        table.add_row(
            Text(("> " if own else "  ") + summary.title),
            accuracy_words(summary, seeds),
            percent(summary.trained),
            epsilon_words(summary.epsilon),
            delta_words(summary.delta),
            style="bold" if own else None,
        )
    return table


def site_table(study: Study) -> Table:
    """Every site: records, sample rate, noise, epsilon, accuracy per row, in 80 columns.

    With the rows of the pool there is no room, so q, sigma and epsilon are said below the table.
    """
    plan = study.comparisons[0].plan
    lines, roomy = site_lines(study), len(study.summaries) <= MOST_ROWS_BESIDE_NOISE
    delta = delta_words(plan.privacy.delta)
    if plan.privacy.mechanism == "none":
        said = "no DP"
    elif roomy:
        said = f"epsilon at delta {delta}; q and sigma of the plan's mechanism"
    else:
        rate = range_words(extent(q for line in lines for q in line.sample_rate))
        noise = range_words(extent(sigma for line in lines for sigma in line.noise_multiplier))
        worst = epsilon_words(max(line.epsilon for line in lines))
        said = f"the plan's mechanism: q {rate}, sigma {noise}, epsilon {worst} at delta {delta}"
    caption = f"{title_of(study.score)} after the sealed refit, in %; {said}."
    table = _table(f"Plan {plan.name}: sites", caption, gap=1 if roomy else 2)
    table.add_column("site", overflow="fold")
    for heading in ("records", "q", "sigma", "epsilon") if roomy else ("records",):
        table.add_column(heading, justify="right", overflow="fold")
    for summary in study.summaries:
        table.add_column(short_title(summary).replace(", ", "\n"), justify="right", no_wrap=True)
    for line in lines:
        privacy = (
            range_words(line.sample_rate),
            range_words(line.noise_multiplier),
            epsilon_words(line.epsilon),
        )
        table.add_row(
            Text(line.name),
            range_words(line.train),
            *(privacy if roomy else ()),
            *(percent(line.accuracy[summary.key]) for summary in study.summaries),
        )
    return table


def forgetting_table(plan: Plan, kept: Sequence[Kept]) -> Table:
    """What the sites of an earlier run have lost: their own score before and after, in %."""
    caption = (
        "Each old site's own score in %, on its held-out records: with the old adapter, with the "
        "new one and the head as it was sealed, and with the head refitted to the new one."
    )
    table = _table(f"Plan {plan.name}, looked at again", caption, gap=2)
    table.add_column("site")
    for heading in ("before", "new adapter,\nold head", "refitted", "lost"):
        table.add_column(heading, justify="right", no_wrap=True)
    numbers = [(one.before, one.after, one.refitted, one.forgotten) for one in kept]
    for one, row in zip(kept, numbers, strict=True):
        table.add_row(Text(one.site), *map(percent, row))
    known = [row for row in numbers if not any(map(math.isnan, row))]
    means = [fmean(column) for column in zip(*known, strict=True)] or [math.nan] * 4
    table.add_row("mean", *map(percent, means), style="bold")
    return table


def summary_text(study: Study, width: int = 80) -> str:
    """The summary table and the verdict as plain text, without colours or trailing spaces."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(summary_table(study))
        console.print(Text(study.verdict))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _table(title: str, caption: str, gap: int) -> Table:
    return Table(
        title=title, caption=caption, title_justify="left", caption_justify="left",
        box=box.SIMPLE_HEAD, show_edge=False, padding=(0, gap - 1, 0, 0), pad_edge=False,
    )  # fmt: skip
