"""The site's own rules, each broken once, and the hours."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from pydantic import ValidationError

from fedgraft_client.policy import Policy, check_hours, check_plan
from fedgraft_common.accounting import SamplingEvent
from fedgraft_common.errors import HoursError, PolicyError
from fedgraft_common.mechanism import StepNoise
from fedgraft_common.plan import Plan

PINNED = "ab" * 32
COMPANY = {
    "privacy__mechanism": "distributed",
    "training__sample_rate": 0.5,
    "aggregation__sites": 4,
    "privacy__tolerated_dropouts": 1,
}
STEP = StepNoise(0.5, 1.0, 2.0, 2.0, SamplingEvent(0.5, 2.0, 60))


def plan(**changes: Any) -> Plan:
    return Plan().replace({key.replace("__", "."): value for key, value in changes.items()})


def test_a_modest_plan_passes() -> None:
    check_plan(Policy(), plan(), "record", STEP)
    check_plan(Policy(), plan(privacy__epsilon=0.5, privacy__delta=1e-9), "record", STEP)
    strict = Policy(
        maximum_epsilon=1, backbones=(PINNED,), adapters=("film",), tasks=("lung-?", "heart*")
    )
    asked = plan(
        privacy__epsilon=1, backbone__sha256=PINNED, adapter__method="film", name="heart-attack"
    )
    check_plan(strict, asked, "record", STEP)


def test_a_signer_vouches_for_backbones() -> None:
    rules = Policy(backbones=(f"signer:{PINNED}",))
    asked = plan(backbone__source="dir:model", backbone__sha256="cd" * 32)
    check_plan(rules, asked, "record", STEP, signer=PINNED)
    for other in (None, "ef" * 32):
        with pytest.raises(PolicyError, match=r"backbone\.sha256"):
            check_plan(rules, asked, "record", STEP, signer=other)
    unpinned = plan(backbone__source="dir:model")
    with pytest.raises(PolicyError, match="the SHA-256 of the weights"):
        check_plan(rules, unpinned, "record", STEP, signer=PINNED)


@pytest.mark.parametrize(
    ("rules", "changes", "words"),
    [
        ({}, {"privacy__epsilon": 8.1}, "privacy.epsilon: found 8.1; allowed: at most 8"),
        ({"maximum_run_epsilon": 2}, {"privacy__epsilon": 3}, "policy.maximum_run_epsilon"),
        ({}, {"privacy__delta": 1e-4}, "privacy.delta: found 0.0001; allowed: at most 1e-05"),
        ({"minimum_noise_multiplier": 2.5}, {}, "noise multiplier: found 2.0"),
        ({"adapters": ("film",)}, {}, "adapter.method: found 'ffa-lora'; allowed: film"),
        ({"tasks": ("lung*",)}, {}, "name: found 'digits'; allowed: lung"),
        ({"backbones": (PINNED,)}, {}, "backbone.sha256: found 'none'"),
        ({"backbones": (PINNED,)}, {"backbone__sha256": "cd" * 32}, "allowed: abab"),
        ({}, {"backbone__source": "dir:model"}, "the SHA-256 of the weights"),
        (
            {"mechanisms": ("distributed",), "minimum_sites": 5},
            COMPANY,
            "aggregation.sites: found 4; allowed: at least 5 (policy.minimum_sites)",
        ),
        (
            {"mechanisms": ("distributed",), "minimum_honest_sites": 3},
            COMPANY,
            "found 2; allowed: at least 3 (policy.minimum_honest_sites)",
        ),
        (
            {"mechanisms": ("distributed",)},
            COMPANY | {"privacy__tolerated_colluders": 0},
            "privacy.tolerated_colluders: found 0; allowed: at least 1 (policy.minimum_colluders)",
        ),
        (
            {"mechanisms": ("distributed",), "minimum_colluders": 2},
            COMPANY,
            "found 1; allowed: at least 2 (policy.minimum_colluders)",
        ),
        ({}, {"backbone__source": "timm:resnet18"}, "the SHA-256 of the weights"),
        ({}, {"backbone__weights": "other.safetensors"}, "the SHA-256 of the weights"),
        ({}, {"privacy__mechanism": "none"}, "privacy.mechanism: found 'none'; allowed: local"),
    ],
)
def test_every_rule_can_be_broken(
    rules: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(PolicyError) as caught:
        check_plan(Policy(**rules), plan(**changes), "record", STEP)
    assert words in str(caught.value)
    assert "Ask the coordinator" in str(caught.value)


def test_a_distributed_plan_that_the_default_policy_takes() -> None:
    rules = Policy(mechanisms=("distributed",))
    assert (rules.minimum_sites, rules.minimum_colluders) == (3, 1)
    smallest = COMPANY | {"aggregation__sites": 3, "privacy__tolerated_dropouts": 0}
    for company in (COMPANY, smallest):
        check_plan(rules, plan(**company), "record", STEP)
    weaker = Policy(mechanisms=("distributed",), minimum_colluders=0)
    check_plan(weaker, plan(**COMPANY, privacy__tolerated_colluders=0), "record", STEP)


def test_a_plan_for_another_unit_is_refused() -> None:
    with pytest.raises(PolicyError, match="patient_id, what this site protects"):
        check_plan(Policy(), plan(), "patient_id", STEP)


@pytest.mark.parametrize(
    ("hours", "clock", "open_"),
    [
        ("20:00-06:00", "19:59", False),
        ("20:00-06:00", "20:00", True),
        ("20:00-06:00", "00:00", True),
        ("20:00-06:00", "05:59", True),
        ("20:00-06:00", "06:00", False),
        ("08:00-17:30", "08:00", True),
        ("08:00-17:30", "17:29", True),
        ("08:00-17:30", "17:30", False),
        ("08:00-17:30", "03:00", False),
        (None, "03:00", True),
    ],
)
def test_hours(hours: str | None, clock: str, open_: bool) -> None:
    now = datetime.fromisoformat(f"2026-11-24T{clock}")
    if open_:
        check_hours(Policy(hours=hours), now)
    else:
        with pytest.raises(HoursError, match=f"found '{clock}'; allowed: {hours}"):
            check_hours(Policy(hours=hours), now)


@pytest.mark.parametrize(
    "rules",
    [
        {"hours": "20-6"},
        {"hours": "08:00-08:00"},
        {"hours": "25:00-06:00"},
        {"backbones": ("abc",)},
        {"maximum_epsilon": 0},
        {"maximum_epsilon": float("inf")},
        {"maximum_delta": 1},
        {"approval": "sometimes"},
        {"mechanisms": ("none",)},
        {"maximum_epsilonn": 3},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(rules: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Policy(**rules)


def test_the_noise_of_an_evaluation_counts_too() -> None:
    step = StepNoise(0.5, 1.0, 2.0, 2.0, STEP.event, SamplingEvent(1.0, 1.5, 2))
    asked = plan(evaluation__every=30)
    rules = Policy(minimum_noise_multiplier=1.8, release_evaluation=True)
    with pytest.raises(PolicyError, match=r"noise multiplier: found 1\.5"):
        check_plan(rules, asked, "record", step)
    check_plan(Policy(minimum_noise_multiplier=1.4, release_evaluation=True), asked, "record", step)
    with pytest.raises(PolicyError, match=r"policy\.release_evaluation"):
        check_plan(Policy(), asked, "record", step)
