"""What an attack achieves: its ROC curve, and hits at few false alarms with their confidence.

An average over all records hides the ones an attacker is sure about, so the curve is read at its
left end, on logarithmic axes (Carlini et al. 2022, section 3).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedgraft_common.accounting import SamplingEvent
from fedgraft_simulations.audit.ceiling import ceiling

RATES = (0.001, 0.01, 0.1)
"""False positive rates at which hits are reported."""
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Point:
    """Hits at a rate of false alarms.

    Attributes:
        rate: false positive rate allowed.
        threshold: lowest score that counts as a hit.
        hits: members at or above it.
        members: members in all.
        alarms: non-members at or above it.
        others: non-members in all.
    """

    rate: float
    threshold: float
    hits: int
    members: int
    alarms: int
    others: int

    @property
    def true_positives(self) -> float:
        """Share of members that were hit."""
        return self.hits / self.members

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Clopper-Pearson interval of the true positive rate."""
        return clopper_pearson(self.hits, self.members, confidence)


@dataclass(frozen=True, slots=True)
class Roc:
    """One attack's curve.

    Attributes:
        attack: its name.
        auc: area under the curve; a half is guessing.
        false_positives: (n,) rates, ascending.
        true_positives: (n,) rates.
        points: hits at each of `RATES`.
    """

    attack: str
    auc: float
    false_positives: NDArray[np.float64]
    true_positives: NDArray[np.float64]
    points: tuple[Point, ...]


def roc_of(attack: str, scores: NDArray[np.float64], members: NDArray[np.bool_]) -> Roc:
    """Measures an attack.

    Args:
        attack: its name.
        scores: (N,), higher for records it takes for members.
        members: (N,) the truth; both kinds must be there.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    false, true, thresholds = roc_curve(members, scores, drop_intermediate=False)
    inside, outside = int(members.sum()), int((~members).sum())
    points = []
    for rate in RATES:
        at = int(np.searchsorted(false, rate, side="right")) - 1
        points.append(
            Point(
                rate,
                float(thresholds[at]),
                round(true[at] * inside),
                inside,
                round(false[at] * outside),
                outside,
            )
        )
    return Roc(attack, float(roc_auc_score(members, scores)), false, true, tuple(points))


def clopper_pearson(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """Exact two-sided interval of a binomial share."""
    from scipy.stats import binomtest

    found = binomtest(successes, trials).proportion_ci(confidence, method="exact")
    return float(found.low), float(found.high)


@dataclass(frozen=True, slots=True)
class Excess:
    """A point of a curve held against the ceiling.

    Attributes:
        attack: whose curve.
        point: of it.
        lower: what its true positive rate is at least.
        allowed: the ceiling at what its false positive rate is at most.
    """

    attack: str
    point: Point
    lower: float
    allowed: float

    @property
    def above(self) -> bool:
        """Whether the claimed mechanism cannot explain it."""
        return self.lower > self.allowed


def against_ceiling(
    rocs: Sequence[Roc], events: Sequence[SamplingEvent], significance: float = 1 - CONFIDENCE
) -> list[Excess]:
    """Every point of every curve against the ceiling, errors of both rates included.

    The chance that a mechanism that keeps its claim is called broken is at most `significance`
    over all points together (Bonferroni): for each, the lower limit of the true positive rate is
    compared with the ceiling at the upper limit of the false positive rate. That the threshold is
    read off the scores of non-members changes nothing: it is one of their order statistics, and
    its true false positive rate follows the very beta distribution of that limit.
    """
    points = [(roc.attack, point) for roc in rocs for point in roc.points]
    each = 1 - significance / max(1, len(points))  # two-sided limits, of which one side counts
    highest = [clopper_pearson(p.alarms, p.others, each)[1] for _, p in points]
    allowed = ceiling(events, np.array(highest))
    return [
        Excess(attack, point, point.interval(each)[0], float(most))
        for (attack, point), most in zip(points, allowed, strict=True)
    ]


def draw(rocs: Sequence[Roc], events: Sequence[SamplingEvent], bound: str) -> bytes:
    """The curves on logarithmic axes, the ceiling over them, as a PNG.

    Args:
        rocs: curves to draw; at most six.
        events: of the claimed mechanism; none draws no ceiling.
        bound: what the ceiling is called.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    least = 0.5 / max(p.others for roc in rocs for p in roc.points)
    grid = np.geomspace(least, 1, 200)
    axes.plot(grid, grid, color="0.6", linestyle=":", label="guessing")
    if events:
        top = ceiling(events, grid)
        axes.plot(grid, top, color="black", linewidth=2, label=bound)
        axes.fill_between(grid, top, 1.3, color="0.93", zorder=0)
    for roc, (colour, dash) in zip(rocs, _LOOKS, strict=False):
        axes.step(
            np.maximum(roc.false_positives, least), np.maximum(roc.true_positives, least),
            where="post", color=colour, linestyle=dash, label=f"{roc.attack}, AUC {roc.auc:.3f}",
        )  # fmt: skip
        for point in roc.points[:2]:
            low, high = point.interval()
            axes.plot([point.rate] * 2, [max(low, least), high], color=colour, alpha=0.5)
    axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.3))
    axes.set_xlabel("false alarms: non-members taken for members")
    axes.set_ylabel("hits: members recognised")
    axes.legend(loc="lower right", fontsize=9)
    return to_png(figure)


_LOOKS = (
    ("#0072b2", "-"), ("#d55e00", "-"), ("#009e73", "-"), ("#cc79a7", "-"), ("#e69f00", "--"),
    ("#56b4e9", "--"),
)  # fmt: skip


def to_png(figure: object) -> bytes:
    """A matplotlib figure as PNG bytes that name neither time nor program."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})  # type: ignore[attr-defined]
    return stream.getvalue()


def facts(roc: Roc) -> Mapping[str, object]:
    """A curve's numbers for `audit.json`."""
    return {
        "attack": roc.attack,
        "auc": roc.auc,
        "points": [
            {
                "false_positive_rate": point.rate,
                "hits": point.hits,
                "members": point.members,
                "alarms": point.alarms,
                "others": point.others,
                "true_positive_rate": point.true_positives,
                "interval": list(point.interval()),
            }
            for point in roc.points
        ],
    }
