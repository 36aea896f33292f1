from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray
from randomgen import ChaCha
from scipy import stats

from fedgraft_common.discrete_gaussian import BASE, ERROR, SMOOTH, DiscreteGaussian, sampler

# Statistical tests run on fixed keys: they cannot fail by chance.


def words(key: int = 1) -> Callable[[int], NDArray[np.uint64]]:
    draw: Callable[[int], NDArray[np.uint64]] = ChaCha(key=key, rounds=20).random_raw
    return draw


def exact(std: float, reach: int, times: int = 1) -> list[Decimal]:
    """Probabilities of N_Z(0, times std^2) at -reach to reach, from the definition, 60 digits."""
    with localcontext() as context:
        context.prec = 60
        twice = 2 * times * Decimal(std) ** 2
        far = math.ceil(20 * std * math.sqrt(times)) + reach
        weights = {y: (-Decimal(y * y) / twice).exp() for y in range(-far, far + 1)}
        whole = sum(weights.values())
        return [weights[y] / whole for y in range(-reach, reach + 1)]


def one_lookup(found: DiscreteGaussian) -> dict[int, Fraction]:
    """Probabilities of one table lookup, exactly as the table has them."""
    cut = [0, *found.thresholds]
    sizes = {j: Fraction(cut[j + 1] - cut[j], cut[-1]) for j in range(len(cut) - 1)}
    halves = {sign * j: p / 2 for j, p in sizes.items() for sign in (1, -1) if j}
    return halves | {0: sizes[0]}


@pytest.mark.parametrize("std", [0.4, 1.0, 3.7, 41.5])
def test_a_table_is_the_discrete_gaussian(std: float) -> None:
    found = DiscreteGaussian(std)
    assert found.levels == 1
    table = one_lookup(found)
    reach = found.bound
    assert 15 * std <= reach < 15 * std + 2
    assert sorted(table) == list(range(-reach, reach + 1))
    with localcontext() as context:
        context.prec = 60
        distance = Decimal(0)
        for y, p in zip(range(-reach, reach + 1), exact(found.unit, reach), strict=True):
            distance += abs(p - Decimal(table[y].numerator) / Decimal(table[y].denominator))
    assert distance / 2 < ERROR


def test_the_table_ends_within_the_error() -> None:
    """What is cut off is 2 Q(15); the rest is rounding to 191 bits."""
    assert 2 * stats.norm.sf(15) < 0.8 * ERROR
    assert 2 * math.ceil(15 * BASE) * 2.0**-191 < 0.1 * ERROR
    thresholds = DiscreteGaussian(200.0).thresholds
    assert thresholds == sorted(set(thresholds))
    assert thresholds[-1] == 1 << 191


def test_composed_lookups_are_the_discrete_gaussian() -> None:
    """The lemma in numbers: y_1 + m y_2 from two small tables, every probability, to 1e-40."""
    std = 31.0
    found = DiscreteGaussian(std, base=16.0)
    assert (found.levels, found.factor) == (2, 2)
    with localcontext() as context:
        context.prec = 60
        unit = exact(found.unit, reach := math.ceil(14 * found.unit))
        part = {y: unit[y + reach] for y in range(-reach, reach + 1)}
        wanted = exact(found.unit, 100, times=1 + 2**2)
        for y in range(-100, 101):
            composed = sum(
                (part[y - 2 * j] * p for j, p in part.items() if y - 2 * j in part), Decimal(0)
            )
            assert abs(composed / wanted[y + 100] - 1) < Decimal("1e-38")


@pytest.mark.parametrize("std", [1.0, 256.0, 256.1, 300.0, 9_000.0, 15_400.0, 1e6, 3e9, 1e15])
def test_every_composition_meets_the_lemma(std: float) -> None:
    found = DiscreteGaussian(std)
    total = found.unit**2
    for _ in range(found.levels - 1):
        inner = math.sqrt(total)
        width = found.unit * inner / math.hypot(found.unit, found.factor * inner)
        assert width >= SMOOTH
        total = found.unit**2 + found.factor**2 * total
    assert std <= math.sqrt(total) <= std * (1 + 1e-14)
    assert found.unit <= math.nextafter(BASE, math.inf)
    assert 15 * std <= found.bound <= 21 * std


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf, 2.0**60])
def test_a_standard_deviation_out_of_range(std: float) -> None:
    with pytest.raises(ValueError, match="std"):
        DiscreteGaussian(std)


@pytest.mark.parametrize("base", [1.0, 4.0, 8.5])
def test_a_table_too_small_to_compose_from(base: float) -> None:
    with pytest.raises(ValueError, match="base"):
        DiscreteGaussian(100.0, base)
    assert DiscreteGaussian(100.0, 9.0).levels > 1


