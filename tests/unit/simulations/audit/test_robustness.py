"""A malicious server against the real daemon; and an audit that notices a site that gives in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedgraft_client import site as site_module
from fedgraft_common.messages import ADAPTER, STATUS, Status
from fedgraft_common.plan import Plan
from fedgraft_simulations.audit.hostile_server import few_of_each, packed, stages
from fedgraft_simulations.audit.part import AuditContext, PartResult
from fedgraft_simulations.audit.robustness import (
    Outcome,
    RobustnessPart,
    SiteUnderAttack,
    attack,
    group_findings,
    ledger_finding,
    log_finding,
    says_only_its_word,
)
from fedgraft_simulations.partition import partition


def silent(done: float, doing: str) -> None:
    assert 0 <= done <= 1
    assert doing


@pytest.fixture(scope="module")
def result(context: AuditContext) -> PartResult:
    return RobustnessPart().run(context, silent)


def test_everything_is_refused_at_no_cost(result: PartResult) -> None:
    assert result.verdict == "pass"
    assert {f.verdict for f in result.findings} == {"pass"}
    attempts = result.facts["attempts"]
    assert len(attempts) > 40
    assert all(attempt["held"] for attempt in attempts)


def test_every_kind_of_attempt_was_made(result: PartResult) -> None:
    groups = {attempt["group"] for attempt in result.facts["attempts"]}
    assert groups == {
        "an altered initial adapter", "an altered plan", "an altered backbone", "an honest round",
        "the same round asked again", "an adapter out of range", "a malformed message",
        "an oversized message", "messages out of order", "a run beyond the budget",
        "a run that is sealed",
    }  # fmt: skip


def test_the_right_words_are_said(result: PartResult) -> None:
    said = {a["title"]: a["answer"] for a in result.facts["attempts"]}
    assert said["one value moved by a millionth"] == "refused-message"
    assert said["no signature"] == "refused-plan"
    assert said["other weights under their own hash"] == "refused-policy"
    assert said["other weights under the right hash"] == "refused-plan"
    assert said["a second run with all of epsilon"] == "refused-budget"
    assert said["another round after the refit"] == "refused-sealed"


def test_honest_rounds_are_the_only_ones_that_cost(result: PartResult) -> None:
    costs = {a["title"]: a["reservations"] for a in result.facts["attempts"]}
    assert costs.pop("round 1") == costs.pop("round 2") == 1
    assert set(costs.values()) == {0}
    (account,) = [f for f in result.findings if "ledger" in f.claim]
    assert account.measured.startswith("2 reservations and 2 commits for 2 honest rounds")


def test_megabytes_from_a_server_are_a_short_line_in_the_log(result: PartResult) -> None:
    (log,) = [f for f in result.findings if f.name == "log"]
    assert int(log.measured.split()[0]) >= 40  # every refusal has a line
    assert log_finding(["x" * 2**22]).verdict == "fail"


@pytest.fixture
def target(attacked_plan: Plan, tmp_path: Path) -> Iterator[SiteUnderAttack]:
    made = SiteUnderAttack(attacked_plan, partition(attacked_plan)[0], tmp_path / "site")
    yield made
    made.close()


def broken_groups(outcomes: list[Outcome]) -> set[str]:
    return {outcome.attempt.group for outcome in outcomes if not outcome.held}


def test_a_site_that_checks_no_signature_is_noticed(
    target: SiteUnderAttack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_module, "check_signature", lambda *_: None)
    outcomes = target.ask(target.server.before())
    assert "an altered plan" in broken_groups(outcomes)
    assert any(outcome.reserved for outcome in outcomes)  # a plan nobody signed was trained
    assert "fail" in {f.verdict for f in group_findings(outcomes)}


def test_a_site_that_takes_any_adapter_is_noticed(
    target: SiteUnderAttack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each out-of-range adapter that is finite is then trained on, and charged."""
    monkeypatch.setattr(site_module, "check_range", lambda *_: None)
    target.ask([target.server.honest(1)])
    outcomes = target.ask(target.server.between())
    assert "an adapter out of range" in broken_groups(outcomes)
    assert any(outcome.reserved for outcome in outcomes)


def test_a_site_that_pins_no_backbone_is_noticed(target: SiteUnderAttack) -> None:
    target.site.policy = target.site.policy.model_copy(update={"backbones": ("any",)})  # type: ignore[union-attr]
    outcomes = target.ask(target.server._backbones())
    assert broken_groups(outcomes) == {"an altered backbone"}


def test_a_second_look_at_the_data_is_noticed(
    target: SiteUnderAttack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that forgets what it answered trains again on the same round."""
    original = target.site.store.last_round
    monkeypatch.setattr(target.site.store, "last_round", lambda plan, head: (0, {}))
    outcomes = attack_twice(target)
    monkeypatch.setattr(target.site.store, "last_round", original)
    assert "the same round asked again" in broken_groups(outcomes)


def attack_twice(target: SiteUnderAttack) -> list[Outcome]:
    first = target.ask([target.server.honest(1)])
    again = target.ask(target.server.again())
    for outcome in again:
        outcome.silent = outcome.content == first[0].content
    return again


def test_an_overdrawn_ledger_is_noticed(target: SiteUnderAttack) -> None:
    target.ask([target.server.honest(1)])
    cost = target.round_cost
    target.close()
    assert ledger_finding(target.plan, target.ledger, cost, honest=1).verdict == "pass"
    assert ledger_finding(target.plan, target.ledger, cost, honest=0).verdict == "fail"
    assert ledger_finding(target.plan, target.ledger, cost, honest=2).verdict == "fail"


def test_a_plan_that_protects_a_column(attacked_plan: Plan, tmp_path: Path) -> None:
    plan = attacked_plan.replace({"privacy.unit": "page"})
    target = SiteUnderAttack(plan, partition(plan)[0], tmp_path / "site")
    try:
        outcomes = attack(target)
    finally:
        target.close()
    assert not broken_groups(outcomes)


def reply(content: dict[str, Any]) -> Message:
    TaskIdentity.run_id = TaskIdentity.task_id = 1
    TaskIdentity.node_id = 0
    return Message(RecordDict(content), dst_node_id=1, message_type="train")


def test_a_refusal_may_say_one_word_and_nothing_else() -> None:
    word = ConfigRecord({"round": 1, "status": Status.PLAN.value})
    assert says_only_its_word(reply({ADAPTER: ArrayRecord(), STATUS: word}))
    talkative = ConfigRecord({"round": 1, "status": Status.PLAN.value, "reason": "no"})
    assert not says_only_its_word(reply({ADAPTER: ArrayRecord(), STATUS: talkative}))
    assert not says_only_its_word(reply({STATUS: word, "more": ConfigRecord({})}))


def test_over_real_processes_a_few_of_each_kind_travel(target: SiteUnderAttack) -> None:
    chosen = stages(target.server)
    every = [attempt for stage in chosen for attempt in stage]
    assert 12 <= len(every) <= 30
    assert {a.group for a in every} >= {"an altered plan", "a malformed message"}
    assert max(len([a for a in few_of_each(stage) if a.group == g]) for stage in chosen
               for g in {a.group for a in stage}) == 2  # fmt: skip
    honest = target.server.message(1)
    assert len(packed(honest).array_records[ADAPTER]) == 1
    (garbage,) = [a for a in target.server.between() if a.title == "bytes that are no array"]
    assert packed(garbage.content) is garbage.content
