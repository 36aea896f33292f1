from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
from pydantic import ValidationError

from fedgraft_common.plan import Plan, parse_plan
from fedgraft_simulations.comparison import MARGIN, Comparison, Point, Row, SiteFacts, Study, Tensor


def make_comparison(
    own: Sequence[float],
    alone: Sequence[float] = (0.7, 0.8),
    mechanism: str = "local",
    seed: int = 0,
) -> Comparison:
    """Two sites; the plan's row, two ways to stay alone, and no DP."""
    training = {"sample_rate": 0.5}
    document = {"seed": seed, "training": training, "privacy": {"mechanism": mechanism}}
    plan = parse_plan(document, origin="test")
    rows = (
        Row("alone-head", "alone, head only", 0.0, tuple(a - 0.1 for a in alone)),
        Row("alone-adapter", "alone, adapter + head", 0.0, tuple(alone)),
        Row("local", "federated, local", 7.9, tuple(own), (0.5, 0.6), (Point(1, 0.55, 7.9),), 64),
        Row(
            "none", "federated, no DP", math.inf, (0.9, 0.9), (0.8, 0.8), (Point(1, 0.8, math.inf),)
        ),
    )
    sites = tuple(
        SiteFacts(name, 80, 20, ("a", "b"), 0.5, 3.2, math.inf if mechanism == "none" else 7.9)
        for name in ("north", "south")
    )
    return Comparison(plan, sites, rows, (Tensor("b", (4, 4), "float32", 64),), ("a note",), 1.5)


def study(*own: float) -> Study:
    return Study((make_comparison(own),))


def test_verdict_names_the_gain_over_the_better_way_to_stay_alone() -> None:
    result = study(0.85, 0.85)
    assert result.gain == pytest.approx(0.10)  # alone-adapter is at .75, alone-head at .65
    assert result.verdict.startswith("Federating under DP pays: 10.0 points of mean accuracy above")


def test_verdict_says_plainly_that_federating_loses() -> None:
    result = study(0.7, 0.7)
    assert result.verdict.startswith("Federating does not pay for this plan: 5.0 points")
    assert "below the better way to stay alone" in result.verdict


@pytest.mark.parametrize("difference", [-0.9 * MARGIN, 0.0, 0.9 * MARGIN])
def test_verdict_calls_small_differences_equal(difference: float) -> None:
    verdict = study(0.75 + difference, 0.75 + difference).verdict
    assert "no better than staying alone" in verdict
    assert "points" not in verdict


def test_verdict_without_the_plans_own_row_claims_nothing() -> None:
    result = Study((make_comparison((0.9, 0.9), mechanism="distributed"),))
    assert result.gain is None
    assert result.verdict == "The table has no row to compare the plan with."


def test_summaries_are_means_over_sites_and_seeds() -> None:
    seeds = (make_comparison((0.80, 0.84)), make_comparison((0.84, 0.88), seed=1))
    own = Study(seeds).summary("local")
    assert own is not None
    assert own.refit == pytest.approx(0.84)
    assert own.trained == pytest.approx(0.55)
    assert own.deviation > 0
    alone = Study(seeds).summary("alone-adapter")
    assert alone is not None and alone.trained is None and alone.deviation == 0


def test_delta_belongs_to_a_finite_epsilon_only() -> None:
    result = study(0.8, 0.8)
    deltas = {summary.key: summary.delta for summary in result.summaries}
    assert deltas == {"alone-head": 0.0, "alone-adapter": 0.0, "local": 1e-5, "none": 0.0}


@pytest.mark.parametrize("mechanism", ["local", "none"])
def test_document_is_strict_json(mechanism: str) -> None:
    result = Study((make_comparison((0.8, 0.8), mechanism=mechanism),))
    document = json.loads(json.dumps(result.document(), allow_nan=False))
    assert document["verdict"] == result.verdict
    rows = {row["key"]: row for row in document["comparisons"][0]["rows"]}
    assert rows["none"]["epsilon"] is None and rows["none"]["curve"][0]["epsilon"] is None
    assert rows["local"]["epsilon"] == 7.9 and rows["local"]["refit"] == [0.8, 0.8]
    assert document["comparisons"][0]["plan_hash"] == result.comparisons[0].plan.hash


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", 'x"onload="y', "A", "", "a b", "a/b", "a\n"]
)
def test_a_plan_cannot_have_a_hostile_name(name: str) -> None:
    with pytest.raises(ValidationError):
        Plan(name=name)
