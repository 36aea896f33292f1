"""What a site's data set has spent in its lifetime, and whether a plan or a round fits.

Epsilon is composed over all events of all runs on the data set (never added up), at the policy's
delta for the lifetime and at the plan's delta for the run. The dry run before a reservation asks
the same question that the reservation will be held to. Neighbouring relation: add or remove one
unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedgraft_client.policy import Policy
from fedgraft_common.accounting import SamplingEvent, affordable_steps, epsilon, fits
from fedgraft_common.errors import BudgetError
from fedgraft_common.plan import Plan


@dataclass(frozen=True, slots=True)
class Cost:
    """What joining a run would cost.

    Attributes:
        before: lifetime epsilon now.
        run: epsilon of the whole run alone, at the plan's delta.
        after: lifetime epsilon after the whole run.
        rounds: how many of its rounds the budget pays.
        asked: how many it has.
    """

    before: float
    run: float
    after: float
    rounds: int
    asked: int


def cost(
    policy: Policy, plan: Plan, whole: Sequence[SamplingEvent], spent: Sequence[SamplingEvent]
) -> Cost:
    """What a run that has not begun would cost.

    Args:
        policy: holds the limits.
        plan: the run.
        whole: what all its rounds charge: training first, then released evaluations if any.
        spent: the ledger's events so far.

    Raises:
        PrivacyError: the events cannot be accounted.
    """
    delta = policy.maximum_delta
    return Cost(
        before=epsilon(spent, delta),
        run=epsilon(whole, plan.privacy.delta),
        after=epsilon([*spent, *whole], delta),
        rounds=affordable_rounds(policy, plan, whole, spent, []),
        asked=plan.rounds.count,
    )


def affordable_rounds(
    policy: Policy,
    plan: Plan,
    whole: Sequence[SamplingEvent],
    spent: Sequence[SamplingEvent],
    run: Sequence[SamplingEvent],
    left: int | None = None,
) -> int:
    """How many further rounds of a plan both limits allow.

    Args:
        policy: holds the limits.
        plan: the run.
        whole: what all its rounds charge: training first, then released evaluations, whose whole
            cost is set aside.
        spent: the ledger's events so far, this run's included.
        run: this run's events so far.
        left: rounds that are left; default: all.
    """
    count = plan.rounds.count if left is None else left
    if count == 0:
        return 0
    training, *others = whole
    per_round = plan.training.local_steps
    event = SamplingEvent(training.sample_rate, training.noise_multiplier, count * per_round)
    steps = affordable_steps([*others, *spent], event, policy.maximum_delta, policy.maximum_epsilon)
    if policy.maximum_run_epsilon is not None:
        limit = policy.maximum_run_epsilon
        within = affordable_steps([*others, *run], event, plan.privacy.delta, limit)
        steps = min(steps, within)
    return steps // per_round


def check_affordable(
    policy: Policy,
    delta: float,
    event: SamplingEvent,
    spent: Sequence[SamplingEvent],
    run: Sequence[SamplingEvent],
) -> None:
    """The dry run before a reservation.

    Args:
        policy: holds the limits.
        delta: the plan's.
        event: what is about to be reserved.
        spent: the ledger's events so far, this run's included.
        run: this run's events so far.

    Raises:
        BudgetError: a limit would be passed.
    """
    limit = policy.maximum_epsilon
    if not fits([*spent, event], policy.maximum_delta, limit):
        after = epsilon([*spent, event], policy.maximum_delta)
        raise BudgetError(
            "lifetime epsilon", round(after, 4), f"at most {limit:g} (policy.maximum_epsilon)",
            "The site leaves the run here; nothing was computed. Use other data, or decide anew "
            "how much this data may spend.",
        )  # fmt: skip
    limit = policy.maximum_run_epsilon or 0.0
    if limit and not fits([*run, event], delta, limit):
        after = epsilon([*run, event], delta)
        raise BudgetError(
            "epsilon of this run", round(after, 4),
            f"at most {limit:g} (policy.maximum_run_epsilon)",
            "The site leaves the run here; nothing was computed.",
        )  # fmt: skip
