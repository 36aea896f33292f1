from __future__ import annotations

import math
import subprocess
import sys

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fedgraft_common import accounting
from fedgraft_common.accounting import (
    NOISE_RANGE,
    Accountant,
    SamplingEvent,
    calibrate_noise_multiplier,
    epsilon,
    epsilon_bound,
    fits,
)
from fedgraft_common.errors import PrivacyError

MNIST = 256 / 60000

# PRIVACY.md, "Accounting": delta 1e-5, dp-accounting 0.6.0 and opacus 1.6.0. One cell differs:
# PRIVACY.md gives PRV 6.77740 for (0.04, 1.5, 2250), which is opacus' value for T = 2249.
GOLDEN = [
    ([SamplingEvent(0.01, 4, 10000)], "0.94700", "0.95694", "1.03549"),
    ([SamplingEvent(0.01, 1, 1000)], "1.82824", "1.83837", "2.10137"),
    ([SamplingEvent(0.04, 1.5, 2250)], "6.76879", "6.77913", "7.32911"),
    ([SamplingEvent(0.04, 0.8, 500)], "9.49253", "9.50311", "10.59415"),
    ([SamplingEvent(MNIST, 1.1, 14100)], "2.38521", "2.39527", "2.60034"),
    ([SamplingEvent(MNIST, 0.5, 234)], "5.02617", "5.03671", "6.34566"),
    ([SamplingEvent(0.25, 2, 100)], "6.44915", "6.45951", "7.03344"),
    ([SamplingEvent(1, 20, 100)], "1.99309", "2.00321", "2.16572"),
    (
        [
            SamplingEvent(0.05, 1.5, 100),
            SamplingEvent(0.1, 2, 200),
            SamplingEvent(0.02, 1, 300),
        ],
        "4.3935",
        "4.4037",
        "4.8079",
    ),
]


def to_digits(value: float, golden: str) -> str:
    return f"{value:.{len(golden.partition('.')[2])}f}"


@pytest.mark.parametrize(("events", "pld", "prv", "rdp"), GOLDEN)
def test_golden_table(events: list[SamplingEvent], pld: str, prv: str, rdp: str) -> None:
    decides, checks, bounds = (epsilon(events, 1e-5, name) for name in ("pld", "prv", "rdp"))
    assert to_digits(decides, pld) == pld
    assert to_digits(checks, prv) == prv
    assert to_digits(bounds, rdp) == rdp
    assert abs(checks - decides) <= 0.011
    assert decides <= bounds


def test_golden_sentences() -> None:
    assert to_digits(epsilon([SamplingEvent(1, 1, 1)], 1e-5), "4.377178") == "4.377178"
    assert epsilon([SamplingEvent(1, 3.730632, 1)], 1e-5) == pytest.approx(1, abs=1e-6)
    once = SamplingEvent(0.25, 2, 100)
    replayed = SamplingEvent(0.25, 2, 10)
    assert to_digits(epsilon([once, replayed], 1e-5), "6.799") == "6.799"
    assert to_digits(epsilon([SamplingEvent(0.05, 2, 200)], 1e-5), "1.56") == "1.56"


@pytest.mark.parametrize("events", [row[0] for row in GOLDEN])
def test_against_pld_accountant(events: list[SamplingEvent]) -> None:
    accountant = PLDAccountant()
    for event in events:
        step = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        if event.sample_rate < 1:
            step = dp_accounting.PoissonSampledDpEvent(event.sample_rate, step)
        accountant.compose(step, event.steps)
    assert epsilon(events, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-9)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0, 20.0])
def test_against_the_closed_form_of_the_gaussian_mechanism(sigma: float) -> None:
    # Balle and Wang 2018, theorem 8: an upper bound, and a tight one.
    eps = epsilon([SamplingEvent(1, sigma, 1)], 1e-5)
    below, above = (
        norm.cdf(0.5 / sigma - e * sigma) - math.exp(e) * norm.cdf(-0.5 / sigma - e * sigma)
        for e in (eps, eps - 1e-3)
    )
    assert below <= 1e-5 * (1 + 1e-6) < above


def test_no_events_and_negligible_events_cost_nothing() -> None:
    assert epsilon([], 1e-5) == 0
    for accountant in ("pld", "prv", "rdp"):
        assert 0 <= epsilon([SamplingEvent(0.001, 50, 1)], 1e-2, accountant) < 0.05


def test_order_and_bookkeeping_of_equal_events_do_not_matter() -> None:
    a, b = SamplingEvent(0.1, 2, 30), SamplingEvent(0.2, 3, 50)
    assert epsilon([a, b], 1e-5) == pytest.approx(epsilon([b, a], 1e-5), abs=1e-9)
    half = SamplingEvent(0.1, 2, 15)
    assert epsilon([half, b, half], 1e-5) == pytest.approx(epsilon([a, b], 1e-5), abs=1e-9)


