from __future__ import annotations

import math

import pytest

from fedgraft_common.accounting import SamplingEvent, epsilon
from fedgraft_common.errors import PrivacyError
from fedgraft_common.mechanism import MOST_ROUNDING, sample_rate, step_noise
from fedgraft_common.plan import Plan


def plan(**changes: object) -> Plan:
    """Small, and quick to calibrate; `a__b=1` changes a.b."""
    few = {"rounds.count": 20, "training.expected_batch": 20, "privacy.clipping_norm": 0.5}
    return Plan().replace(few | {key.replace("__", "."): v for key, v in changes.items()})


def distributed(sites: int = 16, **changes: object) -> Plan:
    return plan(
        privacy__mechanism="distributed",
        training__sample_rate=0.25,
        aggregation__sites=sites,
        **changes,
    )


def test_rate_is_expected_batch_over_the_declared_size() -> None:
    assert sample_rate(plan(), 80, "north") == 0.25
    assert sample_rate(plan(training__sample_rate=0.5), 80, "north") == 0.5


def test_rate_of_one_is_allowed() -> None:
    assert sample_rate(plan(), 20, "north") == 1.0


def test_batch_larger_than_the_site() -> None:
    with pytest.raises(PrivacyError) as caught:
        sample_rate(plan(), 19, "north")
    assert caught.value.field == "training.expected_batch"
    assert caught.value.value == 20.0
    assert "at most 19, the units that site north declares" in str(caught.value)


@pytest.mark.parametrize("mechanism", ["local", "distributed"])
@pytest.mark.parametrize(("delta", "fine"), [(1 / 80, False), (0.1, False), (1 / 81, True)])
def test_delta_is_below_one_over_the_units(mechanism: str, delta: float, fine: bool) -> None:
    changed = distributed(privacy__delta=delta).replace({"privacy.mechanism": mechanism})
    if fine:
        assert sample_rate(changed, 80, "north") == 0.25
        return
    with pytest.raises(PrivacyError, match=r"privacy\.delta: found .*less than 1/80.*site north"):
        step_noise(changed, 80, "north")


def test_delta_does_not_matter_without_a_promise() -> None:
    assert sample_rate(plan(privacy__mechanism="none", privacy__delta=0.9), 80, "north") == 0.25


@pytest.mark.parametrize("target", [0.5, 2.0, 8.0])
def test_local_promise_is_kept_and_used(target: float) -> None:
    step = step_noise(plan(privacy__epsilon=target), 80, "north")
    assert step.event is not None
    assert (step.event.sample_rate, step.event.steps) == (0.25, 20)
    assert step.adapter_std == step.head_std == step.event.noise_multiplier * 0.5
    spent = epsilon([step.event], 1e-5)
    assert 0.99 * target <= spent <= target
    assert step.epsilon(1e-5) == spent


def test_each_site_has_its_own_noise_under_the_local_mechanism() -> None:
    small, large = (step_noise(plan(), size, "north") for size in (40, 400))
    assert (small.sample_rate, large.sample_rate) == (0.5, 0.05)
    assert small.adapter_std > 2 * large.adapter_std


def test_local_noise_counts_local_steps() -> None:
    step = step_noise(plan(training__local_steps=3), 80, "north")
    assert step.event is not None
    assert step.event.steps == 60
    assert 0.99 * 8 <= epsilon([SamplingEvent(0.25, step.event.noise_multiplier, 60)], 1e-5) <= 8


@pytest.mark.parametrize(("dropouts", "colluders", "shares"), [(0, 0, 16), (1, 0, 15), (2, 5, 9)])
def test_distributed_adapter_gets_a_share_and_the_head_everything(
    dropouts: int, colluders: int, shares: int
) -> None:
    changed = distributed(
        privacy__tolerated_dropouts=dropouts, privacy__tolerated_colluders=colluders
    )
    step = step_noise(changed, 80, "north")
    assert step.event is not None
    full = step.event.noise_multiplier * 0.5 * (1 + MOST_ROUNDING)  # see fixed_point
    assert step.head_std == full
    summed = step_noise(changed.replace({"privacy.secure_aggregation": "summed"}), 80, "north")
    assert summed.head_std == pytest.approx(full / (1 + MOST_ROUNDING), rel=1e-5)
    assert step.adapter_std == pytest.approx(full / math.sqrt(shares), rel=1e-12)
    assert shares * step.adapter_std**2 == pytest.approx(full**2)  # what the sum holds at least
    assert 0.99 * 8 <= step.epsilon(1e-5) <= 8


def test_distributed_noise_is_the_same_everywhere() -> None:
    assert step_noise(distributed(), 80, "north") == step_noise(distributed(), 5000, "south")


def test_no_mechanism_promises_nothing() -> None:
    step = step_noise(plan(privacy__mechanism="none"), 80, "north")
    assert (step.adapter_std, step.head_std, step.event) == (0.0, 0.0, None)
    assert step.clipping_norm == math.inf
    assert step.epsilon(1e-5) == math.inf


def test_epsilon_grows_with_the_steps_taken() -> None:
    step = step_noise(plan(), 80, "north")
    spent = [step.epsilon(1e-5, steps) for steps in (0, 1, 10, 20)]
    assert spent[0] == 0.0
    assert spent == sorted(set(spent))
    assert spent[-1] == step.epsilon(1e-5)


@pytest.mark.parametrize("size", [0, -5])
def test_declared_size_is_a_number_of_units(size: int) -> None:
    with pytest.raises(PrivacyError, match="north"):
        step_noise(plan(), size, "north")
