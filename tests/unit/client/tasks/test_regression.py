"""Numbers: the range is configuration, answers are in the target's own unit."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from fedgraft_client.tasks import build_task
from fedgraft_common.errors import DataError
from fedgraft_common.task_spec import TaskSpec

SPEC = TaskSpec(kind="regression", targets=("ef", "age"), low=(0, 20), high=(100, 100))
TASK = build_task(SPEC)


def test_answers_are_in_the_targets_unit() -> None:
    outputs = torch.tensor([[-1.0, 0.0], [1.0, 2.0]])
    assert TASK.answers(outputs) == [{"ef": 0, "age": 60}, {"ef": 100, "age": 100}]


def test_scores_against_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.rand(30, 2, generator=generator) - 0.5
    labels = torch.rand(30, 2, generator=generator) * 60 + 20
    values = torch.tensor([50.0, 60.0]) + outputs * torch.tensor([50.0, 40.0])
    found = TASK.scores(outputs, labels)
    truth, guess = labels.numpy(), values.numpy()
    assert found["R2"] == pytest.approx(r2_score(truth, guess), abs=1e-4)
    assert found["MAE"] == pytest.approx(mean_absolute_error(truth, guess), abs=1e-3)
    assert found["RMSE"] == pytest.approx(root_mean_squared_error(truth, guess), abs=1e-3)


def test_one_record_cannot_pull_harder_than_the_range() -> None:
    """A value outside the public range is taken for its end."""
    outputs = torch.zeros(2, 2)
    losses = TASK.loss(outputs, torch.tensor([[100.0, 100.0], [1e9, 1e9]]))
    assert losses[0] == losses[1] == 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": ()}, "targets"),
        ({"low": (0,)}, "2 numbers each, low below high"),
        ({"high": (0, 100)}, "2 numbers each, low below high"),
    ],
)
def test_a_range_is_needed(changes: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        build_task(SPEC.model_copy(update=changes))


def test_a_missing_target_is_named() -> None:
    with pytest.raises(DataError, match="NaN or infinity in record 1"):
        TASK.check(torch.tensor([[1.0, 2.0], [float("nan"), 3.0]]), "site north")
