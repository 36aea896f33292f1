"""Privacy accounting: an event is frozen data, the accountant is separate.

Neighbouring relation: add or remove one unit. PLD decides; PRV and RDP only check it. PLD and RDP
are upper bounds on epsilon up to rounding, PRV up to its own declared error of 0.01. Opacus'
Gaussian-DP accountant is missing on purpose: it is an approximation that under-reports.

Sources: PLD, Doroshenko et al. 2022 "Connect the dots" (`dp_accounting`); PRV, Gopi et al. 2021
and RDP, Mironov et al. 2019 (both `opacus`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

from fedgraft_common.errors import PrivacyError

Accountant = Literal["pld", "prv", "rdp"]

EXACT_INTERVAL = 1e-4
"""Grid of the reported PLD, in units of privacy loss: the default of `dp_accounting`."""
COARSE_INTERVAL = 1e-3
"""Grid of `epsilon_bound`: ten times cheaper, and still an upper bound, a little looser."""
NOISE_RANGE = (0.3, 10_000.0)
"""Calibrated noise multipliers. Below, even one step promises little; above, nothing is learnt."""


@dataclass(frozen=True, slots=True)
class SamplingEvent:
    """`steps` Gaussian mechanisms, each on its own Poisson sample of the units.

    Attributes:
        sample_rate: q, the probability that one unit is in one step's batch, in (0, 1].
        noise_multiplier: sigma, noise standard deviation divided by the clipping norm C.
        steps: T, the number of steps. Empty batches count, for they add noise too.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise PrivacyError(
                field="sample_rate",
                value=self.sample_rate,
                allowed="a probability, 0 < q <= 1",
                action="Set it to the expected batch size divided by the declared number of units.",
            )
        if not 0 < self.noise_multiplier < math.inf:
            raise PrivacyError(
                field="noise_multiplier",
                value=self.noise_multiplier,
                allowed="a finite number above 0",
                action="Choose the noise with calibrate_noise_multiplier; without it nothing "
                "is private and there is nothing to account.",
            )
        if type(self.steps) is not int or self.steps < 1:
            raise PrivacyError(
                field="steps",
                value=self.steps,
                allowed="a whole number of at least 1",
                action="Give the fixed number of training steps, which data must not decide.",
            )


def epsilon(events: Sequence[SamplingEvent], delta: float, accountant: Accountant = "pld") -> float:
    """Epsilon of all `events` together at `delta`, under adding or removing one unit.

    "pld" equals `dp_accounting`'s `PLDAccountant` on the composed events (tested, to 1e-9). A new
    event costs one composition, because finished history stays composed in memory; a repeated
    question costs nothing.

    Edge cases: no events give 0; a slightly negative bound (PLD) is clamped to 0; under
    sampling, PLD answers infinity for a delta of 1e-15 or less, the tail it does not resolve.

    Raises:
        PrivacyError: delta is outside (0, 1), or the accountant is unknown.
    """
    _check_delta(delta)
    if accountant not in get_args(Accountant):
        raise PrivacyError(
            field="accountant",
            value=accountant,
            allowed=", ".join(get_args(Accountant)),
            action='Use "pld"; the others are there to check it.',
        )
    return _epsilon(tuple(merge(events)), delta, accountant)


def epsilon_bound(events: Sequence[SamplingEvent], delta: float) -> float:
    """Never less than `epsilon`, within about a hundredth of it, and quick on a long history.

    Rounding privacy losses to any grid overstates epsilon; a coarse grid overstates it more and
    costs a tenth. Whatever fits by this bound fits.

    Raises:
        PrivacyError: delta is outside (0, 1).
    """
    _check_delta(delta)
    merged = tuple(merge(events))
    return _bound(merged, delta) if merged else 0.0


def second_opinion(events: Sequence[SamplingEvent], delta: float, error: float = 0.01) -> float:
    """Epsilon by Opacus' PRV accountant, to within `error`, to hold against `epsilon`.

    A larger error is quicker: sixty mechanisms take a minute at 0.01 and ten seconds at 0.1.

    Raises:
        PrivacyError: delta is outside (0, 1).
    """
    _check_delta(delta)
    merged = tuple(merge(events))
    return _prv(merged, delta, error) if merged else 0.0


def fits(events: Sequence[SamplingEvent], delta: float, limit: float) -> bool:
    """Whether the events together stay within (limit, delta); asks the exact grid only if need be.

    The first question is about more steps than there are, up to the next power of two: what fits
    with more fits with fewer. A run that takes one step after the other thus composes a few times
    in its life, where it would in each round, with another Fourier transform each time, of which
    scipy keeps the last sixteen.

    Raises:
        PrivacyError: delta is outside (0, 1).
    """
    return (
        epsilon_bound(_rounded_up(events), delta) <= limit
        or epsilon_bound(events, delta) <= limit
        or epsilon(events, delta) <= limit
    )


