"""A study as one HTML file that opens offline: verdict, promise, curves, sites, what left them.

Nothing in the file is fetched: the style is inline and the charts are inline SVG. Charts are drawn
once per width, wide and narrow, and the style shows the one that fits; their colours are CSS
variables, so that they follow a reader's light or dark setting. Equal studies give equal bytes.
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedgraft_simulations.comparison import Point, Study
from fedgraft_simulations.table import (
    SiteLine,
    accuracy_words,
    delta_words,
    epsilon_words,
    extent,
    percent,
    promise,
    range_words,
    short_title,
    site_lines,
    title_of,
)

if TYPE_CHECKING:
    from markupsafe import Markup

WIDE, NARROW = 1128, 360  # pixels; a chart's text is as large in either
MOST_SITES_DRAWN = 32
MOST_TENSORS_OPEN = 24
FONT = 13  # pixels

# Colours that stand for CSS variables of the template until the SVG is finished.
INK, MUTED, GRID, SURFACE, PANEL = "#000001", "#000002", "#000003", "#000004", "#000005"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface", PANEL: "panel"}

# What matplotlib writes about itself and is left out: it names a time and a network address.
_METADATA = ("Creator", "Date", "Format", "Type")


@dataclass(frozen=True, slots=True)
class Look:
    """How a row is drawn everywhere: never by colour alone."""

    colour: str
    marker: str
    size: float  # of a marker, in pixels; pointed ones look smaller
    dash: str | tuple[float, tuple[float, ...]] = "solid"


_LOOKS = {
    "alone-head": Look("#000011", "s", 7, (0, (2, 2.5))),
    "alone-adapter": Look("#000012", "D", 6.5, (0, (7, 3))),
    "local": Look("#000013", "^", 8.5),
    "distributed": Look("#000014", "o", 8),
    "none": Look("#000015", "v", 8.5),
    "central": Look("#000016", "P", 8),
    "central-none": Look("#000016", "X", 8),
}
_OTHER = Look("#000016", "P", 8)
_VARIABLES |= {look.colour: f"row-{key}" for key, look in _LOOKS.items() if "central" not in key}
_VARIABLES[_OTHER.colour] = "row-other"


def write_report(study: Study, path: Path) -> None:
    """Writes the report of a study; its directory is made if need be.

    Args:
        study: one comparison, or the same plan over several seeds (means are shown).
        path: of the HTML file; replaced if it exists.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_render(study), encoding="utf-8")


def _render(study: Study) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from fedgraft_common.messages import Status

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    first = study.comparisons[0]
    lines = site_lines(study)
    curves = _curves(study)
    spending = any(math.isfinite(points[-1].epsilon) for points in curves.values())
    own = next((row for row in first.rows if row.key == first.plan.privacy.mechanism), None)
    return environment.get_template("report.html.j2").render(
        study=study,
        plan=first.plan,
        seeds=len(study.comparisons),
        lines=lines,
        classes=_common_classes(lines),
        held_out=extent(count for line in lines for count in line.test),
        records=round(sum(fmean(line.train) for line in lines)),
        promise=promise(study),
        own=own,
        sent=first.sent,
        statuses=[status.value for status in Status],
        sent_open=len(first.sent) <= MOST_TENSORS_OPEN,
        notes=list(dict.fromkeys(note for c in study.comparisons for note in c.notes)),
        plan_json=json.dumps(first.plan.model_dump(mode="json"), indent=2, ensure_ascii=False),
        accuracy_chart=_both(study, accuracy_chart, "accuracy") if curves else "",
        epsilon_chart=_both(study, epsilon_chart, "epsilon") if spending else "",
        sites_chart=_both(study, sites_chart, "sites"),
        bytes_chart=_both(study, bytes_chart, "bytes"),
        sites_drawn=min(len(lines), MOST_SITES_DRAWN),
        accuracy_words=accuracy_words,
        score=title_of(study.score),
        bytes_words=bytes_words,
        delta_words=delta_words,
        epsilon_words=epsilon_words,
        percent=percent,
        range_words=range_words,
        short_title=short_title,
    )


def _common_classes(lines: Sequence[SiteLine]) -> tuple[str, ...] | None:
    """The classes, if every site has the same."""
    found = {line.classes for line in lines}
    return found.pop() if len(found) == 1 else None


def bytes_words(count: float) -> str:
    """A size in bytes, kB (1,000 bytes) or MB."""
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f} bytes"


