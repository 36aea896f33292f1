"""One or several numbers for each record.

Labels: (N, K) float32 in the targets' own units. Outputs: (N, K) in a public unit: -1 is a
target's `low`, 1 its `high`. The range is configuration; a range taken from the data would tell
of the largest record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.nn import functional

from fedgraft_client.head import orthogonal_prototypes
from fedgraft_client.tasks.reading import Labels, Written, numbers
from fedgraft_client.tasks.task import Answer, Prototype, check_form
from fedgraft_common.errors import DataError
from fedgraft_common.features import FeatureKind
from fedgraft_common.task_spec import TaskSpec


class Regression:
    """Linear regression on the features with Huber's loss (Huber 1964).

    Args:
        spec: `targets`, `low` and `high`.
        weights: of no meaning here.

    Raises:
        DataError: no target, or a range that is missing or empty.
    """

    features: FeatureKind = "pooled"
    primary: ClassVar[str] = "R2"
    countable: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, spec: TaskSpec, weights: Mapping[str, float] | None = None) -> None:
        self.spec = spec
        count = len(spec.targets)
        if count == 0 or len(set(spec.targets)) < count:
            raise DataError(
                "task: targets", ", ".join(spec.targets) or "none", "different names, at least one",
                "Name what is predicted.",
            )  # fmt: skip
        ranges = list(zip(spec.low, spec.high, strict=False))
        if not len(spec.low) == len(spec.high) == count or any(a >= b for a, b in ranges):
            raise DataError(
                "task: low, high", f"{list(spec.low)}, {list(spec.high)}",
                f"{count} numbers each, low below high", "State a public range for each target.",
            )  # fmt: skip
        self.low, self.high = torch.tensor(spec.low), torch.tensor(spec.high)

    @property
    def outputs(self) -> int:
        """K, one for each target."""
        return len(self.spec.targets)

    def prototype(self, seed: int, features: int) -> Prototype:
        """Directions at right angles; a target is read off along its own."""
        rows = orthogonal_prototypes(seed, self.spec.targets, features)
        return rows, torch.zeros(self.outputs)

    def _scaled(self, labels: torch.Tensor) -> torch.Tensor:
        low, high = self.low.to(labels), self.high.to(labels)
        return (2 * (labels - low) / (high - low) - 1).clamp(-1, 1)

    def _values(self, outputs: torch.Tensor) -> torch.Tensor:
        low, high = self.low.to(outputs), self.high.to(outputs)
        return low + (outputs.clamp(-1, 1) + 1) / 2 * (high - low)

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Huber's loss in the public unit, mean over targets."""
        scaled = self._scaled(labels)
        return functional.huber_loss(outputs, scaled, reduction="none").mean(dim=1)

    def read(self, written: Written) -> Labels:
        """A column of numbers for each target."""
        return numbers(written.columns)

    def check(self, labels: torch.Tensor, where: str) -> None:
        """A row of finite numbers for each record."""
        fits = labels.dim() == 2 and labels.shape[1] == self.outputs
        form = f"(records, {self.outputs}) float32, one for each of {', '.join(self.spec.targets)}"
        check_form(labels, form, fits and labels.dtype is torch.float32, where)
        if not labels.isfinite().all():
            first = int((~labels.isfinite()).any(dim=1).nonzero()[0])
            raise DataError(
                f"{where}: labels", f"NaN or infinity in record {first}", "finite numbers",
                "Leave out records whose target was not measured.",
            )  # fmt: skip

    def example(self, outputs: torch.Tensor) -> torch.Tensor:
        """Numbers spread over the range."""
        count = len(outputs)
        share = (torch.arange(count, device=outputs.device)[:, None] + 0.5) / count
        low, high = self.low.to(outputs), self.high.to(outputs)
        return low + share.to(outputs) * (high - low)

    def scores(self, outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """R2, mean absolute error and root mean squared error; means over targets."""
        from torchmetrics.functional.regression import (
            mean_absolute_error,
            mean_squared_error,
            r2_score,
        )

        values, columns = self._values(outputs), range(self.outputs)
        varies = len(labels) > 1 and bool((labels.var(dim=0) > 0).all())
        errors = [mean_absolute_error(values[:, k], labels[:, k]) for k in columns]
        squared = [mean_squared_error(values[:, k], labels[:, k], squared=False) for k in columns]
        return {
            "R2": float(r2_score(values, labels)) if varies else float("nan"),
            "MAE": float(torch.stack(errors).mean()),
            "RMSE": float(torch.stack(squared).mean()),
        }

    def correct(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """1 minus the error as a share of the target's range, mean over targets."""
        error = (outputs.clamp(-1, 1) - self._scaled(labels)).abs() / 2
        return (1 - error).double().mean(dim=1)

    def answers(self, outputs: torch.Tensor) -> list[Answer]:
        """Each target in its own unit."""
        rows = self._values(outputs).tolist()
        return [
            {name: round(v, 6) for name, v in zip(self.spec.targets, row, strict=True)}
            for row in rows
        ]
