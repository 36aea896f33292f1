"""Audits of small federations: sound ones pass, broken ones do not, equal seeds say the same.

`test_every_planted_bug_is_caught_and_nothing_else` is the whole self-test; it is slow.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fedgraft_common.plan import Plan, load_plan
from fedgraft_simulations.audit.egress import EgressPart
from fedgraft_simulations.audit.mechanism import MechanismPart
from fedgraft_simulations.audit.part import AuditContext, PartResult
from fedgraft_simulations.audit.plants import BUGS
from fedgraft_simulations.audit.selftest import CHANGES, PLANS, self_test

SMALL = {**CHANGES, "rounds.count": 6, "sites.count": 3}


def small_plan(**changes: object) -> Plan:
    return load_plan(PLANS / "digits.toml").replace({**SMALL, **changes})


def quick(plan: Plan, directory: Path, seed: int = 0) -> AuditContext:
    plan = plan.replace({"aggregation.sites": plan.sites.count})
    return AuditContext(plan, directory, seed, effort="quick")


def failed(result: PartResult) -> set[str]:
    return {finding.name for finding in result.findings if finding.verdict == "fail"}


def silent(_: float, __: str) -> None:
    """No progress."""


def test_a_sound_plan_passes_and_equal_seeds_measure_the_same(tmp_path: Path) -> None:
    first = MechanismPart().run(quick(small_plan(), tmp_path / "a"), silent)
    assert failed(first) == set()
    assert 0 < first.facts["epsilon_lower_bound"] < first.facts["claimed"]
    gate = first.facts["noise, server"]
    assert gate["canaries"] >= 500  # as many again chose the threshold
    again = MechanismPart().run(quick(small_plan(), tmp_path / "b"), silent)
    assert again.facts == first.facts
    assert [f.png for f in again.figures] == [f.png for f in first.figures]


def test_tolerated_colluders_are_an_observer_of_their_own(tmp_path: Path) -> None:
    changes = {"privacy.tolerated_colluders": 1, "head.training": "fixed"}
    result = MechanismPart().run(quick(small_plan(**changes), tmp_path), silent)
    assert failed(result) == set()
    found = result.facts
    assert found["secure sum"]["error"] < 1e-5  # the real protocol ran
    # three shares hide more than the two that the promise counts on
    assert found["noise, worst"]["estimate"] > found["noise, server"]["estimate"]


def test_the_local_mechanism_is_seen_site_by_site_over_several_steps(tmp_path: Path) -> None:
    changes = {
        "privacy.mechanism": "local", "training.local_steps": 2, "rounds.count": 3,
        "training.sample_rate": None, "training.expected_batch": 9,
    }  # fmt: skip
    result = MechanismPart().run(quick(small_plan(**changes), tmp_path), silent)
    assert failed(result) == set()
    assert "noise, single" in result.facts


@pytest.mark.parametrize(
    "mechanism", ["local", pytest.param("distributed", marks=pytest.mark.slow)]
)
def test_what_a_plan_can_switch_on_is_audited_as_it_trains(tmp_path: Path, mechanism: str) -> None:
    changes = {
        "privacy.mechanism": mechanism, "augmentation.views": 2, "training.weight_decay": 0.1,
        "training.dropout": 0.3, "training.alignment": 0.1, "head.local_affine": True,
        "head.training": "prototype",
    }  # fmt: skip
    result = MechanismPart().run(quick(small_plan(**changes), tmp_path), silent)
    assert failed(result) == set()


@pytest.mark.parametrize(
    ("name", "check"), [("noise divided twice", "noise, server"), ("no clipping", "clipping")]
)
def test_a_planted_bug_is_caught(tmp_path: Path, name: str, check: str) -> None:
    bug = next(bug for bug in BUGS if bug.name == name)
    plan = small_plan()
    with bug.plant(plan):
        result = MechanismPart().run(quick(plan, tmp_path), silent)
    assert result.verdict == "fail"
    assert check in failed(result)


def test_a_step_too_many_and_an_evaluation_without_noise_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both leave everything that was tested before as it is: noise, sampling, every bound."""
    from fedgraft_client import site

    train_round = vars(site)["train_round"]

    def twice(*arguments: object) -> object:
        train_round(*arguments)
        return train_round(*arguments)

    monkeypatch.setattr(site, "train_round", twice)
    monkeypatch.setattr(site, "noised", lambda counts, *_: counts)
    changes = {
        "privacy.mechanism": "local", "head.training": "fixed", "rounds.count": 3,
        "evaluation.every": 1,
    }  # fmt: skip
    result = MechanismPart().run(quick(small_plan(**changes), tmp_path), silent)
    found = {finding.name: finding.measured for finding in result.findings}
    assert {"steps", "strength, evaluations"} <= failed(result)
    assert found["steps"] == "6 batches at most, 3 planned, 3 charged at least"
    assert found["strength, evaluations"] == "0.0% of it, 18 counts"


def test_patients_are_canaries_with_all_their_records(tmp_path: Path) -> None:
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    file = tmp_path / "digits.npz"
    images = (digits.images[:400] * (255 / 16)).astype(np.uint8)
    np.savez(file, images=images, labels=digits.target[:400], page=np.arange(400) // 4)
    changes = {
        "privacy.unit": "page", "data.source": f"npz:{file}", "rounds.count": 3,
        "evaluation.every": 1, "training.expected_batch": 5,
    }  # fmt: skip
    result = MechanismPart().run(quick(small_plan(**changes), tmp_path / "audit"), silent)
    assert failed(result) == set()
    found = {finding.name: finding.measured for finding in result.findings}
    assert found["steps"] == "3 batches at most, 3 planned, 3 charged at least"
    assert found["strength, evaluations"].endswith("18 counts")


def test_sums_in_the_open_are_audited_like_masked_ones(tmp_path: Path) -> None:
    plan = small_plan(**{"privacy.secure_aggregation": "summed", "head.training": "fixed"})
    result = MechanismPart().run(quick(plan, tmp_path), silent)
    assert failed(result) == set()
    assert "secure sum" not in result.facts


def test_without_dp_the_audit_shows_what_goes_wrong(tmp_path: Path) -> None:
    plan = small_plan(**{"privacy.mechanism": "none"})
    result = MechanismPart().run(quick(plan, tmp_path), silent)
    assert {"promise", "noise, single", "certificate"} <= failed(result)
    assert result.facts["epsilon_lower_bound"] > 10
    assert "Nothing is promised" in result.summary


def test_a_site_that_sends_more_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard is switched off, and the status record carries the site's name."""
    from fedgraft_client import site
    from fedgraft_common.messages import write_reply

    def talkative(request: object, number: int, status: object, adapter: object = None) -> object:
        reply = write_reply(request, number, status, adapter)  # type: ignore[arg-type]
        reply.content.config_records["status"]["records"] = 41
        return reply

    monkeypatch.setattr(site, "write_reply", talkative)
    monkeypatch.setattr(site, "guard", lambda reply, *_: reply)
    result = EgressPart().run(quick(small_plan(), tmp_path), silent)
    assert "bytes" in failed(result)


@pytest.mark.slow
def test_every_planted_bug_is_caught_and_nothing_else(tmp_path: Path) -> None:
    found = self_test(tmp_path)
    assert found.caught == len(BUGS) == 6
    assert found.false_alarms == 0
    assert len(found.sound) == 20
