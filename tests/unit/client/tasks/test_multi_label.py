"""Several classes at once: means over the classes that occur both ways, as scikit-learn's."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from fedgraft_client.tasks import build_task
from fedgraft_client.tasks.reading import Written
from fedgraft_common.errors import DataError
from fedgraft_common.task_spec import TaskSpec

TASK = build_task(TaskSpec(kind="multi-label", classes=("cough", "fever", "rash")))


def test_scores_against_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(50, 3, generator=generator)
    labels = (torch.rand(50, 3, generator=generator) < 0.4).float()
    labels[:, 2] = 0  # nobody has a rash: nothing to rank
    found = TASK.scores(outputs, labels)
    truth, chances = labels[:, :2].numpy(), outputs[:, :2].sigmoid().numpy()
    assert found["AUC"] == pytest.approx(roc_auc_score(truth, chances), abs=1e-6)
    assert found["average precision"] == pytest.approx(
        average_precision_score(truth, chances), abs=1e-6
    )
    right = ((outputs > 0).float() == labels).all(dim=1).float().mean()
    assert found["exact match"] == pytest.approx(float(right))


@pytest.mark.parametrize("value", ["cough|fever", ["fever", "cough"], "cough|Fieber"])
def test_one_column_of_names(value: object) -> None:
    found = TASK.read(Written([[value, "", None]], {"Fieber": "fever"}))
    assert found.values[:2].tolist() == [[1, 1, 0], [0, 0, 0]]
    assert list(found.broken) == [2]


def test_a_name_that_is_no_class_is_told() -> None:
    assert TASK.read(Written([["cough|itch"]])).unknown == {0: "itch"}


def test_half_a_class_is_refused() -> None:
    with pytest.raises(DataError, match=r"0 \(absent\) or 1 \(present\)"):
        TASK.check(torch.tensor([[0.0, 0.5, 1.0]]), "site north")


def test_one_class_is_enough() -> None:
    task = build_task(TaskSpec(kind="multi-label", classes=("fever",)))
    found = task.scores(torch.tensor([[2.0], [-1.0]]), torch.tensor([[1.0], [0.0]]))
    assert found["AUC"] == found["F1"] == found["exact match"] == 1
