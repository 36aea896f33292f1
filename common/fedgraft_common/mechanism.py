"""From a plan's promise to the noise of one step.

Formal guarantee, add or remove one unit of one site, T = `plan.steps` Poisson-sampled Gaussian
steps of rate q with noise multiplier sigma, where sigma is calibrated so that the composition
stays within (epsilon, delta):

    local         adapter and head each get noise of standard deviation sigma * C. Every update
                  a site sends is post-processing of its own steps.
    distributed   the head, which stays at home, gets sigma * C; each site adds sigma * C / sqrt(h)
                  to its adapter sum. Whoever sees only the sum over sites sees noise of at least
                  sigma * C from the h sites that neither dropped out nor collude, so one unit's
                  joint contribution of norm at most C passes one Gaussian mechanism. q must be the
                  same everywhere: shares add up to sigma * C only if all sites agree on sigma.
                  Under secure aggregation the sums are integers and the adapter's noise is
                  discrete. Rounding enlarges the sensitivity, so all noise is enlarged with it, and
                  sigma stays the ratio of the two (`fixed_point` has the proof).

A unit is a record, or all records of the site that share a value of `privacy.unit`; units are what
is sampled, clipped and counted, so none of the above depends on how many records a unit has.

What is public: C, q, T, sigma, h, the unit, the cap on its records in a step, the nominal size a
site declares. Sources: PRIVACY.md; proofs in `deploy/decisions/0004-sensitivity-and-neighbours.md`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from fedgraft_common.accounting import SamplingEvent, calibrate_noise_multiplier, epsilon
from fedgraft_common.errors import PrivacyError
from fedgraft_common.plan import Plan

MOST_ROUNDING: Final = 0.002
"""Share of C by which rounding a sum to integers may enlarge its sensitivity."""
RESERVED: Final = 1e-6
"""Share of delta set aside for the ends of the tables that integer noise is drawn from."""


@dataclass(frozen=True, slots=True)
class StepNoise:
    """What one DP-SGD step at one site uses.

    Attributes:
        sample_rate: q.
        clipping_norm: C, infinite without DP.
        adapter_std: standard deviation of the noise on each coordinate of the adapter sum; where
            sums are integers, `fixed_point` says what it is instead.
        head_std: the same for the head.
        event: what the site's account is charged for the steps of the whole run; None without
            DP.
        evaluation: what it is charged for the released evaluations; None if there are none.
        start: what it is charged for the class means that its head starts with; None if it does
            not.
    """

    sample_rate: float
    clipping_norm: float
    adapter_std: float
    head_std: float
    event: SamplingEvent | None
    evaluation: SamplingEvent | None = None
    start: SamplingEvent | None = None

    @property
    def events(self) -> list[SamplingEvent]:
        """What the site's account is charged for the whole run: training, then what else."""
        return [e for e in (self.event, self.evaluation, self.start) if e is not None]

    def epsilon(self, delta: float, steps: int | None = None) -> float:
        """Epsilon after `steps` steps and every other release (default: the whole run).

        Infinite without DP.
        """
        if self.event is None:
            return math.inf
        count = self.event.steps if steps is None else steps
        if count == 0:
            return 0.0
        event = SamplingEvent(self.event.sample_rate, self.event.noise_multiplier, count)
        return epsilon([event, *self.events[1:]], delta)


def against(plan: Plan) -> str:
    """Whom a distributed plan's promise holds against, for people."""
    colluders = plan.privacy.tolerated_colluders
    if colluders:
        some = "any one other site" if colluders == 1 else f"any {colluders} other sites"
        return f"the server and {some}, also if they work together"
    return (
        "the server only, and not the other sites: each knows its own noise share "
        "(privacy.tolerated_colluders = 0)"
    )


def sample_rate(plan: Plan, nominal_size: int, site: str) -> float:
    """Q = B / N, of public numbers only.

    Args:
        plan: holds q itself, or the expected batch B.
        nominal_size: N, the number of units the site declares in public.
        site: its name, for the error.

    Raises:
        PrivacyError: N is no count, B is larger than N, or 1/N does not exceed delta.
    """
    if nominal_size < 1:
        raise PrivacyError(
            f"site {site}: nominal size", nominal_size, "a whole number of at least 1",
            "Declare in public roughly how many units (privacy.unit) the site has.",
        )  # fmt: skip
    if plan.privacy.mechanism != "none" and plan.privacy.delta >= 1 / nominal_size:
        raise PrivacyError(
            "privacy.delta", plan.privacy.delta,
            f"less than 1/{nominal_size}, one over the units that site {site} declares",
            "Choose a smaller delta.",
        )  # fmt: skip
    if plan.training.sample_rate is not None:
        return plan.training.sample_rate
    rate = plan.training.expected_batch / nominal_size
    if rate > 1:
        raise PrivacyError(
            "training.expected_batch", plan.training.expected_batch,
            f"at most {nominal_size}, the units that site {site} declares (the sample rate "
            "expected_batch / nominal size is a probability)",
            "Lower expected_batch, set training.sample_rate, or leave the site out.",
        )  # fmt: skip
    return rate


def noise_multiplier(plan: Plan, rate: float) -> float:
    """Sigma of a step at sample rate q, calibrated to the plan's promise.

    Raises:
        PrivacyError: the promise cannot be met.
    """
    others = (_evaluation(plan), _start(plan))
    return calibrate_noise_multiplier(
        plan.privacy.epsilon,
        plan.privacy.delta * (1 - RESERVED if plan.secure else 1),
        rate,
        plan.steps,
        prior=[event for event in others if event],
    )


def _evaluation(plan: Plan) -> SamplingEvent | None:
    if not plan.evaluations:
        return None
    return SamplingEvent(1.0, plan.evaluation.noise_multiplier, plan.evaluations)


def _start(plan: Plan) -> SamplingEvent | None:
    if plan.head.training != "prototype":
        return None
    return SamplingEvent(1.0, plan.head.start_noise, 1)


def step_noise(plan: Plan, nominal_size: int, site: str) -> StepNoise:
    """Calibrates the noise of one site to the plan's promise.

    Raises:
        PrivacyError: the promise cannot be met with this sample rate and number of steps.
    """
    rate = sample_rate(plan, nominal_size, site)
    if plan.privacy.mechanism == "none":
        return StepNoise(rate, math.inf, 0.0, 0.0, None)
    sigma = noise_multiplier(plan, rate)
    evaluation = _evaluation(plan)
    rounding = MOST_ROUNDING if plan.secure else 0.0
    full = sigma * plan.privacy.clipping_norm * (1 + rounding)
    shares = plan.noise_shares if plan.privacy.mechanism == "distributed" else 1
    event = SamplingEvent(rate, sigma, plan.steps)
    adapter_std = full / math.sqrt(shares)
    norm = plan.privacy.clipping_norm
    return StepNoise(rate, norm, adapter_std, full, event, evaluation, _start(plan))
