"""What every task promises: its loss is a record's own, gradients are exact, answers are whole."""

from __future__ import annotations

import math

import pytest
import torch

from fedgraft_client.gradients import ENGINES, Loop
from fedgraft_client.head import LinearHead
from fedgraft_client.task_head import empty_head
from fedgraft_client.tasks import Task, build_task, known_tasks, register
from fedgraft_common.errors import DataError, PlanError
from fedgraft_common.task_spec import TaskSpec

SPECS = {
    "single-label": TaskSpec(classes=("a", "b", "c")),
    "multi-label": TaskSpec(kind="multi-label", classes=("a", "b", "c")),
    "ordinal": TaskSpec(kind="ordinal", classes=("low", "middle", "high", "top")),
    "regression": TaskSpec(kind="regression", targets=("x", "y"), low=(0, -5), high=(10, 5)),
    "survival": TaskSpec(kind="survival", cuts=(1.0, 2.0, 4.0)),
    "tabular": TaskSpec(kind="tabular", classes=("no", "yes")),
    "sequence-to-class": TaskSpec(kind="sequence-to-class", classes=("a", "b", "c")),
    "token-classification": TaskSpec(kind="token-classification", classes=("O", "A", "B")),
    "language-modelling": TaskSpec(kind="language-modelling"),
    "segmentation": TaskSpec(kind="segmentation", classes=("ground", "thing")),
    "detection": TaskSpec(kind="detection", classes=("cat", "dog")),
}
WIDTH, VOCABULARY = 8, 11
KINDS = pytest.mark.parametrize("kind", list(SPECS))


def features_of(task: Task, records: int = 6) -> torch.Tensor:
    shape = {"pooled": (WIDTH,), "tokens": (5, WIDTH), "map": (WIDTH, 4, 6)}[task.features]
    return torch.randn(records, *shape, generator=torch.Generator().manual_seed(0))


def random_head(task: Task) -> LinearHead:
    head = empty_head(task, WIDTH, VOCABULARY if task.spec.kind == "language-modelling" else None)
    generator = torch.Generator().manual_seed(1)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return head


def test_every_kind_is_tried_here() -> None:
    assert set(SPECS) == set(known_tasks())


@KINDS
def test_a_records_loss_depends_on_that_record_alone(kind: str) -> None:
    task = build_task(SPECS[kind])
    outputs = random_head(task)(features_of(task)).detach()
    labels = task.example(outputs)
    together = task.loss(outputs, labels)
    alone = [task.loss(outputs[i : i + 1], labels[i : i + 1]) for i in range(len(outputs))]
    assert together.shape == (len(outputs),)
    assert torch.allclose(together, torch.cat(alone), rtol=1e-5)
    assert bool((together > 0).all())


@KINDS
def test_each_engine_gives_the_gradients_of_single_records(kind: str) -> None:
    task = build_task(SPECS[kind])
    head, features = random_head(task), features_of(task, 3)
    labels = task.example(head(features).detach())

    def found(make: type) -> torch.Tensor:
        engine = make(head, task.loss)
        engine((features,), labels)
        rows = [p.grad_sample.reshape(3, -1) for p in head.parameters()]  # type: ignore[attr-defined]
        engine.close()
        return torch.cat(rows, dim=1)

    truth = found(Loop)
    assert bool((truth.norm(dim=1) > 1e-3).all())
    for make in ENGINES:
        gap = (found(make) - truth).norm(dim=1) / truth.norm(dim=1)  # type: ignore[arg-type]
        assert float(gap.max()) < 1e-4


@KINDS
def test_training_its_own_head_lowers_the_loss_and_raises_the_score(kind: str) -> None:
    task = build_task(SPECS[kind])
    features = features_of(task, 8)
    outputs = VOCABULARY if kind == "language-modelling" else None
    head = empty_head(task, WIDTH, outputs)
    labels = task.example(head(features).detach())
    if kind in ("token-classification", "segmentation"):  # more places than random features fit
        labels = random_head(task)(features).argmax(dim=2 if task.features == "tokens" else 1)
    before = task.loss(head(features), labels).sum()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        loss = task.loss(head(features), labels).sum()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * float(before.detach())
    with torch.no_grad():
        scores = task.scores(head(features), labels)
        untrained = task.scores(empty_head(task, WIDTH, outputs)(features), labels)
    assert task.primary in scores
    assert all(isinstance(value, float) for value in scores.values())
    assert math.isnan(untrained[task.primary]) or scores[task.primary] > untrained[task.primary]


@KINDS
def test_its_own_example_passes_and_another_type_does_not(kind: str) -> None:
    task = build_task(SPECS[kind])
    labels = task.example(random_head(task)(features_of(task)).detach())
    task.check(labels, "site north")
    with pytest.raises(DataError, match="site north: labels"):
        task.check(labels.to(torch.float64), "site north")
    with pytest.raises(DataError, match="site north: labels"):
        task.check(labels[..., None], "site north")


@KINDS
def test_there_is_one_answer_a_record(kind: str) -> None:
    task = build_task(SPECS[kind])
    answers = task.answers(random_head(task)(features_of(task)).detach())
    assert len(answers) == 6
    assert all(list(answer) == list(answers[0]) for answer in answers)


@KINDS
def test_the_right_answer_counts_1_and_shares_stay_between_0_and_1(kind: str) -> None:
    task = build_task(SPECS[kind])
    outputs = random_head(task)(features_of(task)).detach()
    labels = task.example(outputs)
    try:
        shares = task.correct(outputs, labels)
    except PlanError as error:
        assert kind in str(error)
        assert kind in ("survival", "detection")
        return
    assert shares.shape == (6,)
    assert shares.dtype is torch.float64
    assert bool(((shares >= 0) & (shares <= 1)).all())
    assert float(shares.mean()) < 1


@KINDS
def test_a_fixed_head_is_public_or_refused(kind: str) -> None:
    task = build_task(SPECS[kind])
    if kind in ("detection", "language-modelling"):
        with pytest.raises(PlanError):
            task.prototype(0, WIDTH)
        return
    weight, bias = task.prototype(3, WIDTH)
    again, _ = build_task(SPECS[kind]).prototype(3, WIDTH)
    other, _ = task.prototype(4, WIDTH)
    assert weight.shape == (task.outputs, WIDTH)
    assert bias.shape == (task.outputs,)
    assert torch.allclose(weight.norm(dim=1), torch.ones(task.outputs), atol=1e-5)
    assert torch.equal(weight, again)
    assert not torch.allclose(weight, other, atol=0.1)


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"task: kind: found 'prophecy'; allowed: single-label, "):
        build_task(TaskSpec(kind="prophecy"))


def test_two_kinds_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two tasks are called single-label"):
        register("single-label", lambda spec, weights: build_task(spec, weights))
