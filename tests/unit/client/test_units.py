"""Which units and records a step uses, and what that is worth: PRIVACY.md's table of patients."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import nn

from fedgraft_client.dp import JointOptimizer
from fedgraft_client.prefix import Cached
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.units import UnitIndex, pack, unit_index
from fedgraft_common.accounting import SamplingEvent, epsilon
from fedgraft_common.errors import PrivacyError
from fedgraft_common.plan import Plan

# Statistical tests run on simulated sources with fixed keys: they cannot fail by chance.


def simulated(*key: int | str) -> NoiseSource:
    return NoiseSource.for_simulation("test_units", *key)


# --- the index


def test_the_index_finds_every_record_of_a_unit() -> None:
    index = UnitIndex.of(torch.tensor([2, 0, 2, 1, 0, 2]))
    assert index.counts.tolist() == [2, 1, 3]
    found = [index.order[s : s + c].tolist() for s, c in zip(index.starts, index.counts)]  # noqa: B905
    assert found == [[1, 4], [3], [0, 2, 5]]


def test_rate_one_takes_every_unit_up_to_the_cap() -> None:
    units = torch.tensor([2, 0, 2, 1, 0, 2])
    index = UnitIndex.of(units)
    whole = index.sample(simulated("all"), 1.0, 3)
    assert whole.records.tolist() == [1, 4, 3, 0, 2, 5]
    assert whole.sizes is not None and whole.sizes.tolist() == [2, 1, 3]
    capped = index.sample(simulated("all"), 1.0, 1)
    assert capped.sizes is not None and capped.sizes.tolist() == [1, 1, 1]
    assert units[capped.records].tolist() == [0, 1, 2]


def test_rate_zero_takes_nothing() -> None:
    batch = UnitIndex.of(torch.tensor([0, 0, 1])).sample(simulated("none"), 0.0, 2)
    assert batch.records.dtype == torch.int64
    assert (batch.records.tolist(), batch.sizes is not None) == ([], True)
    assert batch.sizes is not None and batch.sizes.tolist() == []


def test_a_cap_below_one_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"most: found 0; allowed: a whole number of at least 1"):
        UnitIndex.of(torch.tensor([0])).sample(simulated("bad"), 1.0, 0)


@given(
    st.lists(st.integers(0, 6), max_size=40),
    st.integers(1, 5),
    st.floats(0, 1),
    st.integers(0, 2**32),
)
def test_a_batch_is_whole_units_up_to_the_cap(
    column: list[int], most: int, rate: float, key: int
) -> None:
    units = torch.tensor(column, dtype=torch.int64).unique(return_inverse=True)[1]
    batch = UnitIndex.of(units).sample(simulated(key), rate, most)
    assert batch.sizes is not None and int(batch.sizes.sum()) == len(batch.records)
    assert len(batch.records.unique()) == len(batch.records)
    seen = []
    for part in batch.records.split(batch.sizes.tolist()) if len(batch.sizes) else ():
        (number,) = units[part].unique().tolist()
        seen.append(number)
        assert len(part) == min(most, int((units == number).sum()))
    assert seen == sorted(set(seen))


def test_a_plan_for_a_column_needs_the_column() -> None:
    plan = Plan().replace({"privacy.unit": "patient_id"})
    with pytest.raises(PrivacyError) as caught:
        unit_index(plan, None, "north")
    assert str(caught.value).startswith("privacy.unit: found 'patient_id'; allowed: record, for")
    assert "site north" in str(caught.value)
    index = unit_index(plan, torch.tensor([0, 0]), "north")
    assert index is not None and index.counts.tolist() == [2]
    assert unit_index(Plan(), torch.tensor([0, 0]), "north") is None


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 12))
def test_packing_splits_no_unit_and_wastes_no_room(sizes: list[int], physical_batch: int) -> None:
    parts = pack(torch.tensor(sizes, dtype=torch.int64), physical_batch)
    assert sum(parts) == len(sizes)
    start = 0
    for count in parts:
        mine = sizes[start : start + count]
        start += count
        assert sum(mine) <= physical_batch or len(mine) == 1
        assert start == len(sizes) or sum(mine) + sizes[start] > physical_batch


# --- statistics


def test_units_are_sampled_by_poisson_whatever_their_size() -> None:
    """Marginal and pairwise inclusion; sampling records would take the large units more often."""
    counts = [1, 1, 2, 3, 5, 8, 30]
    index = UnitIndex.of(torch.repeat_interleave(torch.arange(7), torch.tensor(counts)))
    units = np.repeat(np.arange(7), counts)
    source, rate, draws = simulated("poisson"), 0.3, 20_000
    included = np.zeros((draws, 7))
    for row in included:
        row[units[index.sample(source, rate, 4).records.numpy()]] = 1
    error = np.sqrt(rate * (1 - rate) / draws)
    np.testing.assert_allclose(included.mean(axis=0), rate, atol=4 * error)
    pairs = np.array(
        [(included[:, a] * included[:, b]).mean() for a, b in combinations(range(7), 2)]
    )
    error = np.sqrt(rate**2 * (1 - rate**2) / draws)
    np.testing.assert_allclose(pairs, rate**2, atol=4 * error)
    sizes = np.bincount(included.sum(axis=1).astype(int), minlength=8)
    expected = draws * stats.binom.pmf(np.arange(8), 7, rate)
    common = expected > 5
    observed = np.append(sizes[common], sizes[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    assert stats.chisquare(observed, wanted).pvalue > 1e-3
    steps = np.corrcoef(included[:-1].ravel(), included[1:].ravel())[0, 1]
    assert abs(steps) < 4 / np.sqrt(included[1:].size)


def test_every_choice_of_records_inside_a_unit_is_equally_likely() -> None:
    """All subsets, so marginal and pairwise inclusion too; and units choose independently."""
    index = UnitIndex.of(torch.tensor([0] * 5 + [1] * 5 + [2] * 2))
    source, draws = simulated("inside"), 20_000
    subsets = {subset: n for n, subset in enumerate(combinations(range(5), 2))}
    table = np.zeros((10, 10))
    previous, repeats = -1, 0
    for _ in range(draws):
        chosen = index.sample(source, 1.0, 2).records.tolist()
        assert chosen[4:] == [10, 11]  # a unit within the cap is taken whole
        first, second = subsets[chosen[0], chosen[1]], subsets[chosen[2] - 5, chosen[3] - 5]
        table[first, second] += 1
        repeats += first == previous
        previous = first
    assert stats.chisquare(table.sum(axis=0)).pvalue > 1e-3
    assert stats.chisquare(table.sum(axis=1)).pvalue > 1e-3
    assert stats.chi2_contingency(table).pvalue > 1e-3
    assert repeats / draws == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / draws))  # fresh each step


# --- PRIVACY.md: q .05, sigma 2, T 200, delta 1e-5, a unit of K records

Q, SIGMA, STEPS, DELTA = 0.05, 2.0, 200, 1e-5
TABLE = {1: ("1.56", 1.5606), 2: ("3.41", 3.4068), 4: ("7.67", 7.6714), 8: ("18.23", 18.2316)}


def mixture_epsilon(shifts: list[float], chances: list[float]) -> float:
    """Epsilon of STEPS releases of N(shift, SIGMA^2), the shift drawn anew each time."""
    one = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        SIGMA, shifts, chances, value_discretization_interval=1e-3
    )
    return float(one.self_compose(STEPS).get_epsilon_for_delta(DELTA))


class Line(nn.Module):
    """One adapter and one head value, without a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Parameter(torch.zeros(1))
        self.head = nn.Parameter(torch.zeros(1))


