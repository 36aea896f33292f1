"""Any number of classes for each record, each present or not.

Labels: (N, K) float32 of 0 and 1. Outputs: (N, K) log-odds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.nn import functional

from fedgraft_client.head import orthogonal_prototypes
from fedgraft_client.tasks.reading import Labels, Written, class_numbers, numbers
from fedgraft_client.tasks.task import Answer, Prototype, check_form, need_classes, weights_of
from fedgraft_common.errors import DataError
from fedgraft_common.features import FeatureKind
from fedgraft_common.task_spec import TaskSpec


class MultiLabel:
    """A logistic regression for each class.

    Args:
        spec: `classes`, at least one.
        weights: the plan's weight of each class by name.

    Raises:
        DataError: no class, or two of one name.
    """

    features: FeatureKind = "pooled"
    primary: ClassVar[str] = "AUC"
    countable: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, spec: TaskSpec, weights: Mapping[str, float] | None = None) -> None:
        self.spec = spec
        self.classes = need_classes(spec, "task", least=1)
        self.weights = weights_of(self.classes, weights or {})

    @property
    def outputs(self) -> int:
        """K, one for each class."""
        return len(self.classes)

    def prototype(self, seed: int, features: int) -> Prototype:
        """Directions at right angles: no class says anything about another."""
        rows = orthogonal_prototypes(seed, self.classes, features)
        return rows, torch.zeros(self.outputs)

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean over the classes of binary cross-entropy times the plan's weight."""
        found = functional.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
        return (found * outputs.new_tensor(self.weights)).mean(dim=1)

    def read(self, written: Written) -> Labels:
        """A column of 0 and 1 for each class, or one of lists of names (`a|b`, if it is text)."""
        if len(written.columns) > 1 or self.outputs == 1:
            return numbers(written.columns)
        labels = Labels(torch.zeros(len(written.columns[0]), self.outputs))
        for i, value in enumerate(written.columns[0]):
            if value is None:
                labels.broken[i] = "no label; an empty text or list means none of the classes"
                continue
            words = value.split("|") if isinstance(value, str) else list(value)
            found, _, unknown = class_numbers(
                [word for word in words if word != ""], self.classes, written.names
            )
            labels.values[i, [k for k in found if k >= 0]] = 1
            labels.note_unknown(i, unknown)
        return labels

    def check(self, labels: torch.Tensor, where: str) -> None:
        """A row of 0 and 1 for each record."""
        fits = labels.dim() == 2 and labels.shape[1] == self.outputs
        form = f"(records, {self.outputs}) float32 of 0 and 1"
        check_form(labels, form, fits and labels.dtype is torch.float32, where)
        wrong = (labels != 0) & (labels != 1)
        if wrong.any():
            raise DataError(
                f"{where}: labels", float(labels[wrong][0]), "0 (absent) or 1 (present)",
                "Correct the label map.",
            )  # fmt: skip

    def example(self, outputs: torch.Tensor) -> torch.Tensor:
        """Every other class present."""
        count, classes = outputs.shape
        grid = torch.arange(count)[:, None] + torch.arange(classes)
        return (grid % 2).to(outputs)

    def scores(self, outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """AUC and average precision (means over classes that occur both ways), F1, exact match."""
        from torchmetrics.functional.classification import (
            binary_auroc,
            binary_average_precision,
            multilabel_exact_match,
            multilabel_f1_score,
        )

        truth = labels.long()
        both = [k for k in range(self.outputs) if 0 < int(truth[:, k].sum()) < len(truth)]
        chances = outputs.sigmoid()
        areas = [float(binary_auroc(chances[:, k], truth[:, k])) for k in both]
        precisions = [float(binary_average_precision(chances[:, k], truth[:, k])) for k in both]
        several = self.outputs > 1  # torchmetrics wants at least two labels
        wide = chances if several else chances.repeat(1, 2)
        wide_truth = truth if several else truth.repeat(1, 2)
        return {
            "AUC": sum(areas) / len(areas) if areas else float("nan"),
            "average precision": sum(precisions) / len(precisions) if both else float("nan"),
            "F1": float(multilabel_f1_score(wide, wide_truth, wide.shape[1])),
            "exact match": float(multilabel_exact_match(wide, wide_truth, wide.shape[1])),
        }

    def correct(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The share of classes answered rightly."""
        return ((outputs > 0) == (labels > 0.5)).double().mean(dim=1)

    def answers(self, outputs: torch.Tensor) -> list[Answer]:
        """Probability of each class."""
        rows = outputs.sigmoid().tolist()
        return [
            {name: round(p, 6) for name, p in zip(self.classes, row, strict=True)} for row in rows
        ]