def _rounded_up(events: Sequence[SamplingEvent]) -> list[SamplingEvent]:
    """The same, but the mechanism that grew last has a power of two of steps."""
    merged = merge(events)
    for last in merged[-1:]:
        merged[-1] = replace(last, steps=1 << (last.steps - 1).bit_length())
    return merged


def affordable_steps(
    prior: Sequence[SamplingEvent], event: SamplingEvent, delta: float, limit: float
) -> int:
    """How many of the event's steps fit behind `prior` within (limit, delta); 0 to event.steps.

    Raises:
        PrivacyError: delta is outside (0, 1).
    """

    def fit(steps: int) -> bool:
        new = SamplingEvent(event.sample_rate, event.noise_multiplier, steps)
        return fits([*prior, new], delta, limit)

    if fit(event.steps):
        return event.steps
    most_that_fits, least_that_does_not = 0, event.steps
    while least_that_does_not - most_that_fits > 1:
        middle = (most_that_fits + least_that_does_not) // 2
        if fit(middle):
            most_that_fits = middle
        else:
            least_that_does_not = middle
    return most_that_fits


def calibrate_noise_multiplier(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    *,
    prior: Sequence[SamplingEvent] = (),
) -> float:
    """Smallest noise multiplier that keeps `prior` plus `steps` new steps within the target.

    Guarantee: `epsilon([*prior, SamplingEvent(sample_rate, result, steps)], delta)` never exceeds
    `target_epsilon`, and comes within 1 % of it, unless the result is at the lower end of
    `NOISE_RANGE`.

    The search is `dp_accounting.calibrate_dp_mechanism` over 1 / sigma on a coarse grid, which
    also bounds epsilon from above; the result is then accounted on the exact grid, and the grid
    is refined if that shows the coarse one to be loose.

    Raises:
        PrivacyError: the target is not a positive finite number, or `prior` has used it up, or
            meeting it needs more noise than `NOISE_RANGE` allows.
    """
    _check_delta(delta)
    if not 0 < target_epsilon < math.inf:
        raise PrivacyError(
            field="target_epsilon",
            value=target_epsilon,
            allowed="a finite number above 0",
            action="Common choices lie between 1 and 10; smaller is more private.",
        )
    new = SamplingEvent(sample_rate, NOISE_RANGE[1], steps)
    return _calibrate(target_epsilon, delta, new, tuple(merge(prior)))


@lru_cache(maxsize=1024)
def _calibrate(
    target: float, delta: float, new: SamplingEvent, prior: tuple[SamplingEvent, ...]
) -> float:
    from dp_accounting import LowerEndpointAndGuess, calibrate_dp_mechanism

    least, most = NOISE_RANGE
    q, steps = new.sample_rate, new.steps
    spent = epsilon(prior, delta)
    if spent >= target:
        raise PrivacyError(
            field="target_epsilon",
            value=target,
            allowed=f"more than the {spent:.4f} that earlier events have spent",
            action="Raise the target, or use data that no earlier run has used.",
        )
    aim = spent + 0.9995 * (target - spent)
    # Rounding to a grid adds a variance of about interval^2 / 6 to each step's privacy loss;
    # on this grid the search overstates epsilon by some tenths of a percent.
    all_steps = steps + sum(event.steps for event in prior)
    coarse = max(EXACT_INTERVAL, aim / (40 * math.sqrt(all_steps)))
    # The classical Gaussian mechanism (Dwork and Roth 2014, theorem A.1) on the sum of the steps.
    guess = (target - spent) / (q * math.sqrt(2 * steps * math.log(1.25 / delta)))
    guess = min(max(guess, 2 / most), 1 / least)

    for interval in (coarse, EXACT_INTERVAL):

        def candidate(interval: float = interval) -> _CandidateAccountant:
            return _CandidateAccountant(prior, interval)

        if candidate().compose(new).get_epsilon(delta) > aim:
            continue
        inverse_sigma = calibrate_dp_mechanism(
            make_fresh_accountant=candidate,
            make_event_from_param=lambda inverse: SamplingEvent(q, 1 / inverse, steps),
            target_epsilon=aim,
            target_delta=delta,
            bracket_interval=LowerEndpointAndGuess(1 / most, guess),
            tol=1e-4 * guess,
        )
        sigma = float(1 / inverse_sigma)
        reached = epsilon((*prior, SamplingEvent(q, sigma, steps)), delta)
        tight = reached >= 0.99 * target or sigma < 1.01 * least or interval == EXACT_INTERVAL
        if reached <= target and tight:
            return sigma
    raise PrivacyError(
        field="target_epsilon",
        value=target,
        allowed=f"a target that noise_multiplier <= {most:g} can meet",
        action="Raise the target, or use fewer steps or a smaller sample rate.",
    )


