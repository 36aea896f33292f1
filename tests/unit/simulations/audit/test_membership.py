"""The membership part on a small plan: under DP it passes, without DP it does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedgraft_common.plan import Plan
from fedgraft_simulations.audit import membership
from fedgraft_simulations.audit.candidates import Candidates
from fedgraft_simulations.audit.membership import (
    MembershipPart,
    Size,
    attack_heads,
    reference_run,
    words,
)
from fedgraft_simulations.audit.part import AuditContext, PartResult
from fedgraft_simulations.audit.roc import roc_of


def silent(done: float, doing: str) -> None:
    assert 0 <= done <= 1
    assert doing


@pytest.fixture(scope="module")
def result(context: AuditContext) -> PartResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(membership.SIZES, "quick", Size(1, 10, 1, 3))
        return MembershipPart().run(context, silent)


def test_a_plan_that_keeps_its_promise_passes(result: PartResult) -> None:
    assert result.verdict == "pass"
    assert [f.verdict for f in result.findings] == ["pass", "pass", "pass", "info"]
    assert len(result.figures) == 2
    assert all(figure.png.startswith(b"\x89PNG") for figure in result.figures)
    assert result.not_covered


def test_the_control_finds_members_where_dp_is_off(result: PartResult) -> None:
    control = result.facts["without_dp"]
    assert control["auc"] > 0.85
    (at_one_percent,) = [p for p in control["points"] if p["false_positive_rate"] == 0.01]
    assert at_one_percent["interval"][0] > 0.1
    assert "DP off" in result.findings[2].claim


def test_every_attack_is_in_the_facts_as_plain_numbers(result: PartResult) -> None:
    assert json.loads(json.dumps(result.facts, allow_nan=False)) == result.facts
    assert [roc["attack"] for roc in result.facts["released"]] == ["Attack-P", "Attack-R", "RMIA"]
    assert {roc["attack"] for roc in result.facts["heads"]} >= {"LiRA", "RMIA"}
    sizes = {p["members"] for roc in result.facts["released"] for p in roc["points"]}
    assert sizes == {144}  # two runs of three sites with 24 members each


def test_it_leaves_no_reference_runs_behind(context: AuditContext, result: PartResult) -> None:
    assert not list((context.directory / "membership").rglob("*.pb"))


def test_a_reference_run_is_a_run_of_its_own(
    context: AuditContext, candidates: list[Candidates]
) -> None:
    """Other noise with the same records, other records with the same plan."""
    same = [site.members for site in candidates]
    other = [site.choose(np.random.default_rng(0)) for site in candidates]
    plan = context.plan.replace({"rounds.count": 1})
    runs = [
        reference_run(context, candidates, chosen, 90 + i, plan)
        for i, chosen in enumerate((same, same, other))
    ]
    adapters = [run.adapter for run in runs]
    name = next(iter(adapters[0]))
    assert (adapters[0][name] != adapters[1][name]).any()
    assert (adapters[0][name] != adapters[2][name]).any()
    assert [len(site.records) for site in runs[2].sites] == [c.sum() for c in other]


@pytest.fixture(scope="module")
def exposed(attacked_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> PartResult:
    plan = attacked_plan.replace({"privacy.mechanism": "none"})
    context = AuditContext(plan, tmp_path_factory.mktemp("none"), seed=1, effort="quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(membership.SIZES, "quick", Size(1, 8, 1, 3))
        return MembershipPart().run(context, silent)


def test_a_run_without_dp_fails(exposed: PartResult) -> None:
    assert exposed.verdict == "fail"
    assert exposed.findings[1].verdict == "fail"
    assert "Without DP" in exposed.summary
    assert exposed.facts["without_dp"] is None
    assert exposed.facts["updates"][0]["auc"] > 0.85


@pytest.fixture(scope="module")
def local(attacked_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> AuditContext:
    changes = {"privacy.mechanism": "local", "head.training": "private", "rounds.count": 2}
    plan = attacked_plan.replace(changes)
    return AuditContext(plan, tmp_path_factory.mktemp("local"), seed=1, effort="quick")


def test_the_local_mechanism_and_private_heads(local: AuditContext) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(membership.SIZES, "quick", Size(1, 8, 1, 2))
        found = MembershipPart().run(local, silent)
    assert [f.verdict for f in found.findings][:2] == ["pass", "pass"]


def test_noise_that_is_missing_is_found(
    attacked_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: the trainer adds no noise, while the plan still claims epsilon."""
    from fedgraft_client.dp import JointOptimizer

    def bare(self: JointOptimizer) -> None:
        for parameter in self.params:
            total = parameter.summed_grad
            parameter.grad = total if total is not None else 0 * parameter.detach()

    monkeypatch.setattr(JointOptimizer, "add_noise", bare)
    monkeypatch.setitem(membership.SIZES, "quick", Size(1, 8, 1, 3))
    plan = attacked_plan.replace({"privacy.epsilon": 1.0, "privacy.mechanism": "local"})
    found = MembershipPart().run(AuditContext(plan, tmp_path, 1, "quick"), silent)
    assert found.findings[1].verdict == "fail"
    assert "above the ceiling" in found.findings[1].measured


def test_shadow_heads_know_who_was_in(context: AuditContext, candidates: list[Candidates]) -> None:
    """Heads fitted without noise to few records remember them: that is why they are sealed."""
    found = {roc.attack: roc for roc in attack_heads(context, candidates, 32)}
    assert found["LiRA"].auc > 0.6


def test_words_say_the_interval() -> None:
    members = np.arange(200) < 100
    roc = roc_of("RMIA", members + np.linspace(0, 0.1, 200), members)
    assert words(roc).startswith(
        "RMIA: 100.0% of members at 1% false alarms (95 %: 96.4% to 100.0%)"
    )
