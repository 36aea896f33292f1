"""One of several classes that have an order: grades, stages, ratings.

Labels: (N,) int64. Outputs: (N, K - 1) log-odds of going past each class but the last. Trained on
the questions that a record was asked only, which makes the probabilities consistent (Shi, Cao and
Raschka 2023, "Deep neural networks for rank-consistent ordinal regression based on conditional
probabilities").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from fedgraft_client.head import orthogonal_prototypes
from fedgraft_client.tasks.chain import chain_loss, even_odds, reached
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


class Ordinal:
    """A continuation-ratio model on the features.

    Args:
        spec: `classes`, from low to high.
        weights: the plan's weight of each class by name.

    Raises:
        DataError: the classes cannot be told apart.
    """

    features: FeatureKind = "pooled"
    primary: ClassVar[str] = "kappa"
    countable: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype] = torch.int64

    def __init__(self, spec: TaskSpec, weights: Mapping[str, float] | None = None) -> None:
        self.spec = spec
        self.classes = need_classes(spec, "task")
        self.weights = weights_of(self.classes, weights or {})

    @property
    def outputs(self) -> int:
        """K - 1."""
        return len(self.classes) - 1

    def prototype(self, seed: int, features: int) -> Prototype:
        """One direction, from low to high, for every question."""
        row = orthogonal_prototypes(seed, ("\0".join(self.classes),), features)
        return row.repeat(self.outputs, 1), even_odds(self.outputs)

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood, times the plan's weight of the record's class."""
        steps = torch.arange(self.outputs, device=outputs.device)
        went, asked = labels[:, None] > steps, labels[:, None] >= steps
        return chain_loss(outputs, went, asked) * outputs.new_tensor(self.weights)[labels]

    def probabilities(self, outputs: torch.Tensor) -> torch.Tensor:
        """(N, K) probability of each class."""
        past = reached(outputs)
        ends = past.new_ones(len(past), 1), past.new_zeros(len(past), 1)
        return -torch.cat([ends[0], past, ends[1]], dim=1).diff(dim=1)

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
        return torch.arange(len(outputs), device=outputs.device) % len(self.classes)

    def scores(self, outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Quadratically weighted kappa, accuracy, and the mean distance in ranks."""
        from torchmetrics.functional.classification import multiclass_cohen_kappa

        found = self._median(outputs)
        kappa = multiclass_cohen_kappa(found, labels, len(self.classes), weights="quadratic")
        return {
            "kappa": float(kappa),
            "accuracy": float((found == labels).double().mean()),
            "MAE": float((found - labels).abs().double().mean()),
        }

    @staticmethod
    def _median(outputs: torch.Tensor) -> torch.Tensor:
        return (reached(outputs) > 0.5).sum(dim=1)

    def correct(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """1 where the median class is the right one."""
        return (self._median(outputs) == labels).double()

    def answers(self, outputs: torch.Tensor) -> list[Answer]:
        """The median class and its probability."""
        found, chances = self._median(outputs), self.probabilities(outputs)
        best = chances.gather(1, found[:, None])[:, 0].tolist()
        pairs = zip(found.tolist(), best, strict=True)
        return [{"label": self.classes[i], "probability": round(p, 6)} for i, p in pairs]
