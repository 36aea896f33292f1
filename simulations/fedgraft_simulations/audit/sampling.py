"""Were batches Poisson samples? Shuffled batches, accounted as Poisson, promise too much.

Under Poisson sampling with rate q every unit's presence in every batch is an independent coin. So
the size of a batch of n units is Binomial(n, q), and the number of times that a unit was in one of
T batches is Binomial(T, q), independently for every unit. Shuffling fixes both numbers. Each count
is turned into a value that is exactly uniform if it is binomial (the randomised probability
integral transform), and the values are held against the uniform distribution (Kolmogorov and
Smirnov); the total is held against its binomial.

Null: false with probability `ALARM`, at most, for each of the three tests.

None of the three sees how many batches there were: one step more than was charged is Poisson too.
`batches_of` counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, binomtest, kstest

from fedgraft_simulations.audit.probe import Drawn

ALARM = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingCheck:
    """How batches compare with Poisson samples.

    Attributes:
        batches: how many were drawn.
        rate: share of units that were in a batch, over all batches.
        expected_rate: q, the mean over those batches.
        sizes: p-value of the batches' sizes.
        units: p-value of how often each unit was drawn.
        total: p-value of the rate.
    """

    batches: int
    rate: float
    expected_rate: float
    sizes: float
    units: float
    total: float

    @property
    def poisson(self) -> bool:
        """Whether nothing speaks against it."""
        return min(self.sizes, self.units, self.total) > ALARM


def check_sampling(
    drawn: Sequence[Drawn], rates: Sequence[float], random: np.random.Generator
) -> SamplingCheck:
    """Holds batches against independent coins.

    Args:
        drawn: every batch of a run.
        rates: q of each site.
        random: the auditor's, for the transform.
    """
    sizes = np.array([len(batch.units) for batch in drawn])
    of = np.array([batch.of for batch in drawn])
    rate = np.array([rates[batch.site] for batch in drawn])
    counts, trials, unit_rates = _unit_counts(drawn, rates)
    return SamplingCheck(
        batches=len(drawn),
        rate=float(sizes.sum() / of.sum()),
        expected_rate=float((of * rate).sum() / of.sum()),
        sizes=_uniform(sizes, of, rate, random),
        units=_uniform(counts, trials, unit_rates, random),
        total=min(1.0, len(set(rates)) * _total(drawn, rates)),
    )


def batches_of(drawn: Sequence[Drawn], sites: int) -> list[int]:
    """How many batches each site drew: the steps that it took, whatever it was charged for."""
    found = np.bincount([batch.site for batch in drawn], minlength=sites)
    return [int(count) for count in found]


def _unit_counts(
    drawn: Sequence[Drawn], rates: Sequence[float]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """How often each unit of each site was drawn, of how many times, at which rate."""
    counts, trials, unit_rates = [], [], []
    for site, rate in enumerate(rates):
        batches = [batch for batch in drawn if batch.site == site]
        if batches:
            found = np.zeros(batches[0].of, dtype=np.int64)
            for batch in batches:
                found[batch.units] += 1
            counts.append(found)
            trials.append(np.full(len(found), len(batches)))
            unit_rates.append(np.full(len(found), rate))
    return np.concatenate(counts), np.concatenate(trials), np.concatenate(unit_rates)


def _uniform(
    counts: NDArray[np.int64],
    trials: NDArray[np.int64],
    rates: NDArray[np.float64],
    random: np.random.Generator,
) -> float:
    """P-value of independent binomial counts."""
    below = binom.cdf(counts - 1, trials, rates)
    values = below + random.random(len(counts)) * binom.pmf(counts, trials, rates)
    return float(kstest(values, "uniform").pvalue)


def _total(drawn: Sequence[Drawn], rates: Sequence[float]) -> float:
    """The smallest p-value of a total, over the sample rates that occur."""
    found = []
    for rate in sorted(set(rates)):
        batches = [batch for batch in drawn if rates[batch.site] == rate]
        if batches:
            taken, of = sum(len(b.units) for b in batches), sum(b.of for b in batches)
            found.append(float(binomtest(taken, of, rate).pvalue))
    return min(found)
