"""Telling classes apart: scores as scikit-learn's, and weights from the plan alone."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from fedgraft_client.tasks import build_task
from fedgraft_common.task_spec import TaskSpec


@pytest.mark.parametrize("count", [2, 4])
def test_scores_against_scikit_learn(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    task = build_task(TaskSpec(classes=tuple("abcd"[:count])))
    outputs = torch.randn(60, count, generator=generator)
    labels = torch.randint(0, count, (60,), generator=generator)
    found, chances = task.scores(outputs, labels), outputs.softmax(dim=1)
    best, truth = outputs.argmax(dim=1).numpy(), labels.numpy()
    scored = chances[:, 1] if count == 2 else chances
    assert found["accuracy"] == pytest.approx((best == truth).mean())
    assert found["balanced accuracy"] == pytest.approx(balanced_accuracy_score(truth, best))
    assert found["F1"] == pytest.approx(f1_score(truth, best, average="macro"), abs=1e-6)
    assert found["AUC"] == pytest.approx(
        roc_auc_score(truth, scored.numpy(), multi_class="ovr"), abs=1e-6
    )


def test_without_a_second_class_there_is_no_auc() -> None:
    task = build_task(TaskSpec(classes=("a", "b")))
    found = task.scores(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([1, 1]))
    assert math.isnan(found["AUC"])
    assert found["accuracy"] == found["balanced accuracy"] == 0.5


def test_the_plan_weighs_classes_by_name() -> None:
    plain = build_task(TaskSpec(classes=("healthy", "ill")))
    task = build_task(TaskSpec(classes=("healthy", "ill")), {"ill": 3.0, "no class of it": 9.0})
    outputs, labels = torch.randn(2, 2), torch.tensor([0, 1])
    ratio = task.loss(outputs, labels) / plain.loss(outputs, labels)
    assert torch.allclose(ratio, torch.tensor([1.0, 3.0]))


def test_answers() -> None:
    task = build_task(TaskSpec(classes=("healthy", "ill")))
    assert task.answers(torch.tensor([[0.0, math.log(3)]])) == [
        {"label": "ill", "probability": 0.75}
    ]