def test_a_long_history_does_not_exhaust_the_stack() -> None:
    history = [SamplingEvent(0.001, 40 + 0.01 * i, 1) for i in range(1200)]
    assert 0 < epsilon(history, 1e-5) < epsilon([SamplingEvent(0.001, 40, 1200)], 1e-5)


def test_a_dry_run_after_a_long_history_composes_only_what_is_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    history = [SamplingEvent(0.05 + 0.01 * i, 6 + 0.1 * i, 30) for i in range(20)]
    composed: list[SamplingEvent] = []
    steps = accounting._steps_pld

    def note(event: SamplingEvent, interval: float) -> object:
        composed.append(event)
        return steps(event, interval)

    monkeypatch.setattr(accounting, "_steps_pld", note)
    spent = epsilon(history, 1e-5)
    assert composed.count(history[0]) <= 1
    composed.clear()
    new = SamplingEvent(0.3, 5, 10)
    assert epsilon([*history, new], 1e-5) > spent
    assert composed == [new, history[-1]]


def test_a_long_run_keeps_its_history_and_not_every_round() -> None:
    """A site asks in each round, for months; a composed distribution takes megabytes."""
    accounting._composed_prefix.cache_clear()
    earlier = SamplingEvent(0.5, 9.0, 60)
    for rounds in range(1, 13):
        epsilon_bound([earlier, SamplingEvent(0.5, 8.0, rounds)], 1e-5)
    assert accounting._composed_prefix.cache_info().currsize == 1


def test_a_long_run_is_composed_a_few_times_and_refused_at_the_right_step() -> None:
    limit = epsilon_bound([SamplingEvent(0.5, 8.0, 300)], 1e-5)
    accounting._bound.cache_clear()
    for rounds in range(1, 257):
        assert fits([SamplingEvent(0.5, 8.0, rounds)], 1e-5, limit)
    assert accounting._bound.cache_info().misses == 9  # 1, 2, 4 ... 256
    last = max(n for n in range(300, 310) if epsilon([SamplingEvent(0.5, 8.0, n)], 1e-5) <= limit)
    assert last < 309
    assert fits([SamplingEvent(0.5, 8.0, last)], 1e-5, limit)
    assert not fits([SamplingEvent(0.5, 8.0, last + 1)], 1e-5, limit)
    assert fits([], 1e-5, limit)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    q=st.floats(0.01, 0.9),
    sigma=st.floats(0.9, 5),
    steps=st.integers(1, 300),
    delta=st.sampled_from([1e-6, 1e-5, 1e-4]),
)
def test_monotonicity(q: float, sigma: float, steps: int, delta: float) -> None:
    eps = epsilon([SamplingEvent(q, sigma, steps)], delta)
    slack = 1e-9  # A floating-point sum, not a privacy loss.
    assert epsilon([SamplingEvent(q, sigma * 1.2, steps)], delta) <= eps + slack
    assert epsilon([SamplingEvent(q, sigma, steps + 10)], delta) >= eps - slack
    assert epsilon([SamplingEvent(q * 1.1, sigma, steps)], delta) >= eps - slack
    assert epsilon([SamplingEvent(q, sigma, steps)], delta * 2) <= eps + slack
    assert eps <= epsilon([SamplingEvent(q, sigma, steps)], delta, "rdp") + 1e-3


@pytest.mark.parametrize(
    ("target", "delta", "q", "steps", "prior"),
    [
        (8.0, 1e-4, 0.5, 60, ()),
        (2.0, 1e-4, 0.5, 60, ()),
        (1.0, 1e-5, 1.0, 1, ()),
        (6.449, 1e-5, 0.25, 100, ()),
        (5.0, 1e-5, MNIST, 234, ()),
        (0.95, 1e-5, 0.01, 10000, ()),
        (0.1, 1e-5, 0.01, 1000, ()),
        (30.0, 1e-6, 0.25, 100, ()),
        (8.0, 1e-5, 0.25, 60, (SamplingEvent(0.1, 2, 200), SamplingEvent(0.05, 1.5, 100))),
        (4.2, 1e-5, 0.25, 60, (SamplingEvent(0.1, 2, 200), SamplingEvent(0.05, 1.5, 100))),
        # So little is left that the coarse grid sees none, and only the exact one does.
        (6.4492, 1e-5, 0.5, 10, (SamplingEvent(0.25, 2, 100),)),
    ],
)
def test_calibration_comes_within_one_percent_and_never_overshoots(
    target: float, delta: float, q: float, steps: int, prior: tuple[SamplingEvent, ...]
) -> None:
    sigma = calibrate_noise_multiplier(target, delta, q, steps, prior=prior)
    reached = epsilon([*prior, SamplingEvent(q, sigma, steps)], delta)
    assert 0.99 * target <= reached <= target


