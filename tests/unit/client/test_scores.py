"""Intervals at home: they cover, they count units, and they are left out where nothing is known."""

from __future__ import annotations

import math

import pytest
import torch

from fedgraft_client.scores import Score, scores
from fedgraft_client.tasks import build_task
from fedgraft_common.task_spec import TaskSpec

TASK = build_task(TaskSpec(classes=("a", "b")))


def answers(right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(len(right)) % 2
    found = torch.where(right, labels, 1 - labels)
    return torch.nn.functional.one_hot(found, 2).float(), labels


def accuracy(found: tuple[Score, ...]) -> Score:
    return next(score for score in found if score.name == "accuracy")


def test_the_interval_is_about_as_wide_as_the_binomials() -> None:
    outputs, labels = answers(torch.arange(200) % 5 != 0)
    found = accuracy(scores(TASK, outputs, labels))
    assert found.value == 0.8
    half = 1.96 * math.sqrt(0.8 * 0.2 / 200)
    assert found.low == pytest.approx(0.8 - half, abs=0.015)
    assert found.high == pytest.approx(0.8 + half, abs=0.015)


def test_units_are_drawn_whole() -> None:
    """Ten images of a patient, all right or all wrong, are one fact and not ten."""
    units = torch.arange(20).repeat_interleave(10)
    outputs, labels = answers(units % 5 != 0)
    by_record = accuracy(scores(TASK, outputs, labels))
    by_unit = accuracy(scores(TASK, outputs, labels, units))
    assert by_unit.value == by_record.value
    assert by_unit.high - by_unit.low > 2 * (by_record.high - by_record.low)


def test_without_a_second_class_there_is_no_auc_and_no_interval_for_it() -> None:
    found = scores(TASK, torch.randn(10, 2), torch.zeros(10, dtype=torch.int64), resamples=50)
    area = next(score for score in found if score.name == "AUC")
    assert math.isnan(area.value)
    assert math.isnan(area.low)
    assert str(area) == "AUC nan"
    assert str(Score("AUC", 0.5, 0.25, 0.75)) == "AUC 0.500 (0.250 to 0.750)"


def test_one_record_has_no_interval() -> None:
    assert math.isnan(accuracy(scores(TASK, torch.zeros(1, 2), torch.tensor([0]))).low)


def test_the_same_answers_give_the_same_interval() -> None:
    outputs, labels = answers(torch.arange(30) % 3 != 0)
    assert scores(TASK, outputs, labels, resamples=60) == scores(
        TASK, outputs, labels, resamples=60
    )
