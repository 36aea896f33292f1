"""One class of several for each record.

Labels: (N,) int64, indices into the classes. Outputs: (N, K) unnormalised log-probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.nn import functional

from fedgraft_client.head import simplex_prototypes
from fedgraft_client.tasks.reading import Labels, Written, class_numbers
from fedgraft_client.tasks.task import (
    Answer,
    Prototype,
    check_form,
    check_indices,
    need_classes,
    weights_of,
)
from fedgraft_common.features import FeatureKind
from fedgraft_common.task_spec import TaskSpec


class SingleLabel:
    """Multinomial logistic regression on the features.

    Args:
        spec: `classes`.
        weights: the plan's weight of each class by name.

    Raises:
        DataError: the classes cannot be told apart.
    """

    features: FeatureKind = "pooled"
    primary: ClassVar[str] = "accuracy"
    countable: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype] = torch.int64

    def __init__(self, spec: TaskSpec, weights: Mapping[str, float] | None = None) -> None:
        self.spec = spec
        self.classes = need_classes(spec, "task")
        self.weights = weights_of(self.classes, weights or {})

    @property
    def outputs(self) -> int:
        """K, one for each class."""
        return len(self.classes)

    def prototype(self, seed: int, features: int) -> Prototype:
        """A simplex equiangular frame; see `simplex_prototypes`."""
        return simplex_prototypes(seed, self.classes, features), torch.zeros(self.outputs)

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, times the plan's weight of the record's class."""
        found = functional.cross_entropy(outputs, labels, reduction="none")
        if set(self.weights) == {1.0}:
            return found
        return found * outputs.new_tensor(self.weights)[labels]

    def read(self, written: Written) -> Labels:
        """Classes of one column; see `class_numbers`."""
        found, broken, unknown = class_numbers(written.columns[0], self.classes, written.names)
        return Labels(torch.tensor(found), broken, unknown)

    def check(self, labels: torch.Tensor, where: str) -> None:
        """One class number for each record."""
        fits = labels.dim() == 1 and labels.dtype is torch.int64
        check_form(labels, "one int64 class index for each record", fits, where)
        check_indices(labels, self.classes, where)

    def example(self, outputs: torch.Tensor) -> torch.Tensor:
        """The classes in turn."""
        return torch.arange(len(outputs), device=outputs.device) % self.outputs

    def scores(self, outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Accuracy, balanced accuracy, F1 and AUC (mean over classes, one against the rest)."""
        return class_scores(outputs.softmax(dim=1), labels)

    def correct(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """1 where the most probable class is the right one."""
        return (outputs.argmax(dim=1) == labels).double()

    def answers(self, outputs: torch.Tensor) -> list[Answer]:
        """The most probable class and its probability."""
        best = outputs.softmax(dim=1).max(dim=1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"label": self.classes[i], "probability": round(p, 6)} for i, p in pairs]


def class_scores(probabilities: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Scores of probabilities (M, K) against labels (M,); means are over the classes that occur.

    The AUC is NaN unless at least two classes occur.
    """
    from torchmetrics.functional.classification import (
        binary_auroc,
        multiclass_accuracy,
        multiclass_f1_score,
    )

    classes = probabilities.shape[1]
    present = labels.unique()
    correct = (probabilities.argmax(dim=1) == labels).double().mean()
    recall = multiclass_accuracy(probabilities, labels, classes, average="none")
    f1 = multiclass_f1_score(probabilities, labels, classes, average="none")
    chosen = present[-1:] if classes == 2 else present  # of two classes, the second
    areas = [binary_auroc(probabilities[:, k], (labels == k).long()) for k in chosen.tolist()]
    auc = torch.stack(areas).mean() if len(present) > 1 else torch.tensor(float("nan"))
    return {
        "accuracy": float(correct),
        "balanced accuracy": float(recall[present].mean()),
        "F1": float(f1[present].mean()),
        "AUC": float(auc),
    }