# Charts. Each takes the study and a width in pixels, and returns a matplotlib Figure.


def accuracy_chart(study: Study, width: int) -> Any:
    """Mean accuracy over rounds; then, apart, after the refit; staying alone as dashed lines."""
    curves = _curves(study)
    last = max((curve[-1].round for curve in curves.values()), default=1)
    apart = last + max(1.0, last * (0.09 if width > 600 else 0.22))
    right = 176 if width > 600 else 128
    figure, axes = _axes(width, 380, left=46, right=right, top=26, bottom=44)
    labels = []
    for summary in study.summaries:
        look = _look(summary.key)
        value = f" {percent(summary.refit)}" if width > 600 else ""
        labels.append((summary.refit, short_title(summary) + value, look))
        if summary.key.startswith("alone"):
            axes.axhline(summary.refit, color=look.colour, linestyle=look.dash, linewidth=1.6)
            continue
        axes.plot([apart], [summary.refit], color=look.colour, marker=look.marker, markersize=8)
        if summary.key not in curves:  # resumed after its last round
            continue
        points = curves[summary.key]
        own = summary.key == study.comparisons[0].plan.privacy.mechanism
        axes.plot(
            [p.round for p in points], [p.accuracy for p in points], color=look.colour,
            linewidth=2.6 if own else 1.6, marker=look.marker, markersize=4,
            markevery=max(1, len(points) // 10),
        )  # fmt: skip
        axes.plot(
            [points[-1].round, apart], [points[-1].accuracy, summary.refit],
            color=look.colour, linewidth=1, linestyle=(0, (1, 2)),
        )  # fmt: skip
    drawn = [p.accuracy for points in curves.values() for p in points]
    low, high = _limits([*drawn, *(value for value, _, _ in labels)])
    axes.set_ylim(low, high)
    axes.set_xlim(min((c[0].round for c in curves.values()), default=0) - 0.02 * last, apart * 1.02)
    _percent_ticks(axes.yaxis)
    ticks = [t for t in _round_ticks(last, width) if t <= last]
    axes.set_xticks([*ticks, apart], [*(str(t) for t in ticks), "refit"])
    axes.set_xlabel("round", color=MUTED)
    _above(axes, f"mean {study.score} over sites, %")
    _direct_labels(axes, labels, (low, high))
    return figure


def epsilon_chart(study: Study, width: int) -> Any:
    """Epsilon spent over rounds, for rows under DP; rows that spend the same share one line."""
    curves = {
        key: points for key, points in _curves(study).items() if math.isfinite(points[-1].epsilon)
    }
    together: dict[tuple[tuple[int, float], ...], list[str]] = defaultdict(list)
    for key, points in curves.items():
        together[tuple((p.round, round(p.epsilon, 4)) for p in points)].append(key)
    titles = {summary.key: short_title(summary) for summary in study.summaries}
    right = 176 if width > 600 else 128
    figure, axes = _axes(width, 250, left=46, right=right, top=26, bottom=44)
    labels = []
    for line, keys in together.items():
        look = _look(keys[0]) if len(keys) == 1 else Look(INK, "o", 8)
        axes.plot(
            [0, *(r for r, _ in line)], [0, *(e for _, e in line)], color=look.colour,
            linewidth=2, marker=look.marker, markersize=4, markevery=max(1, len(line) // 10),
        )  # fmt: skip
        label = " and\n".join(titles[key] for key in keys) + (" " if width > 600 else "\n")
        label += epsilon_words(curves[keys[0]][-1].epsilon)
        labels.append((line[-1][1], label, look))
    last = max((points[-1].round for points in curves.values()), default=1)
    high = 1.08 * max((value for value, _, _ in labels), default=1.0)
    axes.set_xlim(0, last * 1.02)
    axes.set_ylim(0, high)
    ticks = _round_ticks(last, width)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_xlabel("round", color=MUTED)
    _above(axes, "epsilon spent so far")
    _direct_labels(axes, labels, (0, high))
    return figure


def sites_chart(study: Study, width: int) -> Any:
    """Accuracy after the refit at each site, most training records at the top."""
    lines = _evenly(site_lines(study), MOST_SITES_DRAWN)
    names = [_shortened(line.name, 26 if width > 600 else 13) for line in lines]
    left = 18 + round(7.2 * max(map(len, names)))
    legend = 26 * math.ceil(len(study.summaries) / (5 if width > 600 else 2))
    lane = max(24, 8 * len(study.summaries))  # room for markers that share an accuracy
    height = lane * len(lines) + legend + 74
    figure, axes = _axes(width, height, left=left, right=66, top=legend + 26, bottom=44)
    step = 0.86 / max(1, len(study.summaries))
    for number, line in enumerate(lines):
        if number % 2 == 0:
            axes.axhspan(number - 0.5, number + 0.5, color=PANEL, linewidth=0, zorder=0)
        axes.annotate(
            range_words(line.train), (1, number), xycoords=("axes fraction", "data"),
            xytext=(60, 0), textcoords="offset points", ha="right", va="center_baseline",
            color=MUTED,
        )  # fmt: skip
    axes.annotate(
        "records", (1, 1), xycoords="axes fraction", xytext=(60, 10),
        textcoords="offset points", ha="right", color=MUTED,
    )  # fmt: skip
    for place, summary in enumerate(study.summaries):
        look = _look(summary.key)
        offset = (place - (len(study.summaries) - 1) / 2) * step
        axes.plot(
            [line.accuracy[summary.key] for line in lines],
            [number + offset for number in range(len(lines))], color=look.colour,
            linestyle="none", marker=look.marker, markersize=look.size, markeredgewidth=0.7,
            markeredgecolor=SURFACE, label=short_title(summary),
        )  # fmt: skip
    axes.set_yticks(range(len(lines)), names)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlim(*_limits([v for line in lines for v in line.accuracy.values()]))
    axes.grid(visible=True, axis="x", color=GRID, linewidth=0.8)
    axes.grid(visible=False, axis="y")
    _percent_ticks(axes.xaxis)
    axes.set_xlabel(f"{study.score} after refit, %", color=MUTED)
    figure.legend(
        loc="upper left", bbox_to_anchor=(0, 1), ncols=5 if width > 600 else 2, frameon=False,
        labelcolor=INK, handletextpad=0.3, columnspacing=1.6, borderaxespad=0,
    )  # fmt: skip
    return figure


def bytes_chart(study: Study, width: int) -> Any:
    """Bytes of tensors that one site sends in a round, per row."""
    rows = study.comparisons[0].rows
    names = [short_title(row) for row in rows]
    left = 18 + round(7.2 * max(map(len, names)))
    figure, axes = _axes(width, 32 * len(rows) + 30, left=left, right=96, top=8, bottom=22)
    most = max(row.bytes_per_round for row in rows) or 1
    for number, row in enumerate(rows):
        look = _look(row.key)
        axes.barh([number], [row.bytes_per_round], color=look.colour, height=0.55)
        nothing = "all records, once" if row.key.startswith("central") else "nothing leaves"
        text = bytes_words(row.bytes_per_round) if row.bytes_per_round else nothing
        axes.annotate(
            text, (row.bytes_per_round, number), xytext=(6, 0), textcoords="offset points",
            va="center", color=INK if row.bytes_per_round else MUTED,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, most)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_visible(True)
    return figure


def _curves(study: Study) -> dict[str, list[Point]]:
    """Row key to points: accuracy is a mean over seeds, epsilon the largest over seeds."""
    curves = {}
    for same in zip(*(comparison.rows for comparison in study.comparisons), strict=True):
        points: dict[int, list[Point]] = defaultdict(list)
        for row in same:
            for point in row.curve:
                points[point.round].append(point)
        if points:
            curves[same[0].key] = [
                Point(r, fmean(p.accuracy for p in ps), max(p.epsilon for p in ps))
                for r, ps in sorted(points.items())
            ]
    return curves


def _look(key: str) -> Look:
    return _LOOKS.get(key, _OTHER)


def _evenly(lines: Sequence[SiteLine], most: int) -> list[SiteLine]:
    """At most this many, evenly spaced, with the first and the last."""
    if len(lines) <= most:
        return list(lines)
    return [lines[round(i * (len(lines) - 1) / (most - 1))] for i in range(most)]


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _axes(width: int, height: int, left: int, right: int, top: int, bottom: int) -> tuple[Any, Any]:
    """A figure of this size with one set of axes inside these margins, all in pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # 72 points an inch: 1 pt = 1 px
    axes = figure.add_axes(
        (left / width, bottom / height,
         (width - left - right) / width, (height - top - bottom) / height)
    )  # fmt: skip
    for spine in axes.spines.values():
        spine.set_visible(False)
        spine.set_color(MUTED)
    axes.set_facecolor("none")
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=MUTED, labelcolor=INK, pad=6)
    return figure, axes


def _above(axes: Any, text: str) -> None:
    """What the vertical axis shows, written above it: nobody reads sideways."""
    axes.annotate(
        text, (0, 1), xycoords="axes fraction", xytext=(-40, 12), textcoords="offset points",
        color=MUTED,
    )  # fmt: skip


def _limits(values: Sequence[float]) -> tuple[float, float]:
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    margin = max(0.02, 0.08 * (high - low))
    return max(0.0, low - margin), min(1.0 + margin / 3, high + margin)


def _percent_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.3g}"))


def _round_ticks(last: int, width: int) -> list[int]:
    """Whole rounds: 1, round steps in between, and the last."""
    step = max(1, math.ceil(last / (10 if width > 400 else 5)))
    base = 10 ** math.floor(math.log10(step))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= step)
    between = range(step, last - step // 2, step)
    return sorted({1, *between, last})


def _direct_labels(
    axes: Any, labels: Iterable[tuple[float, str, Look]], limits: tuple[float, float]
) -> None:
    """Names lines at the right end, moved apart where they would overlap."""
    wanted = sorted(labels, key=lambda label: label[0])
    span = limits[1] - limits[0]
    pixels = axes.get_window_extent().height
    places = _moved_apart(
        [value for value, _, _ in wanted],
        [1.35 * FONT * (1 + text.count("\n")) / pixels * span for _, text, _ in wanted],
    )
    for place, (value, text, look) in zip(places, wanted, strict=True):
        up = (place - value) / span * pixels
        axes.annotate(
            text, (1, value), xycoords=("axes fraction", "data"), xytext=(20, up),
            textcoords="offset points", va="center", color=look.colour, fontweight="bold",
            arrowprops={
                "arrowstyle": "-", "color": look.colour, "linewidth": 1, "relpos": (0, 0.5),
                "shrinkA": 3, "shrinkB": 0,
            },
        )  # fmt: skip


def _moved_apart(values: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Ascending centres as near to `values` as can be without overlapping.

    Values that collide form a block, which is centred on the mean of what its members want.
    """
    blocks: list[tuple[list[float], list[float]]] = []  # (wanted, heights) of each block
    for value, height in zip(values, heights, strict=True):
        block = ([value], [height])
        while blocks and _edges(*blocks[-1])[1] > _edges(*block)[0]:
            before = blocks.pop()
            block = (before[0] + block[0], before[1] + block[1])
        blocks.append(block)
    centres = []
    for wanted, sizes in blocks:
        edge = _edges(wanted, sizes)[0]
        for size in sizes:
            centres.append(edge + size / 2)
            edge += size
    return centres


def _edges(wanted: Sequence[float], sizes: Sequence[float]) -> tuple[float, float]:
    middle, half = fmean(wanted), sum(sizes) / 2
    return middle - half, middle + half


def _both(study: Study, chart: Any, name: str) -> Markup:
    """A chart in both widths, as inline SVG."""
    from markupsafe import Markup

    svgs = [_svg(study, chart, name, width) for width in (WIDE, NARROW)]
    return Markup("\n").join(Markup(svg) for svg in svgs)  # noqa: S704 - matplotlib escaped it


def _svg(study: Study, chart: Any, name: str, width: int) -> str:
    from matplotlib import style

    kind = "wide" if width == WIDE else "narrow"
    settings = {
        "font.size": FONT, "svg.fonttype": "none", "svg.hashsalt": "fedgraft",
        "text.parse_math": False, "path.simplify": False,
    }  # fmt: skip
    file = io.StringIO()
    with style.context(["default", settings]), warnings.catch_warnings():
        # The browser draws the text, so a glyph that matplotlib's font lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = chart(study, width)
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    box = svg.partition('viewBox="')[2].partition('"')[0]
    start = f'<svg class="{kind}" viewBox="{box}" aria-hidden="true" focusable="false">'
    svg = start + svg[svg.index(">") + 1 :]  # drops its fixed size and its namespaces
    prefix = f"{name}-{kind}-"  # ids are unique in a page, and matplotlib numbers each figure alike
    svg = (
        svg.replace(' id="', f' id="{prefix}')
        .replace('xlink:href="#', f'href="#{prefix}')
        .replace("url(#", f"url(#{prefix}")
    )
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.strip()
