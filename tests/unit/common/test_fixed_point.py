from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from fedgraft_client.randomness import NoiseSource
from fedgraft_common.accounting import SamplingEvent, epsilon
from fedgraft_common.discrete_gaussian import DiscreteGaussian
from fedgraft_common.errors import PlanError, PrivacyError
from fedgraft_common.fixed_point import LEAST_SHARE, FixedPoint, fixed_point
from fedgraft_common.mechanism import MOST_ROUNDING, RESERVED, step_noise
from fedgraft_common.plan import Plan


def plan(sites: int = 16, **changes: object) -> Plan:
    """`a__b=1` changes a.b."""
    few: dict[str, object] = {
        "privacy.mechanism": "distributed",
        "training.sample_rate": 0.5,
        "training.expected_batch": 20,
        "aggregation.sites": sites,
        "rounds.count": 60,
    }
    return Plan().replace(few | {key.replace("__", "."): v for key, v in changes.items()})


class Fixed:
    """Gives a chosen share."""

    def __init__(self, share: NDArray[np.int64]) -> None:
        self.share = share

    def discrete_gaussian(self, size: int, sampler: DiscreteGaussian) -> NDArray[np.int64]:
        assert sampler.bound
        return self.share[:size]


def silent(length: int) -> Fixed:
    return Fixed(np.zeros(length, np.int64))


def total_of(found: FixedPoint, vectors: list[NDArray[np.unsignedinteger]]) -> NDArray[np.float64]:
    """What the server does: adds modulo 2^bits and decodes."""
    return found.decode(np.add.reduce(vectors, dtype=found.dtype))


# Overflow is impossible, and the sum is exact.

