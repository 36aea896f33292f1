"""What a simulation found, as data: the table, the curves, and what left each site.

Accuracies are shares in [0, 1] of a site's held-out records. Everything here is known to the
researcher only because a simulation owns all sites; in production none of it leaves them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

from fedgraft_common.plan import Plan

MARGIN = 0.005  # differences below half a point of the mean score are called equal


@dataclass(frozen=True, slots=True)
class SiteFacts:
    """One simulated site.

    Attributes:
        name: of the site.
        train: records it trains on.
        test: records held out.
        classes: names of its classes.
        sample_rate: q.
        noise_multiplier: sigma; 0 without DP.
        epsilon: of the whole run, at the plan's delta, for the plan's own mechanism.
    """

    name: str
    train: int
    test: int
    classes: tuple[str, ...]
    sample_rate: float
    noise_multiplier: float
    epsilon: float


@dataclass(frozen=True, slots=True)
class Point:
    """A round of a federated row: mean score over sites before the refit, epsilon so far."""

    round: int
    accuracy: float
    epsilon: float


@dataclass(frozen=True, slots=True)
class Row:
    """One way to train, measured at every site.

    Attributes:
        key: `alone-head`, `alone-adapter`, `local`, `distributed` or `none`.
        title: for people.
        epsilon: promised to each site; infinite without DP where something leaves, 0 where
            nothing leaves.
        refit: score per site with the sealed, refitted head.
        trained: score per site with the head as training left it; empty if there is none.
        curve: points over the rounds; empty if there are no rounds.
        bytes_per_round: of tensors one site sends in a round.
        seconds: wall time.
    """

    key: str
    title: str
    epsilon: float
    refit: tuple[float, ...]
    trained: tuple[float, ...] = ()
    curve: tuple[Point, ...] = ()
    bytes_per_round: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor that a site sends in a round."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """One plan, compared with the alternatives a site has, on one seed.

    Attributes:
        plan: what ran.
        sites: facts per site.
        rows: the table, in reading order.
        sent: the tensors a site sends in a round under the plan's own mechanism.
        notes: what a reader must know about how this was made (gradient engine, prefix cache,
            in-place sum, simulated noise).
        seconds: wall time of everything.
        score: which score the rows compare.
    """

    plan: Plan
    sites: tuple[SiteFacts, ...]
    rows: tuple[Row, ...]
    sent: tuple[Tensor, ...]
    notes: tuple[str, ...]
    seconds: float
    score: str = "accuracy"


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean over sites and seeds of one row, with the standard deviation over seeds."""

    key: str
    title: str
    epsilon: float
    delta: float
    refit: float
    trained: float | None
    deviation: float


def mean(scores: Iterable[float]) -> float:
    """Over the sites whose test records allow the score; NaN if none do."""
    known = [score for score in scores if not math.isnan(score)]
    return fmean(known) if known else math.nan


@dataclass(frozen=True, slots=True)
class Study:
    """The same plan over several seeds; a single run is a study of one.

    Attributes:
        comparisons: one per seed.
    """

    comparisons: tuple[Comparison, ...]
    summaries: tuple[Summary, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "summaries", tuple(self._summarise()))

    def _summarise(self) -> list[Summary]:
        found = []
        for position, row in enumerate(self.comparisons[0].rows):
            rows = [comparison.rows[position] for comparison in self.comparisons]
            means = [mean(r.refit) for r in rows]
            trained = [mean(r.trained) for r in rows if r.trained]
            spread = stdev(means) if len(means) > 1 else 0.0
            delta = self.comparisons[0].plan.privacy.delta if 0 < row.epsilon < math.inf else 0.0
            found.append(
                Summary(
                    row.key,
                    row.title,
                    max(r.epsilon for r in rows),
                    delta,
                    fmean(means),
                    fmean(trained) if trained else None,
                    spread,
                )
            )
        return found

    def summary(self, key: str) -> Summary | None:
        """The summary of one row, if it was run."""
        return next((s for s in self.summaries if s.key == key), None)

    @property
    def score(self) -> str:
        """Which score the rows compare."""
        return self.comparisons[0].score

    @property
    def gain(self) -> float | None:
        """Mean score of the plan's mechanism minus the better way to stay alone."""
        own = self.summary(self.comparisons[0].plan.privacy.mechanism)
        alone = [s.refit for s in self.summaries if s.key.startswith("alone")]
        return own.refit - max(alone) if own and alone else None

    @property
    def verdict(self) -> str:
        """Whether federating pays for this plan, said plainly."""
        gain = self.gain
        privacy = self.comparisons[0].plan.privacy
        if gain is None:
            return "The table has no row to compare the plan with."
        points = f"{abs(gain) * 100:.1f} points of mean {self.score}"
        if gain > MARGIN:
            promise = "without DP" if privacy.mechanism == "none" else "under DP"
            return f"Federating {promise} pays: {points} above the better way to stay alone."
        if gain < -MARGIN:
            return (
                f"Federating does not pay for this plan: {points} below the better way to stay "
                "alone, which sends nothing and needs no noise. Stay alone, or try "
                + ("" if privacy.mechanism == "distributed" else "the distributed mechanism, ")
                + "more sites or a larger epsilon."
            )
        return (
            "Federating does not pay for this plan: it is no better than staying alone, which "
            "sends nothing and needs no noise."
        )

    def document(self) -> dict[str, Any]:
        """Everything as JSON-ready data; an infinite epsilon becomes null."""

        def plain(value: Any) -> Any:
            if isinstance(value, float) and not math.isfinite(value):
                return None
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return [plain(item) for item in value] if isinstance(value, list | tuple) else value

        comparisons = []
        for comparison in self.comparisons:
            facts = {
                "plan": comparison.plan.model_dump(mode="json"),
                "plan_hash": comparison.plan.hash,
                "sites": [asdict(site) for site in comparison.sites],
                "rows": [asdict(row) for row in comparison.rows],
                "sent": [asdict(tensor) for tensor in comparison.sent],
                "notes": list(comparison.notes),
                "seconds": comparison.seconds,
            }
            comparisons.append(facts)
        return plain(  # type: ignore[no-any-return]
            {
                "summary": [asdict(summary) for summary in self.summaries],
                "verdict": self.verdict,
                "comparisons": comparisons,
            }
        )
