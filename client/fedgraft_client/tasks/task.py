"""What every task has: a head, a loss for each record, scores, and answers for people.

Shapes: N records, D features, K outputs at a place; a place is a record (features `pooled`), a
token (`tokens`) or a cell of the feature map (`map`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol, TypeAlias

import torch

from fedgraft_client.tasks.reading import Labels, Written
from fedgraft_common.errors import DataError, PlanError
from fedgraft_common.features import FeatureKind
from fedgraft_common.task_spec import TaskSpec

Prototype: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Weight (K, D) of rows of length 1 and bias (K,) of a fixed public head."""
Answer: TypeAlias = dict[str, Any]
"""What is printed for one record: column to value."""
IGNORED: Final = -100
"""Label of a place that has none; PyTorch's own number for it."""


class Task(Protocol):
    """One kind of task with a site's own classes, targets or cut points.

    A task is immutable. Its loss depends on one record at a time and adds nothing that was counted
    or measured on the site's data, so that clipping a record's gradient bounds what it moves.
    """

    @property
    def spec(self) -> TaskSpec:
        """As configured."""

    @property
    def features(self) -> FeatureKind:
        """Which features the head takes."""

    @property
    def primary(self) -> str:
        """The score by which methods are compared; larger is better."""

    @property
    def countable(self) -> bool:
        """Whether a record's answer can be more or less right: what `correct` says."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the labels: int64 or float32."""

    @property
    def outputs(self) -> int:
        """K."""

    def prototype(self, seed: int, features: int) -> Prototype:
        """A head that is fixed and public, before it is scaled.

        Raises:
            PlanError: that has no meaning for this task.
        """

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of each record, (N,)."""

    def read(self, written: Written) -> Labels:
        """Labels as they are written in a table, as the numbers that the loss takes."""

    def check(self, labels: torch.Tensor, where: str) -> None:
        """Refuses labels that are not this task's.

        Raises:
            DataError: another shape or type, or a value out of range.
        """

    def example(self, outputs: torch.Tensor) -> torch.Tensor:
        """Synthetic labels for these outputs, for checks without data."""

    def scores(self, outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Every score of the task on some records; NaN where one is not defined for them."""

    def correct(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """How right each record's answer is, (N,) in [0, 1]: what a released evaluation counts.

        Raises:
            PlanError: the task has no such number.
        """

    def answers(self, outputs: torch.Tensor) -> list[Answer]:
        """One row for each record."""


def need_classes(spec: TaskSpec, where: str, least: int = 2) -> tuple[str, ...]:
    """The classes of a task, if they can be told apart.

    Raises:
        DataError: too few, two of the same name, or a name of several lines.
    """
    classes = spec.classes
    if len(classes) < least:
        words = "two classes" if least == 2 else "one class"
        raise DataError(
            f"{where}: classes", ", ".join(classes) or "none", f"at least {words}",
            "A head needs something to tell apart: list every class the task has, even if no "
            "record of it is here, or leave the site out.",
        )  # fmt: skip
    if len(set(classes)) < len(classes) or any("\n" in name for name in classes):
        raise DataError(
            f"{where}: classes", ", ".join(classes), "different names of one line each",
            "Rename the classes in the label map.",
        )  # fmt: skip
    return classes


def weights_of(classes: tuple[str, ...], weights: Mapping[str, float]) -> tuple[float, ...]:
    """The plan's weight of each class, 1 where it names none."""
    return tuple(float(weights.get(name, 1.0)) for name in classes)


def check_indices(
    labels: torch.Tensor, classes: tuple[str, ...], where: str, ignored: int | None = None
) -> None:
    """Refuses class numbers out of range.

    Args:
        labels: int64, any shape.
        classes: K names.
        where: for the error.
        ignored: a number that stands for no label, if there is one.
    """
    outside = (labels < 0) | (labels >= len(classes))
    if ignored is not None:
        outside &= labels != ignored
    if outside.any():
        raise DataError(
            f"{where}: labels", int(labels[outside][0]),
            f"0 to {len(classes) - 1} ({', '.join(classes)})", "Correct the label map.",
        )  # fmt: skip


def mean_over_places(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of values over the labelled places of each record, (N,); 0 where it has none.

    Args:
        values: (N, ...) one for each place.
        labels: (N, ...) int64, `IGNORED` where there is none.
    """
    known = (labels != IGNORED).to(values)
    total = (values * known).flatten(1).sum(dim=1)
    return total / known.flatten(1).sum(dim=1).clamp(min=1)


def check_form(labels: torch.Tensor, form: str, fits: bool, where: str) -> None:
    """Refuses labels of another shape or type.

    Raises:
        DataError: `fits` is false.
    """
    if not fits:
        found = f"{labels.dtype}{tuple(labels.shape)}".removeprefix("torch.")
        raise DataError(f"{where}: labels", found, form, "Convert the labels, or change the task.")


def no_prototype(task: Task, why: str) -> PlanError:
    """The error for a fixed head that would mean nothing."""
    return PlanError(
        "head.training", "fixed", f"private, for {task.spec.kind} at this site: {why}",
        'Set head.training = "private" in the plan.',
    )  # fmt: skip


def no_count(task: Task, why: str) -> PlanError:
    """The error for a released evaluation that cannot be counted."""
    return PlanError(
        "evaluation.every", "a released evaluation", f"0, for {task.spec.kind} at this site: {why}",
        "Ask for a plan without evaluation.",
    )  # fmt: skip