class _CandidateAccountant:
    """What `calibrate_dp_mechanism` asks of an accountant, with the prior events composed once."""

    def __init__(self, prior: tuple[SamplingEvent, ...], interval: float) -> None:
        from dp_accounting import NoOpDpEvent

        self.ledger = NoOpDpEvent()
        self._prior = prior
        self._interval = interval

    def compose(self, event: SamplingEvent) -> _CandidateAccountant:
        self._event = event
        return self

    def get_epsilon(self, delta: float) -> float:
        if self._event.noise_multiplier < NOISE_RANGE[0]:
            return 1e6  # Beyond every target, so that the search stops at the least noise.
        pld = _steps_pld(self._event, self._interval)
        if self._prior:
            pld = _composed_history(self._prior, self._interval).compose(pld)
        return float(pld.get_epsilon_for_delta(delta))


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[SamplingEvent, ...], delta: float, accountant: Accountant) -> float:
    if not events:
        return 0.0
    if accountant == "pld":
        return max(0.0, float(_composed_pld(events, EXACT_INTERVAL).get_epsilon_for_delta(delta)))
    if accountant == "prv":
        return _prv(events, delta, 0.01)
    from opacus.accountants import RDPAccountant

    opacus = RDPAccountant()
    opacus.history = [(e.noise_multiplier, e.sample_rate, e.steps) for e in events]
    with warnings.catch_warnings():
        # "Optimal order is the largest alpha": a loose bound and still a bound.
        warnings.simplefilter("ignore")
        return max(0.0, float(opacus.get_epsilon(delta)))


@lru_cache(maxsize=4096)
def _bound(events: tuple[SamplingEvent, ...], delta: float) -> float:
    coarse = _composed_pld(events, COARSE_INTERVAL)
    return max(0.0, float(coarse.get_epsilon_for_delta(delta)))


def _prv(events: tuple[SamplingEvent, ...], delta: float, error: float) -> float:
    from opacus.accountants import PRVAccountant

    opacus = PRVAccountant()
    opacus.history = [(e.noise_multiplier, e.sample_rate, e.steps) for e in events]
    with warnings.catch_warnings():  # at q = 1: log(0) in a branch that `np.where` discards
        warnings.simplefilter("ignore")
        return max(0.0, float(opacus.get_epsilon(delta, eps_error=error)))


def merge(events: Iterable[SamplingEvent]) -> list[SamplingEvent]:
    """Adds up the steps of equal mechanisms; the one that grew last comes last."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        mechanism = (event.sample_rate, event.noise_multiplier)
        steps[mechanism] = steps.pop(mechanism, 0) + event.steps
    return [SamplingEvent(q, sigma, count) for (q, sigma), count in steps.items()]


def _composed_pld(events: tuple[SamplingEvent, ...], interval: float) -> Any:
    """Keeps what comes before the last mechanism, which has more steps at the next question."""
    last = _steps_pld(events[-1], interval)
    return _composed_history(events[:-1], interval).compose(last) if events[:-1] else last


def _composed_history(events: tuple[SamplingEvent, ...], interval: float) -> Any:
    for end in range(200, len(events), 200):  # Keeps the recursion shallow on any history.
        _composed_prefix(events[:end], interval)
    return _composed_prefix(events, interval)


@lru_cache(maxsize=32)  # About 5 MB each.
def _composed_prefix(events: tuple[SamplingEvent, ...], interval: float) -> Any:
    """Caches every prefix, so that history is composed once and only what follows is new."""
    last = _steps_pld(events[-1], interval)
    return _composed_prefix(events[:-1], interval).compose(last) if events[:-1] else last


def _steps_pld(event: SamplingEvent, interval: float) -> Any:
    if event.sample_rate == 1:  # T Gaussians are one with sigma / sqrt(T), exactly.
        return _one_step_pld(1.0, event.noise_multiplier / math.sqrt(event.steps), interval)
    one_step = _one_step_pld(event.sample_rate, event.noise_multiplier, interval)
    return one_step.self_compose(event.steps)


@lru_cache(maxsize=128)  # About 1 MB each.
def _one_step_pld(sample_rate: float, sigma: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma, value_discretization_interval=interval, sampling_prob=sample_rate
    )


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise PrivacyError(
            field="delta",
            value=delta,
            allowed="a probability, 0 < delta < 1",
            action="Choose it below 1 / (number of units), for example 1e-5.",
        )
