"""The discrete Gaussian on the integers: how it is sampled, and why it is a Gaussian in disguise.

N_Z(m, s^2) has probabilities proportional to r_s(y - m) = exp(-(y - m)^2 / (2 s^2)) at the integers
y (Canonne, Kamath and Steinke 2020, "The discrete Gaussian for differential privacy"). Everything
here rests on one lemma.

Lemma (Poisson summation). T_s(c) = sum over integers y of r_s(y - c) is within a factor 1 +- e_s of
s sqrt(2 pi) for every real c, where e_s = 2 sum_{j >= 1} exp(-2 pi^2 s^2 j^2). For s >= 3, e_s
is below 2e-77. Writing "=~" for equality up to a few factors 1 +- e_3:

 1. Sums. For independent X ~ N_Z(0, a^2), Y ~ N_Z(0, b^2) and an integer m, X + m Y =~ N_Z(0, a^2 +
    m^2 b^2) in every probability, if w = a b / sqrt(a^2 + m^2 b^2) >= 3 and a, b >= 3. Proof:
    r_a(z - m j) r_b(j) = r_{sqrt(a^2 + m^2 b^2)}(z) r_w(j - c) for a real c; sum over j; four
    factors in all. (For m = 1: Kairouz, Liu and Steinke 2021, "The distributed discrete Gaussian
    mechanism"; for any m: Micciancio and Walter 2017, "Gaussian sampling over the integers".)
 2. Disguise. Let x ~ N(m, s^2), a continuous Gaussian around an integer m, and draw an integer y
    with probability r_3(y - x) / T_3(x). Then y =~ N_Z(m, s^2 + 9). Proof: T_3(x) is a constant but
    for 1 +- e_3, and integrating r_s(x - m) r_3(y - x) over x gives a constant times
    r_{sqrt(s^2 + 9)}(y - m); three factors. The draw does not look at m. So for integer vectors,
    adding N_Z(0, s^2 + 9) noise is a post-processing of adding N(0, s^2) noise, but for factors
    within exp(+- 4e-77) for each coordinate.

By 2, whatever is proved of a mechanism with continuous Gaussian noise, by whatever accountant,
holds for the discrete one: subsampled, composed, adaptive, beside other outputs.

Sampling follows 1: a table of the distribution function at a small standard deviation, looked up
a few times, y = y_1 + m (y_2 + m (y_3 + ...)). There is no rejection, so the time taken says little
of the value, and no floating point between random bits and sample. What is not exact: the table
ends at 15 standard deviations and has 191 bits, a total variation distance below 1e-50 for each
lookup; and the few factors of 1.

Why not a library: `deploy/decisions/0007-own-sampler-of-discrete-noise.md`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import cached_property, lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

Words = Callable[[int], NDArray[np.uint64]]
"""Independent uniform 64-bit words, as many as asked for."""

SMOOTH: Final = 3.0
"""Standard deviation from which on the lemma's e is below 2e-77."""
ERROR: Final = 1e-50
"""Total variation distance of one table lookup from what the proof assumes, at most."""
BASE: Final = 256.0
"""Largest standard deviation that is looked up in a table; larger ones are composed."""
_MOST_M: Final = 60  # the lemma's w is then at least 250 / sqrt(1 + 60^2), above 3
_REACH: Final = 15  # standard deviations in a table; 2 Q(15) is 7e-51
_BITS: Final = 191  # of a table's probabilities: 63 of the first word, 128 more if they tie
_DIGITS: Final = 80  # decimal, while a table is computed
_TOP: Final = 16  # bits of a word that usually decide alone


