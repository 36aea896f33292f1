"""The last affordable round is known before the first, and agrees with the dry run at each."""

from __future__ import annotations

from typing import Any

import pytest

from fedgraft_client.budget import affordable_rounds, check_affordable, cost
from fedgraft_client.policy import Policy
from fedgraft_common.accounting import SamplingEvent, epsilon
from fedgraft_common.errors import BudgetError
from fedgraft_common.plan import Plan

WHOLE = SamplingEvent(0.25, 2.0, 100)  # epsilon 6.449 at delta 1e-5 (PRIVACY.md)
PLAN = Plan().replace({"rounds.count": 100})


def test_what_a_run_costs() -> None:
    found = cost(Policy(), PLAN, [WHOLE], [])
    assert (found.before, found.rounds, found.asked) == (0.0, 100, 100)
    assert found.run == found.after == pytest.approx(6.44915, abs=1e-5)


def test_runs_compose_and_do_not_add_up() -> None:
    first = cost(Policy(maximum_epsilon=20), PLAN, [WHOLE], [])
    second = cost(Policy(maximum_epsilon=20), PLAN, [WHOLE], [WHOLE])
    assert second.before == first.after
    assert second.after == pytest.approx(epsilon([SamplingEvent(0.25, 2.0, 200)], 1e-5))
    assert second.after < 2 * first.after


@pytest.mark.parametrize(
    ("limits", "spent", "local_steps"),
    [
        ({"maximum_epsilon": 3.0}, [], 1),
        ({"maximum_epsilon": 7.0}, [SamplingEvent(0.1, 1.5, 50)], 1),
        ({"maximum_epsilon": 7.0}, [], 7),
        ({"maximum_epsilon": 8.0, "maximum_run_epsilon": 2.0}, [SamplingEvent(0.1, 3, 9)], 1),
    ],
)
def test_the_last_affordable_round(
    limits: dict[str, Any], spent: list[SamplingEvent], local_steps: int
) -> None:
    policy = Policy(**limits)
    plan = PLAN.replace({"training.local_steps": local_steps})
    whole = SamplingEvent(0.25, 2.0, 100 * local_steps)
    rounds = affordable_rounds(policy, plan, [whole], spent, [])
    assert 0 < rounds < 100
    one = SamplingEvent(0.25, 2.0, local_steps)
    run = [SamplingEvent(0.25, 2.0, (rounds - 1) * local_steps)] if rounds > 1 else []
    check_affordable(policy, 1e-5, one, [*spent, *run], run)
    run = [SamplingEvent(0.25, 2.0, rounds * local_steps)]
    with pytest.raises(BudgetError, match="nothing was computed"):
        check_affordable(policy, 1e-5, one, [*spent, *run], run)


def test_a_budget_that_is_gone_pays_nothing() -> None:
    policy = Policy(maximum_epsilon=6.0)
    assert affordable_rounds(policy, PLAN, [WHOLE], [WHOLE], []) == 0
    with pytest.raises(BudgetError, match=r"lifetime epsilon: found 6\.4.*at most 6"):
        check_affordable(policy, 1e-5, SamplingEvent(0.25, 2.0, 1), [WHOLE], [])


def test_a_planned_evaluation_is_set_aside() -> None:
    policy = Policy(maximum_epsilon=6.5)
    assert affordable_rounds(policy, PLAN, [WHOLE], [], []) == 100
    assert affordable_rounds(policy, PLAN, [WHOLE, SamplingEvent(1.0, 3.0, 1)], [], []) < 100