encodings = st.builds(
    lambda sites, length, batch, norm, rate, target: fixed_point(
        plan(
            sites, training__expected_batch=batch, privacy__clipping_norm=norm,
            training__sample_rate=rate, privacy__epsilon=target,
        ),
        length,
    ),
    st.sampled_from([3, 16, 100]), st.sampled_from([1, 1_000, 300_000, 1_000_000]),
    st.sampled_from([1.0, 8.0, 256.0]), st.sampled_from([1e-3, 1.0, 1e3]),
    st.sampled_from([0.5, 1.0]), st.sampled_from([1.0, 8.0]),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(encodings, st.data())
def test_the_sum_is_exact_at_the_extremes(found: FixedPoint, data: st.DataObject) -> None:
    """Any mix of sites at the clamp, beyond it, and at the last entry of the noise table."""
    ends = [0.0, -1.0, 1.0, 1.5, -1e30, 1e30, 0.3]
    short = replace(found, length=1)
    values, shares, vectors = [], [], []
    for _ in range(data.draw(st.integers(0, found.sites))):
        value = data.draw(st.sampled_from(ends)) * found.limit
        share = data.draw(st.sampled_from([-1, 0, 1])) * short.share.bound
        values.append(np.clip(value, -found.limit, found.limit))
        shares.append(share)
        noise = Fixed(np.array([share]))
        vectors.append(FixedPoint.encode(short, np.array([value]), noise))
    whole = sum(round(v * found.scale) + s for v, s in zip(values, shares, strict=True))
    assert abs(whole) < 2 ** (found.bits - 1)
    assert abs(whole) < 2**53
    if vectors:
        decoded = total_of(short, vectors)
        assert decoded.tolist() == [whole / found.scale]


@settings(max_examples=60, deadline=None)
@given(encodings)
def test_all_sites_at_their_worst_fit(found: FixedPoint) -> None:
    each = math.ceil(found.limit * found.scale) + found.share.bound
    assert found.sites * each < 2 ** (min(found.bits, 53) - 1)
    assert found.scale == 2.0 ** round(math.log2(found.scale))
    assert found.share.std >= LEAST_SHARE
    assert math.sqrt(found.length) / found.scale <= MOST_ROUNDING * found.clipping_norm
    doubled = replace(found, scale=2 * found.scale)
    assert not doubled.fits  # no precision is given away


# What rounding and clamping do to the sensitivity.

vectors = st.lists(st.floats(-40, 40), min_size=1, max_size=12)


@settings(max_examples=300)
@given(vectors, vectors, st.floats(0, 1), st.sampled_from([1.0, 4.0, 2.0**10]))
def test_a_unit_moves_the_integers_by_no_more_than_the_sensitivity(
    start: list[float], direction: list[float], length: float, scale: float
) -> None:
    """A step of norm at most C moves what is sent by at most scale * sensitivity, also clamped."""
    size = min(len(start), len(direction))
    x, g = np.array(start[:size]), np.array(direction[:size])
    found = FixedPoint(64, size, 3, 3, scale, 30.0, 1.0, 1.0)
    norm = np.linalg.norm(g)
    g = g * (length / norm) if norm > 0 else g
    before, after = (found.encode(v, silent(size)).view(np.int64) for v in (x, x + g))
    moved = np.linalg.norm((after - before).astype(float))
    assert moved <= scale * found.sensitivity + 1e-9
    assert found.sensitivity == 1 + math.sqrt(size) / scale


def test_the_rounding_term_is_needed() -> None:
    """A tiny step over the middle between integers moves every value by one."""
    size, tiny = 900, 1e-9
    found = FixedPoint(64, size, 3, 3, 1.0, 30.0, 1.0, 1.0)
    x = np.full(size, 0.5 - tiny)
    before, after = (found.encode(v, silent(size)).view(np.int64) for v in (x, x + 2 * tiny))
    assert np.linalg.norm((after - before).astype(float)) == math.sqrt(size)
    assert math.sqrt(size) <= found.sensitivity * found.scale


# The noise is what the account says, and a little more.


@pytest.mark.parametrize(("dropouts", "colluders"), [(0, 0), (2, 3)])
def test_h_shares_make_the_noise_of_the_account(dropouts: int, colluders: int) -> None:
    changed = plan(privacy__tolerated_dropouts=dropouts, privacy__tolerated_colluders=colluders)
    found = fixed_point(changed, 1440)
    step = step_noise(changed, 40, "north")
    assert step.event is not None
    assert found.noise_multiplier == step.event.noise_multiplier
    assert found.shares == 16 - dropouts - colluders
    wanted = found.noise_multiplier * found.sensitivity * found.scale
    assert found.shares * found.share.std**2 == pytest.approx(wanted**2 + 9, rel=1e-12)
    assert found.ratio >= found.noise_multiplier
    size = 60_000
    source = NoiseSource.for_simulation("h shares", dropouts)
    wide = replace(found, length=size)  # the same noise on more values
    sent = [source.discrete_gaussian(size, found.share) / found.scale for _ in range(found.shares)]
    summed = np.sum(sent, axis=0)
    assert summed.var() / found.sum_std**2 == pytest.approx(1, abs=4 * math.sqrt(2 / size))
    assert stats.kstest(summed, "norm", args=(0, found.sum_std)).pvalue > 0.01
    assert wide.dtype == found.dtype


def test_the_head_has_the_noise_of_the_joint_sensitivity() -> None:
    """A head with sigma C alone would fall short: the pair moves by C + sqrt(L) / s."""
    step, found = step_noise(plan(), 40, "north"), fixed_point(plan(), 1440)
    assert step.head_std >= found.noise_multiplier * found.sensitivity
    summed = step_noise(plan(privacy__secure_aggregation="summed"), 40, "north")
    assert step.head_std == pytest.approx(summed.head_std * (1 + MOST_ROUNDING), rel=1e-6)


REALISTIC = [
    (length, sites, batch, rate, target)
    for length, sites, batch in product((10**3, 10**5, 10**6), (3, 16, 100), (8, 64, 256))
    for rate, target in ((0.05, 8.0), (0.5, 1.0), (1.0, 8.0))
]


def test_realistic_plans_pay_for_rounding_with_a_fifth_of_a_percent_of_noise() -> None:
    overheads = []
    for length, sites, batch, rate, target in REALISTIC:
        changed = plan(
            sites, training__expected_batch=batch, training__sample_rate=rate,
            privacy__epsilon=target,
        )  # fmt: skip
        found = fixed_point(changed, length)
        overheads.append(found.overhead)
        assert found.overhead == pytest.approx(
            math.sqrt(length) / (found.scale * found.clipping_norm), rel=0.01, abs=1e-9
        )
    assert min(overheads) > 0
    assert 0.001 < max(overheads) <= 1.001 * MOST_ROUNDING


@pytest.mark.parametrize(
    ("rate", "target", "rounds"), [(0.05, 8.0, 60), (0.5, 1.0, 60), (1.0, 8.0, 60), (0.1, 4.0, 600)]
)
def test_that_is_less_than_one_percent_of_epsilon(rate: float, target: float, rounds: int) -> None:
    """The same noise around real numbers would have sensitivity C: compare the two epsilons."""
    changed = plan(training__sample_rate=rate, privacy__epsilon=target, rounds__count=rounds)
    event = step_noise(changed, 40, "north").event
    assert event is not None
    worst = SamplingEvent(rate, event.noise_multiplier * (1 + 1.001 * MOST_ROUNDING), rounds)
    discrete, continuous = epsilon([event], 1e-5), epsilon([worst], 1e-5)
    assert continuous < discrete <= 1.01 * continuous
    assert 0.99 * target <= discrete <= target


def test_32_bits_are_the_default_and_64_where_they_do_not_do() -> None:
    assert fixed_point(plan(), 1440).bits == 32
    assert fixed_point(plan(48, training__expected_batch=64), 100_000).bits == 32
    wide = fixed_point(plan(100, training__expected_batch=256), 1_000_000)
    assert (wide.bits, wide.dtype) == (64, np.dtype(np.uint64))
    assert wide.overhead < 1e-6


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PlanError, match=r"sum of 1000000000 values fits into 53 bits"):
        fixed_point(plan(100_000, training__expected_batch=1e9), 10**9)


