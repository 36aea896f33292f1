"""The model card says what is true of the run, and nothing private where it must not."""

from __future__ import annotations

from typing import Any

import pytest

from fedgraft_client.exporting.card import Results, Spent, model_card
from fedgraft_client.scores import Score
from fedgraft_common.backbone import load_backbone
from fedgraft_common.plan import Plan
from fedgraft_common.task_spec import TaskSpec

TASK = TaskSpec(classes=("ill", "well"))
SPENT = Spent(epsilon=1.9971, lifetime=2.501, delta=1e-5, unit="patient_id")
RESULTS = Results(40, (Score("AUC", 0.91, 0.85, 0.96), Score("accuracy", 0.8, float("nan"), 0)))
FILES = {"adapter/": "the adapter"}


def card(changes: dict[str, Any] | None = None, **options: Any) -> str:
    plan = Plan().replace({"aggregation.sites": 16} | (changes or {}))
    return model_card(plan, load_backbone(plan.backbone), TASK, FILES, **options)


def test_promise_and_results_of_a_site() -> None:
    text = card(
        {"privacy.unit": "patient_id"}, about="X-rays of **2026**.", spent=SPENT, results=RESULTS
    )
    for part in (
        "**Stays at the site.**", "one **patient_id**", "epsilon 2.00 at delta 1e-05",
        "epsilon 2.51 at delta", "it trusts nobody", "X-rays of **2026**.",
        "| AUC | 0.910 (0.850 to 0.960) |", "| accuracy | 0.800 |", "40 held-out records",
        "single-label: ill, well", "`adapter/`: the adapter", Plan().backbone.source,
    ):  # fmt: skip
        assert part in text, part


def test_epsilon_is_never_rounded_down() -> None:
    assert "epsilon 1.01 at" in card(spent=Spent(1.0001, 1.0001, 1e-5, "record"))
    assert "epsilon 1.00 at" in card(spent=Spent(1.0, 1.0, 1e-5, "record"))


def test_the_distributed_mechanism_rests_on_honest_sites() -> None:
    changes = {
        "privacy.mechanism": "distributed", "training.sample_rate": 0.5,
        "privacy.tolerated_dropouts": 2, "privacy.tolerated_colluders": 1,
    }  # fmt: skip
    text = card(changes)
    assert "it rests on 13 honest sites" in text
    assert "If more sites collude" in text
    assert "The epsilon is the plan's target" in text
    summed = card(changes | {"privacy.secure_aggregation": "summed"})
    assert "honest sites" not in summed
    assert "the server saw each update, and nothing is promised against it" in summed


def test_an_adapter_on_top_of_another_says_so() -> None:
    assert "started from" not in card()
    text = card({"adapter.start": "earlier/adapter", "adapter.start_sha256": "ab" * 32})
    assert f"| started from | an earlier adapter, SHA-256 `{'ab' * 32}`, whose own" in text


def test_no_promise_without_privacy() -> None:
    text = card({"privacy.mechanism": "none"}, results=RESULTS)
    assert "None: this run was made without differential privacy." in text
    assert "epsilon" not in text


def test_a_public_card_holds_no_result() -> None:
    text = card(public=True, spent=SPENT)
    assert "Stays at the site" not in text
    assert "measured on private records without noise" in text
    assert "AUC" not in text


def test_what_is_missing_is_said() -> None:
    text = card()
    assert "The site gave no description of its data." in text
    assert "names no held-out records" in text


@pytest.mark.parametrize("layers", ["last:2", ["encoder.stages.1", "encoder.stages.2"]])
def test_blocks_are_listed(layers: object) -> None:
    text = card({"adapter.layers": layers})
    expected = layers if isinstance(layers, str) else "encoder.stages.1, encoder.stages.2"
    assert f"blocks {expected} |" in text
