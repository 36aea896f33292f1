"""How good answers are, with an interval: at home, for the site's own eyes.

Shapes: N records, U units.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from fedgraft_client.tasks import Task

RESAMPLES = 500
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Score:
    """One score of a task.

    Attributes:
        name: of the score, e.g. `AUC`.
        value: on all records; NaN where it is not defined for them.
        low: lower end of the interval; NaN if too few resamples have the score.
        high: upper end.
    """

    name: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.name} {self.value:.3f}"
        return f"{self.name} {self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def scores(
    task: Task,
    outputs: torch.Tensor,
    labels: torch.Tensor,
    units: torch.Tensor | None = None,
    resamples: int = RESAMPLES,
) -> tuple[Score, ...]:
    """Every score of a task, with bootstrap percentile intervals at 95 % (Efron 1979).

    Units are drawn, not records: the images of one patient are not as many independent facts.
    Resamples on which a score is not defined (one class only, for an AUC) are left out; with fewer
    than half of them there is no interval.

    Args:
        task: whose answers they are.
        outputs: of the task's head, N records first.
        labels: N records first.
        units: (N,) int64, the unit of each record; None if every record is one.
        resamples: how often to draw; 0 for values alone.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap

    values = task.scores(outputs, labels)
    numbers = torch.arange(len(outputs)) if units is None else units
    order = numbers.argsort(stable=True)
    groups = order.split(torch.bincount(numbers).tolist())

    @lru_cache(maxsize=resamples or 1)
    def drawn(units: bytes) -> dict[str, float]:
        chosen = torch.cat([groups[i] for i in np.frombuffer(units, dtype=np.int64)])
        return task.scores(outputs[chosen], labels[chosen])

    def interval(name: str) -> tuple[float, float]:
        def statistic(sample: Any) -> float:
            return drawn(np.ascontiguousarray(sample, dtype=np.int64).tobytes())[name]

        with warnings.catch_warnings():  # draws without a value are left out below
            warnings.simplefilter("ignore", DegenerateDataWarning)
            found = bootstrap(
                (np.arange(len(groups)),),
                statistic,
                n_resamples=resamples,
                vectorized=False,
                method="percentile",
                rng=np.random.default_rng(0),  # the same draws for every score
            ).bootstrap_distribution
        known = found[~np.isnan(found)]
        if len(known) < resamples / 2:
            return float("nan"), float("nan")
        low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(low), float(high)

    if resamples == 0 or len(groups) < 2:
        return tuple(Score(n, v, float("nan"), float("nan")) for n, v in values.items())
    return tuple(Score(name, value, *interval(name)) for name, value in values.items())
