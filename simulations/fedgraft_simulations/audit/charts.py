"""The pictures of an audit, as PNG at twice the size at which they are shown."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft_simulations.table import epsilon_words

WIDTH = 720  # pixels as shown
INK, MUTED, GRID = "#1b1f24", "#59636e", "#e3e7ec"
BLUE, ORANGE, RED = "#0067a3", "#b84a00", "#b3261e"


def new_axes(height: int, left: float = 0.08) -> tuple[Any, Any]:
    """A figure of `WIDTH` times `height` pixels with one set of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=144, facecolor="white")
    axes = figure.add_axes((left, 56 / height, 0.97 - left, 1 - 92 / height))
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(MUTED)
    axes.tick_params(length=0, colors=MUTED, labelcolor=INK, labelsize=13)
    axes.grid(visible=True, axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def as_png(figure: Any) -> bytes:
    """The same picture gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def bounds_chart(bounds: Sequence[tuple[str, float, float | None]], claimed: float) -> bytes:
    """Lower bounds on epsilon, one line each, and the promise.

    Args:
        bounds: name, bound, and what the scores suggest without confidence, if anything.
        claimed: the promise; infinite if there is none.
    """
    figure, axes = new_axes(34 * len(bounds) + 92, left=0.27)
    values = [value for _, low, about in bounds for value in (low, about or 0.0)]
    right = 1.08 * max([*values, claimed if math.isfinite(claimed) else 0.0, 1.0])
    for place, (_, low, about) in enumerate(bounds):
        broken = low > claimed or not math.isfinite(claimed)
        colour = RED if broken else BLUE
        axes.plot([0, low], [place, place], color=colour, linewidth=3, solid_capstyle="butt")
        axes.plot([low], [place], marker="D" if broken else "o", color=colour, markersize=8)
        if about is not None:
            axes.plot(
                [about], [place], marker="o", markerfacecolor="white", markeredgecolor=colour,
                markersize=8,
            )  # fmt: skip
    if math.isfinite(claimed):
        axes.axvline(claimed, color=INK, linewidth=1.6, linestyle=(0, (4, 2)))
        axes.annotate(
            f"promised {epsilon_words(claimed)}", (claimed, 1), xycoords=("data", "axes fraction"),
            xytext=(0, 6), textcoords="offset points", ha="center", color=INK, fontsize=13,
        )  # fmt: skip
    axes.set_yticks(range(len(bounds)), [name for name, _, _ in bounds])
    axes.set_ylim(len(bounds) - 0.5, -0.5)
    axes.set_xlim(0, right)
    axes.set_xlabel("epsilon", color=MUTED, fontsize=13)
    return as_png(figure)


def scores_chart(scores: NDArray[np.float64], included: NDArray[np.bool_]) -> bytes:
    """Histograms of the scores of canaries that were put in, and of the others."""
    figure, axes = new_axes(300)
    low, high = np.quantile(scores, [0.001, 0.999])
    bins = np.linspace(low, high + 1e-9, 60)
    for chosen, colour, name in ((~included, BLUE, "left out"), (included, ORANGE, "put in")):
        axes.hist(scores[chosen], bins=bins, color=colour, alpha=0.55, label=name)
        axes.hist(scores[chosen], bins=bins, color=colour, histtype="step", linewidth=1.4)
    axes.set_yticks([])
    axes.set_xlabel("score", color=MUTED, fontsize=13)
    figure.legend(
        loc="upper right", bbox_to_anchor=(0.97, 1.0), ncols=2, frameon=False, fontsize=13,
        labelcolor=INK,
    )  # fmt: skip
    return as_png(figure)
