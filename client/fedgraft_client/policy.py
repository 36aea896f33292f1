"""The site's own rules: what a plan may ask of its data. The server cannot change them.

A plan may ask for more privacy than the policy, never for less. Every refusal names the rule and
stays in the site's log; the server learns one word of a closed list (`fedgraft_common.messages`).
"""

from __future__ import annotations

import re
from datetime import datetime, time
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field, field_validator

from fedgraft_common.errors import HoursError, PolicyError
from fedgraft_common.mechanism import StepNoise
from fedgraft_common.plan import Plan, Section

_HOURS = re.compile(r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")


class Policy(Section):
    """`[policy]` of a site file."""

    maximum_epsilon: float = Field(
        default=8.0,
        gt=0,
        description="Epsilon that this data set may spend in its lifetime, over all runs.",
    )
    maximum_delta: float = Field(
        default=1e-5,
        gt=0,
        lt=1,
        description="The delta that goes with it; below one over the number of units.",
    )
    maximum_run_epsilon: float | None = Field(
        default=None,
        gt=0,
        description="Epsilon that one plan may spend, repeated rounds included. Another plan is "
        "another run: what bounds them together is maximum_epsilon. Absent: only that counts.",
    )
    minimum_noise_multiplier: float = Field(
        default=0.3, gt=0, description="Least sigma that a plan may come to at this site."
    )
    partial_runs: bool = Field(
        default=False,
        description="Whether to join a run that the budget cannot pay to its end; the site then "
        "leaves before the first round it cannot afford.",
    )
    mechanisms: tuple[Literal["local", "distributed"], ...] = Field(
        default=("local",), description="Mechanisms a plan may use."
    )
    minimum_sites: int = Field(
        default=3,
        ge=2,
        description="Least number of sites in a run with the distributed mechanism.",
    )
    minimum_honest_sites: int = Field(
        default=2,
        ge=1,
        description="Least h of such a run: sites less tolerated dropouts and colluders, those "
        "whose noise the promise rests on.",
    )
    minimum_colluders: int = Field(
        default=1,
        ge=0,
        description="Least number of colluders that such a run must tolerate. With 0, a plan may "
        "promise nothing against the other sites: each knows its own noise share.",
    )
    peers: Literal["first", "approved"] = Field(
        default="first",
        description="Whose keys count as known in secure aggregation. `first`: those of the first "
        "roster, and whom `fedgraft site accept-peer` names; `approved`: only the latter. Others "
        "count as colluders.",
    )
    backbones: tuple[str, ...] = Field(
        default=("any",),
        description="SHA-256 of the weights allowed, in hexadecimal; `signer:KEY`, whatever the "
        "operator with this Ed25519 public key (hexadecimal) signs; or `any` that the plan names "
        "by its hash.",
    )
    adapters: tuple[str, ...] = Field(
        default=("ffa-lora", "lora", "film"), description="Adapter methods allowed."
    )
    tasks: tuple[str, ...] = Field(
        default=("*",),
        description="Names of plans this data may be used for; * and ? stand for anything.",
    )
    hours: str | None = Field(
        default=None,
        description="When rounds may be computed, in the site's local time: `20:00-06:00`. "
        "Absent: always.",
    )
    gpu_memory: float | None = Field(
        default=None, gt=0, description="GPU memory the daemon may use, in GiB. Absent: all."
    )
    release_evaluation: bool = Field(
        default=False,
        description="Whether noised counts of correct predictions may leave, charged to the "
        "ledger.",
    )
    approval: Literal["automatic", "manual"] = Field(
        default="automatic",
        description="`manual`: a plan waits until `fedgraft site approve`.",
    )

    @field_validator("hours")
    @classmethod
    def _reads_as_hours(cls, value: str | None) -> str | None:
        if value is not None and (not _HOURS.match(value) or len(set(value.split("-"))) == 1):
            raise ValueError("two different times of day, e.g. '20:00-06:00'")
        return value

    @field_validator("backbones")
    @classmethod
    def _reads_as_hashes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name != "any" and not re.fullmatch(r"(signer:)?[0-9a-f]{64}", name):
                raise ValueError(f"{name!r}: 64 hexadecimal digits, 'signer:' and 64, or 'any'")
        return value


def check_plan(
    policy: Policy, plan: Plan, unit: str, step: StepNoise, signer: str | None = None
) -> None:
    """Holds a plan against the policy. The budget is another matter: `fedgraft_client.budget`.

    Args:
        policy: the site's.
        plan: what the server asks.
        unit: what the site protects.
        step: the noise that the plan comes to at this site.
        signer: public key in hexadecimal that the plan's signature was checked with, if any.

    Raises:
        PolicyError: the first rule it breaks.
    """
    privacy = plan.privacy
    _one_of("privacy.mechanism", privacy.mechanism, policy.mechanisms, "mechanisms")
    if privacy.mechanism == "distributed":
        _check_company(policy, plan)
    if privacy.unit != unit:
        raise _broken("privacy.unit", privacy.unit, f"{unit}, what this site protects", "data.unit")
    if privacy.delta > policy.maximum_delta:
        raise _broken(
            "privacy.delta", privacy.delta, f"at most {policy.maximum_delta:g}", "maximum_delta"
        )
    limit = policy.maximum_run_epsilon or policy.maximum_epsilon
    if privacy.epsilon > limit:
        rule = "maximum_run_epsilon" if policy.maximum_run_epsilon else "maximum_epsilon"
        raise _broken("privacy.epsilon", privacy.epsilon, f"at most {limit:g}", rule)
    sigma = min((event.noise_multiplier for event in step.events), default=0.0)
    if sigma < policy.minimum_noise_multiplier:
        raise _broken(
            "noise multiplier", round(sigma, 4),
            f"at least {policy.minimum_noise_multiplier:g}", "minimum_noise_multiplier",
        )  # fmt: skip
    _one_of("adapter.method", plan.adapter.method, policy.adapters, "adapters")
    if not any(fnmatchcase(plan.name, pattern) for pattern in policy.tasks):
        raise _broken("name", plan.name, ", ".join(policy.tasks), "tasks")
    if plan.evaluations and not policy.release_evaluation:
        raise _broken("evaluation.every", plan.evaluation.every, "0", "release_evaluation")
    _check_backbone(policy, plan, signer)


def _check_company(policy: Policy, plan: Plan) -> None:
    """Among how many others a sum hides, and on how many of them its noise rests."""
    sites, honest = plan.aggregation.sites or 0, plan.noise_shares
    if sites < policy.minimum_sites:
        raise _broken(
            "aggregation.sites", sites, f"at least {policy.minimum_sites}", "minimum_sites"
        )
    if honest < policy.minimum_honest_sites:
        raise _broken(
            "aggregation.sites less tolerated dropouts and colluders", honest,
            f"at least {policy.minimum_honest_sites}", "minimum_honest_sites",
        )  # fmt: skip
    if (colluders := plan.privacy.tolerated_colluders) < policy.minimum_colluders:
        raise _broken(
            "privacy.tolerated_colluders", colluders,
            f"at least {policy.minimum_colluders}", "minimum_colluders",
        )  # fmt: skip


def _check_backbone(policy: Policy, plan: Plan, signer: str | None) -> None:
    own = plan.backbone.source.startswith(("embedded:", "tabular:"))
    if own and plan.backbone.weights is None and "any" in policy.backbones:
        return  # comes with the program, not with the plan
    found = plan.backbone.sha256
    if found is None:
        raise _broken("backbone.sha256", "none", "the SHA-256 of the weights", "backbones")
    if "any" not in policy.backbones and f"signer:{signer}" not in policy.backbones:
        _one_of("backbone.sha256", found, policy.backbones, "backbones")


def check_hours(policy: Policy, now: datetime) -> None:
    """Refuses work outside the allowed hours.

    Args:
        policy: the site's.
        now: local time.

    Raises:
        HoursError: not now.
    """
    if policy.hours is None:
        return
    start, end = (time.fromisoformat(part) for part in policy.hours.split("-"))
    clock = now.time()
    inside = start <= clock < end if start < end else clock >= start or clock < end
    if not inside:
        raise HoursError(
            "time of day", now.strftime("%H:%M"), f"{policy.hours} (policy.hours)",
            "The server may ask again then; change policy.hours to take part now.",
        )  # fmt: skip


def _one_of(field: str, found: str, allowed: tuple[str, ...], rule: str) -> None:
    if found not in allowed:
        raise _broken(field, found, ", ".join(allowed) or "nothing", rule)


def _broken(field: str, found: object, allowed: str, rule: str) -> PolicyError:
    where = f"policy.{rule}" if "." not in rule else rule
    return PolicyError(
        f"plan: {field}", found, f"{allowed} ({where})",
        "Ask the coordinator for another plan, or change the site's own rule.",
    )  # fmt: skip
