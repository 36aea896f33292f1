"""Was the noise as strong as was promised, Gaussian, and new every time?

What a site sent, less what its records contributed, is the noise that it added. Its variance is
compared with the promised one (chi-squared), its shape with a Gaussian (Kolmogorov and Smirnov),
and the noise of every message with that of every other (Pearson's correlation, which is exactly a
t statistic for independent Gaussians): a seed that is used twice makes two of them alike.

Null: false with probability `ALARM`, at most, for each test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, kstest, t

ALARM = 1e-5
MOST_MESSAGES = 2500
MOST_VALUES = 50_000


@dataclass(frozen=True, slots=True)
class NoiseCheck:
    """How the noise compares with the promise.

    Attributes:
        values: how many noise values were compared.
        strength: measured standard deviation over the promised one.
        low: one-sided lower confidence limit of it, at 1 - `ALARM`.
        high: the upper one.
        gaussian: p-value of its shape; 0 if there is no noise.
        correlation: the largest, in absolute value, between two messages.
        fresh: p-value of that, corrected for the number of pairs.
    """

    values: int
    strength: float
    low: float
    high: float
    gaussian: float
    correlation: float
    fresh: float

    @property
    def strong(self) -> bool:
        """Whether it is not weaker than promised."""
        return self.high >= 1

    @property
    def well_made(self) -> bool:
        """Whether it is Gaussian and no two messages share it."""
        return self.gaussian > ALARM and self.fresh > ALARM


def check_noise(noise: NDArray[np.float64], random: np.random.Generator) -> NoiseCheck:
    """Holds noise against independent standard Gaussians.

    Args:
        noise: (messages, values) in units of the promised standard deviation.
        random: the auditor's; which messages are compared if there are very many.
    """
    count = noise.size
    total = float((noise**2).sum())
    strength = np.sqrt(total / count)
    low, high = np.sqrt(total / chi2.isf([ALARM, 1 - ALARM], count))
    if strength < 1e-3:  # float32 rounding, no noise
        return NoiseCheck(count, float(strength), float(low), float(high), 0.0, 0.0, 1.0)
    some = random.permutation(count)[:MOST_VALUES]
    shape = float(kstest(noise.reshape(-1)[some] / strength, "norm").pvalue)
    correlation, fresh = _alike(noise, random)
    return NoiseCheck(
        count, float(strength), float(low), float(high), shape, correlation, fresh
    )  # fmt: skip


def _alike(noise: NDArray[np.float64], random: np.random.Generator) -> tuple[float, float]:
    """The largest correlation between two messages, and its p-value."""
    rows, columns = noise.shape
    if rows < 2 or columns < 4:
        return 0.0, 1.0
    chosen = noise[np.sort(random.permutation(rows)[:MOST_MESSAGES])]
    centred = chosen - chosen.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.maximum(norms, 1e-12)
    products = np.abs(unit @ unit.T)
    np.fill_diagonal(products, 0.0)
    largest = min(float(products.max()), 1.0)
    pairs = len(chosen) * (len(chosen) - 1) / 2
    statistic = largest * np.sqrt((columns - 2) / max(1e-12, 1 - largest**2))
    return largest, float(min(1.0, 2 * pairs * t.sf(statistic, columns - 2)))