def test_delta_pays_for_the_ends_of_the_tables() -> None:
    found = fixed_point(plan(100), 1_000_000)
    cost = 60 * found.failure * (1 + math.exp(8))
    assert 0 < cost < RESERVED * 1e-5 * 1e-20
    with pytest.raises(PlanError, match=r"privacy\.epsilon: found 90\.0; .*at most [67]\d"):
        fixed_point(plan(100, privacy__epsilon=90.0, training__sample_rate=0.9), 1_000_000)


def test_a_millionth_of_delta_is_set_aside() -> None:
    secure, summed = plan(), plan(privacy__secure_aggregation="summed")
    events = [step_noise(p, 40, "north").event for p in (secure, summed)]
    assert events[0] is not None and events[1] is not None
    assert 1 <= events[0].noise_multiplier / events[1].noise_multiplier < 1 + 1e-5
    assert epsilon([events[0]], 1e-5 * (1 - RESERVED)) <= 8


# A whole sum.


def test_decoded_sum_is_the_sum_of_the_clipped_gradients_plus_noise() -> None:
    found, generator = fixed_point(plan(), 1440), np.random.default_rng(0)
    sums = [generator.normal(0, 0.3, 1440).astype(np.float32) for _ in range(16)]
    sources = [NoiseSource.for_simulation("whole", site) for site in range(16)]
    again = [NoiseSource.for_simulation("whole", site) for site in range(16)]
    vectors = [found.encode(x, source) for x, source in zip(sums, sources, strict=True)]
    assert all(v.dtype == np.uint32 and v.shape == (1440,) for v in vectors)
    shares = [source.discrete_gaussian(1440, found.share) for source in again]
    decoded = total_of(found, vectors)
    expected = np.sum(sums, axis=0, dtype=np.float64) + np.sum(shares, axis=0) / found.scale
    np.testing.assert_allclose(decoded, expected, atol=16 / 2 / found.scale)
    missing = total_of(found, vectors[:13])
    expected -= np.sum(sums[13:], axis=0, dtype=np.float64)
    expected -= np.sum(shares[13:], axis=0) / found.scale
    np.testing.assert_allclose(missing, expected, atol=13 / 2 / found.scale)


def test_bad_sums_never_leave() -> None:
    found = replace(fixed_point(plan(), 1440), length=3)
    with pytest.raises(PrivacyError, match=r"gradient sum: found 'NaN'.*Nothing left the site"):
        found.encode(np.array([1.0, math.nan, 0.0]), silent(3))
    with pytest.raises(PrivacyError, match=r"gradient sum: found 'shape \(2,\)'"):
        found.encode(np.zeros(2), silent(3))
    beyond = Fixed(np.array([0, -found.share.bound - 1, 0]))
    with pytest.raises(PrivacyError, match="noise share: found 'a sample out of bounds'"):
        found.encode(np.zeros(3), beyond)
    with pytest.raises(PrivacyError, match="noise share"):
        found.encode(np.zeros(3), silent(2))
    infinite = found.encode(np.array([math.inf, -math.inf, 0.0]), silent(3))
    ends = [found.limit, -found.limit, 0.0]
    assert found.decode(infinite).tolist() == pytest.approx(ends, abs=1 / found.scale)


@pytest.mark.parametrize("total", [np.zeros(3, np.uint64), np.zeros(4, np.uint32)])
def test_bad_totals_are_refused(total: NDArray[np.unsignedinteger]) -> None:
    found = replace(fixed_point(plan(), 1440), length=3)
    with pytest.raises(PrivacyError, match=r"sum: found .*uint32\(3,\)"):
        found.decode(total)