@settings(max_examples=8, deadline=None, derandomize=True)
@given(target=st.floats(0.3, 12), q=st.floats(0.05, 1), steps=st.integers(5, 1000))
def test_calibration_of_random_targets(target: float, q: float, steps: int) -> None:
    sigma = calibrate_noise_multiplier(target, 1e-5, q, steps)
    assert 0.99 * target <= epsilon([SamplingEvent(q, sigma, steps)], 1e-5) <= target


def test_calibration_reproduces_the_exact_single_gaussian() -> None:
    assert calibrate_noise_multiplier(1, 1e-5, 1, 1) == pytest.approx(3.730632, rel=1e-3)
    assert calibrate_noise_multiplier(1, 1e-5, 1, 1) >= 3.730632


def test_calibration_stops_at_the_least_noise() -> None:
    least = NOISE_RANGE[0]
    sigma = calibrate_noise_multiplier(8, 1e-5, 1e-4, 1)  # Almost nobody is ever sampled.
    assert least <= sigma < 1.01 * least
    assert epsilon([SamplingEvent(1e-4, sigma, 1)], 1e-5) <= 8


def test_calibration_searches_on_a_coarse_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each site has a rate of its own, so each is calibrated; the exact grid is the slow one."""
    intervals: list[float] = []

    def noted(event: SamplingEvent, interval: float) -> object:
        intervals.append(interval)
        return steps_pld(event, interval)

    steps_pld = accounting._steps_pld
    monkeypatch.setattr(accounting, "_steps_pld", noted)
    calibrate_noise_multiplier(8, 1e-5, 40 / 83, 60)
    assert intervals.count(accounting.EXACT_INTERVAL) == 1
    assert 3 < len(intervals) < 30


@pytest.mark.parametrize("q", [0, -0.1, 1.1, math.nan])
def test_bad_sample_rate(q: float) -> None:
    with pytest.raises(PrivacyError, match=r"sample_rate: found .*; allowed: .*0 < q <= 1"):
        SamplingEvent(q, 1, 1)


@pytest.mark.parametrize("sigma", [0, -1, math.nan, math.inf])
def test_bad_noise_multiplier(sigma: float) -> None:
    with pytest.raises(PrivacyError, match=r"noise_multiplier: found .*calibrate_noise_multipl"):
        SamplingEvent(0.5, sigma, 1)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, math.nan])
def test_bad_steps(steps: int) -> None:
    with pytest.raises(PrivacyError, match=r"steps: found .*whole number of at least 1"):
        SamplingEvent(0.5, 1, steps)


@pytest.mark.parametrize("delta", [0, 1, -1e-5, math.nan])
def test_bad_delta(delta: float) -> None:
    with pytest.raises(PrivacyError, match=r"delta: found .*below 1 / \(number of units\)"):
        epsilon([], delta)
    with pytest.raises(PrivacyError, match="delta: found"):
        calibrate_noise_multiplier(1, delta, 0.5, 1)


def test_unknown_accountant() -> None:
    accountant: Accountant = "gdp"  # type: ignore[assignment]
    with pytest.raises(PrivacyError, match="accountant: found 'gdp'; allowed: pld, prv, rdp"):
        epsilon([], 1e-5, accountant)


@pytest.mark.parametrize("target", [0, -1, math.nan, math.inf])
def test_bad_target(target: float) -> None:
    with pytest.raises(PrivacyError, match=r"target_epsilon: found .*finite number above 0"):
        calibrate_noise_multiplier(target, 1e-5, 0.5, 1)


def test_target_already_spent_and_target_beyond_the_noise_range() -> None:
    prior = (SamplingEvent(0.25, 2, 100),)
    with pytest.raises(PrivacyError, match=r"more than the 6\.4492 that earlier events have spent"):
        calibrate_noise_multiplier(6, 1e-5, 0.5, 1, prior=prior)
    with pytest.raises(PrivacyError, match="noise_multiplier <= 10000 can meet"):
        calibrate_noise_multiplier(0.001, 1e-6, 1, 5000)


def test_importing_does_not_load_the_accountants() -> None:
    script = (
        "import sys, fedgraft_common.accounting\n"
        "print([m for m in ('numpy', 'scipy', 'torch', 'opacus', 'dp_accounting')"
        " if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "[]"