class DiscreteGaussian:
    """A sampler of N_Z(0, std^2).

    Args:
        std: at least this standard deviation (of the continuous Gaussian that gives the
            distribution its name, integer units), above 0; exceeded by rounding errors only.
        base: for tests, a smaller table; at least 9.

    Attributes:
        levels: table lookups for one value.
        factor: m above; 1 if one lookup is enough.
        unit: standard deviation of the table.
        bound: no sample is larger in absolute value.
    """

    def __init__(self, std: float, base: float = BASE) -> None:
        if not 0 < std < 2.0**60:
            raise ValueError(f"std: {std}, not between 0 and 2^60")
        most = int(_MOST_M * base / BASE)
        if most < 2:
            raise ValueError(f"base: {base}, less than 9: too small a table to compose from")
        ratio = std / base
        self.levels = 1 if ratio <= 1 else 1 + max(1, math.ceil(math.log(ratio, most)))
        self.factor = 1 if ratio <= 1 else math.ceil(ratio ** (1 / (self.levels - 1)))
        powers = [self.factor**level for level in range(self.levels)]
        self.unit = math.nextafter(std / math.sqrt(sum(p * p for p in powers)), math.inf)
        self.std = std
        self.bound = math.ceil(_REACH * self.unit) * sum(powers)

    @cached_property
    def thresholds(self) -> list[int]:
        """2^191 P[|y| <= j] for one lookup, j = 0, 1, ... up to the bound, the last being 2^191.

        Computed by recurrence in 80 decimal digits: r(j + 1) = r(j) t(j), t(j + 1) = t(j) r(1)^2.
        """
        count = math.ceil(_REACH * self.unit)
        with localcontext() as context:
            context.prec = _DIGITS
            unit = Decimal(self.unit)
            step = (-1 / (2 * unit * unit)).exp()
            density, ratio, square = Decimal(1), step, step * step
            sums = [density]
            for _ in range(count):
                density *= ratio
                ratio *= square
                sums.append(sums[-1] + 2 * density)  # y and -y
            whole = Decimal(2) ** _BITS / sums[-1]
            return [int(value * whole) for value in sums[:-1]] + [1 << _BITS]

    @property
    def variance(self) -> float:
        """Of what is drawn, as the tables have it: E[y^2] is the sum of (2 j + 1) P[|y| > j]."""
        beyond = sum((2 * j + 1) * ((1 << _BITS) - t) for j, t in enumerate(self.thresholds))
        powers = (self.factor**level for level in range(self.levels))
        return float(beyond / (1 << _BITS) * sum(p * p for p in powers))

    @cached_property
    def _search(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Thresholds cut to 63 bits, and what each value of a word's top bits says.

        That is the magnitude, and whether more bits are needed to know it.
        """
        high = np.array([t >> (_BITS - 63) for t in self.thresholds[:-1]], np.int64)
        edges = np.arange(1 << _TOP, dtype=np.int64) << (63 - _TOP)
        start = np.searchsorted(high, edges)
        undecided = np.zeros(1 << _TOP, np.bool_)
        undecided[high >> (63 - _TOP)] = True
        return high, start, undecided

    def sample(self, size: int, words: Words) -> NDArray[np.int64]:
        """Independent samples.

        Args:
            size: how many.
            words: where randomness comes from.

        Returns:
            (size,) int64.
        """
        total = self._lookup(words(size), words)
        for _ in range(self.levels - 1):
            total *= self.factor
            total += self._lookup(words(size), words)
        return total

    def _lookup(self, uniform: NDArray[np.uint64], words: Words) -> NDArray[np.int64]:
        """A sign from the last bit; a magnitude from the other 63, and from more if they tie."""
        high, start, undecided = self._search
        top = (uniform >> np.uint64(64 - _TOP)).astype(np.int64)
        found = start[top]
        (open_,) = np.nonzero(undecided[top])
        rest = (uniform[open_] >> np.uint64(1)).astype(np.int64)
        place = np.searchsorted(high, rest)
        found[open_] = place
        tied = np.nonzero(high[np.minimum(place, len(high) - 1)] == rest)[0]
        for index in tied:  # once in 10^16 samples
            first, second = (int(word) for word in words(2))
            exact = (int(rest[index]) << 128) | (first << 64) | second
            found[open_[index]] = bisect_right(self.thresholds, exact)
        sign = 1 - 2 * (uniform & np.uint64(1)).astype(np.int64)
        return found * sign


@lru_cache(maxsize=32)  # about 1 MB each
def sampler(std: float) -> DiscreteGaussian:
    """A sampler of N_Z(0, std^2); made once."""
    return DiscreteGaussian(std)
