"""One class a pixel: at the size of the mask, and over the classes that occur."""

from __future__ import annotations

import pytest
import torch

from fedgraft_client.tasks import IGNORED, build_task
from fedgraft_common.task_spec import TaskSpec

TASK = build_task(TaskSpec(kind="segmentation", classes=("ground", "house", "road")))


def outputs_for(classes: torch.Tensor, sure: float = 9.0) -> torch.Tensor:
    return sure * torch.nn.functional.one_hot(classes, 3).movedim(-1, 1).float()


def test_scores_by_counting_pixels() -> None:
    truth = torch.tensor([[[0, 0, 0, 1], [1, 1, IGNORED, 1]]])
    found = torch.tensor([[[0, 0, 1, 1], [1, 0, 2, 1]]])
    scores = TASK.scores(outputs_for(found), truth)
    assert scores["accuracy"] == pytest.approx(5 / 7)
    assert scores["mean IoU"] == pytest.approx((2 / 4 + 3 / 5) / 2)  # no road in the truth
    assert scores["Dice"] == pytest.approx((4 / 6 + 6 / 8) / 2)


def test_a_coarse_map_is_brought_to_the_masks_size() -> None:
    coarse = torch.tensor([[[0, 1]]])
    truth = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]]])
    assert TASK.scores(outputs_for(coarse), truth)["accuracy"] == 1
    assert float(TASK.loss(outputs_for(coarse), truth)) < 0.2


def test_a_record_without_labels_pulls_at_nothing() -> None:
    outputs = torch.randn(2, 3, 2, 2, requires_grad=True)
    labels = torch.tensor([[[IGNORED] * 2] * 2, [[0, 1], [2, 0]]])
    losses = TASK.loss(outputs, labels)
    losses.sum().backward()
    assert float(losses[0].detach()) == 0
    assert outputs.grad is not None
    assert not outputs.grad[0].any()
    assert outputs.grad[1].any()