@pytest.mark.parametrize(("std", "levels"), [(0.8, 1), (5.0, 1), (17.0, 2), (80.0, 3)])
def test_samples_against_the_exact_probabilities(std: float, levels: int) -> None:
    """Chi-square; small tables (base 16), so that few lookups reach values that can be counted."""
    found = DiscreteGaussian(std, base=16.0)
    assert found.levels == levels
    size = 400_000
    values = found.sample(size, words(int(std)))
    assert values.dtype == np.int64
    reach = math.ceil(3.5 * std)
    expected = size * np.array([float(p) for p in exact(std, reach)])
    counts = np.array([(values == y).sum() for y in range(-reach, reach + 1)])
    outside = [size - counts.sum(), size - expected.sum()]
    observed, wanted = [*counts, outside[0]], [*expected, outside[1]]
    assert stats.chisquare(observed, wanted).pvalue > 0.01


@pytest.mark.parametrize("std", [300.0, 9_000.0, 1e6, 3e9])
def test_large_samples_against_the_normal(std: float) -> None:
    size = 200_000
    values = DiscreteGaussian(std).sample(size, words())
    assert stats.kstest(values, "norm", args=(0, std)).pvalue > 0.01
    assert values.var() / std**2 == pytest.approx(1, abs=4 * math.sqrt(2 / size))
    assert stats.kurtosis(values) == pytest.approx(0, abs=4 * math.sqrt(24 / size))
    for modulus in (2, 7, 16, 60):  # the multiples of a factor show no pattern
        assert stats.chisquare(np.bincount(values % modulus)).pvalue > 0.001


def test_a_sum_of_shares_is_a_discrete_gaussian() -> None:
    shares, std, size = 13, 6.0, 200_000
    draw = words(5)
    total = sum(DiscreteGaussian(std).sample(size, draw) for _ in range(shares))
    assert isinstance(total, np.ndarray)
    reach = 60
    expected = size * np.array([float(p) for p in exact(std * math.sqrt(shares), reach)])
    counts = np.array([(total == y).sum() for y in range(-reach, reach + 1)])
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 0.01


def test_neighbours_are_independent() -> None:
    draw = words(9)
    first, second = (DiscreteGaussian(2_000.0).sample(300_000, draw) for _ in range(2))
    limit = 4 / math.sqrt(first.size)
    assert abs(np.corrcoef(first, second)[0, 1]) < limit
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < limit
    assert abs(np.corrcoef(np.abs(first[:-1]), np.abs(first[1:]))[0, 1]) < limit


def slowly(found: DiscreteGaussian, word: int, more: int) -> int:
    """One lookup from the definition: the least j with V < P[|y| <= j], and the sign."""
    exact_v = (word >> 1) << 128 | more
    magnitude = next(j for j, threshold in enumerate(found.thresholds) if exact_v < threshold)
    return -magnitude if word & 1 else magnitude


def test_lookups_against_a_walk_through_the_table() -> None:
    """Random words, and words at and beside every threshold, where the first 63 bits tie."""
    found = DiscreteGaussian(9.0)
    at = [threshold >> 128 for threshold in found.thresholds[:-1]]
    edges = {v + step for v in at for step in (-1, 0, 1) if 0 <= v + step < 2**63}
    chosen = [v << 1 | sign for v in sorted(edges | {0, 2**63 - 1}) for sign in (0, 1)]
    chosen += words(3)(500).tolist()
    asked = 0

    for low in (0, 2**63 + 5, 2**64 - 1):

        def tie(size: int, low: int = low) -> NDArray[np.uint64]:
            nonlocal asked
            asked += 1
            assert size == 2
            return np.array([low, low], np.uint64)

        result = found._lookup(np.array(chosen, np.uint64), tie)
        more = low << 64 | low
        assert result.tolist() == [slowly(found, word, more) for word in chosen]
    assert asked == 3 * 2 * len(set(at) - {2**63 - 1}) + 3 * 2 * (2**63 - 1 in at)


def test_nothing_is_beyond_the_bound() -> None:
    found = DiscreteGaussian(5_000.0)

    def extreme(sign: int) -> Callable[[int], NDArray[np.uint64]]:
        """All ones but for the sign; the two words of a tie are all ones."""
        return lambda size: np.full(size, 2**64 - 1 if size == 2 else 2**64 - 2 + sign, np.uint64)

    high, low = (found.sample(3, extreme(sign)) for sign in (0, 1))
    assert high.tolist() == [found.bound] * 3
    assert low.tolist() == [-found.bound] * 3


def test_no_samples() -> None:
    assert DiscreteGaussian(300.0).sample(0, words()).shape == (0,)


def test_a_sampler_is_made_once() -> None:
    assert sampler(77.0) is sampler(77.0)