class Steep:
    """Every record's gradient has norm 500 and the same direction: the worst case for clipping."""

    name = "steep"

    def __init__(self, model: Line) -> None:
        self.model = model

    def __call__(self, cached: Cached, labels: torch.Tensor) -> None:
        self.model.adapter.grad_sample = torch.full((len(labels), 1), 300.0)  # type: ignore[attr-defined]
        self.model.head.grad_sample = torch.full((len(labels), 1), 400.0)  # type: ignore[attr-defined]

    def close(self) -> None:
        pass


def shifts_of_one_unit(records: int, by_unit: bool, draws: int) -> NDArray[np.float64]:
    """How far a unit of K records moves the sum of C = 1, with the real sampler and clipper."""
    source, model = simulated("shift", records, int(by_unit)), Line()
    groups = [{"params": [model.adapter, model.head], "noise_std": 0.0}]
    joint = JointOptimizer(torch.optim.SGD(groups, lr=1.0), 1.0, source)
    units = torch.zeros(records, dtype=torch.int64) if by_unit else torch.arange(records)
    index, engine, found = UnitIndex.of(units), Steep(model), []
    for _ in range(draws):
        batch = index.sample(source, Q, 8)
        labels = torch.zeros(len(batch.records), dtype=torch.int64)
        joint.noisy_sum(engine, (labels,), labels, 256, batch.sizes)
        assert model.adapter.grad is not None and model.head.grad is not None
        found.append(float(torch.cat([model.adapter.grad, model.head.grad]).norm()))
    return np.array(found)


@pytest.mark.parametrize("records", TABLE)
def test_golden_table_of_records_per_patient(records: int) -> None:
    """Sampling and clipping records: a unit moves the sum by Binomial(K, q) times C."""
    printed, value = TABLE[records]
    levels = list(range(records + 1))
    chances = stats.binom.pmf(levels, records, Q).tolist()
    found = mixture_epsilon([float(level) for level in levels], chances)
    assert found == pytest.approx(value, abs=3e-4)  # the value is from a finer grid
    assert f"{found:.2f}" == f"{value:.2f}" == printed
    draws = 2000
    shifts = shifts_of_one_unit(records, by_unit=False, draws=draws)
    seen = np.bincount(np.rint(shifts).astype(int), minlength=records + 1)
    np.testing.assert_allclose(shifts, np.rint(shifts), atol=1e-4)
    error = np.sqrt(np.array(chances) / draws)
    np.testing.assert_allclose(seen / draws, chances, atol=4 * float(error.max()))


@pytest.mark.parametrize("records", [*TABLE, 50])
def test_epsilon_of_a_unit_is_flat_in_the_number_of_its_records(records: int) -> None:
    """Sampling and clipping units: whatever K, the sum moves by C with probability q, else not."""
    draws = 2000
    shifts = shifts_of_one_unit(records, by_unit=True, draws=draws)
    largest, hits = round(float(shifts.max()), 5), int((shifts > 0).sum())
    assert largest == 1  # never more, and no less: the bound is tight
    assert stats.binomtest(hits, draws, Q).pvalue > 1e-3
    event = SamplingEvent(Q, SIGMA / largest, STEPS)  # noise SIGMA, sensitivity as measured
    assert f"{epsilon([event], DELTA):.2f}" == "1.56"
