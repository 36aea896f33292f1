"""The inversion part: a record is drawn from its own gradient and not from what leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft_common.plan import Plan
from fedgraft_simulations.audit import inversion
from fedgraft_simulations.audit.candidates import Candidates
from fedgraft_simulations.audit.gradient_matching import Matching
from fedgraft_simulations.audit.inversion import (
    CLIPPED,
    NOISED,
    ONE,
    PRIOR,
    ROUND,
    SCENES,
    SENT,
    TOGETHER,
    InversionPart,
    Scene,
    Size,
    affordable,
    analytic_hits,
    choose_targets,
    images_of,
    leaks,
    observe,
)
from fedgraft_simulations.audit.likeness import psnr
from fedgraft_simulations.audit.part import AuditContext, PartResult
from fedgraft_simulations.audit.update_regression import unit_gradients
from fedgraft_simulations.audit.victim import Victim

EFFORT = Size(2, Matching(150, 2, 0.05))


def silent(done: float, doing: str) -> None:
    assert 0 <= done <= 1
    assert doing


def run_part(context: AuditContext) -> PartResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(inversion.SIZES, "quick", EFFORT)
        return InversionPart().run(context, silent)


@pytest.fixture(scope="module")
def result(context: AuditContext) -> PartResult:
    return run_part(context)


def scenes(result: PartResult) -> dict[str, dict[str, Any]]:
    return {scene["name"]: scene for scene in result.facts["scenes"]}


def mean_psnr(result: PartResult, name: str) -> float:
    return float(np.mean(scenes(result)[name]["psnr"]))


def test_a_record_comes_back_from_its_own_gradient(result: PartResult) -> None:
    """The positive control: two decibels nearer than a guess, or identified."""
    assert result.findings[0].verdict == "pass"
    assert mean_psnr(result, ONE) > mean_psnr(result, PRIOR) + 2


def test_no_record_comes_back_from_what_leaves(result: PartResult) -> None:
    assert result.verdict == "pass"
    found = scenes(result)
    for name in (NOISED, SENT, TOGETHER):
        assert found[name]["identified"] <= 1  # a few records of a label: a guess may hit
        assert mean_psnr(result, name) < mean_psnr(result, ONE) - 2


def test_clipping_alone_changes_nothing(result: PartResult) -> None:
    assert scenes(result)[CLIPPED]["psnr"] == scenes(result)[ONE]["psnr"]


def test_what_it_reports(result: PartResult) -> None:
    assert json.loads(json.dumps(result.facts, allow_nan=False)) == result.facts
    assert list(scenes(result)) == [PRIOR, *SCENES]
    (figure,) = result.figures
    assert figure.png.startswith(b"\x89PNG")
    texts = [f for f in result.findings if "text" in f.claim]
    assert len(texts) == 1
    assert [f.verdict for f in result.findings] == ["pass", "pass", "info", "info", "info"]


def test_a_run_without_dp_fails(
    attacked_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"privacy.mechanism": "none", "rounds.count": 1}
    plan = attacked_plan.replace(changes)
    found = run_part(AuditContext(plan, tmp_path, 1, "quick"))
    assert found.verdict == "fail"
    assert "without DP" in found.summary


def test_what_is_seen_is_what_the_trainer_makes(
    context: AuditContext, candidates: list[Candidates]
) -> None:
    """Clipped to C, summed over the batch, noised with the plan's own standard deviations."""
    run = context.rehearsal
    bench, step = run.sites[0].bench(run.plan), run.sites[0].step(run.plan)
    targets = choose_targets(context, candidates, 2)
    assert [t.site for t in targets] == [0, 1]
    victims = {
        t.site: Victim.of_images(run.plan, bench.initial, run.sites[t.site].trained_head(run.plan))
        for t in targets
    }
    seen = observe(context, run, candidates, targets, victims, bench.initial)
    assert set(seen) == set(SCENES)
    clip = step.clipping_norm
    for number in range(2):
        one, clipped = seen[ONE][number], seen[CLIPPED][number]
        expected = one * min(1.0, clip / float(one.norm()))
        torch.testing.assert_close(clipped, expected, atol=1e-4, rtol=1e-3)
    spread = float((seen[NOISED] - seen[CLIPPED]).std())
    assert spread == pytest.approx(step.head_std, rel=0.1)
    spread = float((seen[SENT] - seen[ROUND]).std())
    assert spread == pytest.approx(step.adapter_std, rel=0.1)


def test_targets_were_trained_on(context: AuditContext, candidates: list[Candidates]) -> None:
    targets = choose_targets(context, candidates, 6)
    assert len(set(targets)) == 6
    for target in targets:
        site = candidates[target.site]
        assert site.members[site.units[target.row]]
    assert targets == choose_targets(context, candidates, 6)


def test_the_heads_gradient_would_give_features_away(
    context: AuditContext, candidates: list[Candidates]
) -> None:
    run = context.rehearsal
    bench = run.sites[0].bench(run.plan)
    targets = choose_targets(context, candidates, 4)
    victims = {
        i: Victim.of_images(run.plan, bench.initial, run.sites[i].trained_head(run.plan))
        for i in range(3)
    }
    hits = analytic_hits(candidates, targets, victims, [3.0] * 3, np.random.default_rng(0))
    assert hits[ONE] == 4
    assert hits[NOISED] <= 1
    assert hits[ROUND] <= 2


def scene(name: str, db: list[float], told: list[bool]) -> Scene:
    count = len(db)
    return Scene(
        name, torch.zeros(count, 1, 2, 2), torch.tensor(db), torch.zeros(count), None,
        torch.tensor(told),
    )  # fmt: skip


def test_a_leak_is_more_than_the_prior_explains() -> None:
    prior = scene(PRIOR, [10.0] * 6, [False] * 6)
    nothing = scene(SENT, [9.0] * 6, [False] * 6)
    nearer = scene(SENT, [12.5] * 6, [False] * 6)
    told = scene(SENT, [9.0] * 6, [True, True] + [False] * 4)
    assert not leaks(nothing, prior, 1000)
    assert leaks(nearer, prior, 1000)
    assert leaks(told, prior, 1000)
    guesser = scene(PRIOR, [10.0] * 6, [True, True] + [False] * 4)
    assert not leaks(told, guesser, 1000)


def test_a_large_backbone_gets_fewer_steps(
    context: AuditContext, candidates: list[Candidates], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = context.rehearsal
    bench = run.sites[0].bench(run.plan)
    victim = Victim.of_images(run.plan, bench.initial, run.sites[0].trained_head(run.plan))
    image = images_of(candidates[0])[:1]
    assert affordable(EFFORT, victim, image) == EFFORT.matching
    monkeypatch.setattr(inversion, "BUDGET", inversion.BUDGET / 10_000)
    small = affordable(EFFORT, victim, image)
    assert small.restarts == 1
    assert 10 <= small.iterations < EFFORT.matching.iterations


def test_helpers_agree_with_the_libraries_they_stand_on(
    context: AuditContext, candidates: list[Candidates]
) -> None:
    """A guess of the truth itself is as like as can be."""
    truth = images_of(candidates[0])[:3]
    assert (psnr(truth, truth) == 100).all()
    bench = context.rehearsal.sites[0].bench(context.rehearsal.plan)
    head = context.rehearsal.sites[0].trained_head(context.rehearsal.plan)
    rows = unit_gradients(bench.initial, head, candidates[0], float("inf"))
    assert rows.shape[0] == len(candidates[0].members)
