"""Ordered classes: probabilities that are consistent, and the likelihood of the whole chain."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from fedgraft_client.tasks.ordinal import Ordinal
from fedgraft_common.task_spec import TaskSpec

TASK = Ordinal(TaskSpec(kind="ordinal", classes=("none", "mild", "grave", "fatal")))
OUTPUTS = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


def test_probabilities_are_those_of_one_distribution() -> None:
    chances = TASK.probabilities(OUTPUTS)
    assert bool((chances >= 0).all())
    assert torch.allclose(chances.sum(dim=1), torch.ones(40))


def test_the_loss_is_minus_the_log_of_the_classs_probability() -> None:
    labels = torch.arange(40) % 4
    truth = -TASK.probabilities(OUTPUTS).gather(1, labels[:, None])[:, 0].log()
    assert torch.allclose(TASK.loss(OUTPUTS, labels), truth, atol=1e-5)


def test_a_fixed_head_starts_without_a_preference_and_keeps_the_order() -> None:
    weight, bias = TASK.prototype(0, 8)
    assert torch.allclose(TASK.probabilities(bias[None]), torch.full((1, 4), 0.25))
    ranks = [TASK.probabilities((s * weight[:1] @ weight.T) + bias) for s in (-3, 0, 3)]
    means = [float((chances * torch.arange(4)).sum()) for chances in ranks]
    assert means == sorted(means)


def test_scores_against_scikit_learn() -> None:
    labels = torch.arange(40) % 4
    best = (TASK.probabilities(OUTPUTS).cumsum(dim=1) < 0.5).sum(dim=1)
    found = TASK.scores(OUTPUTS, labels)
    truth = cohen_kappa_score(labels.numpy(), best.numpy(), weights="quadratic")
    assert found["kappa"] == pytest.approx(truth, abs=1e-5)
    assert found["MAE"] == pytest.approx(float((best - labels).abs().float().mean()))
