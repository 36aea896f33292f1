"""One class for each pixel.

Labels: (N, H, W) int64, indices into the classes, `IGNORED` for pixels nobody labelled. Outputs:
(N, K, h, w) unnormalised log-probabilities of the feature map's cells, brought to the size of the
labels where they meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.nn import functional

from fedgraft_client.head import simplex_prototypes
from fedgraft_client.tasks.reading import Labels, Written, class_numbers
from fedgraft_client.tasks.task import (
    IGNORED,
    Answer,
    Prototype,
    check_form,
    check_indices,
    mean_over_places,
    need_classes,
    weights_of,
)
from fedgraft_common.features import FeatureKind
from fedgraft_common.task_spec import TaskSpec


class Segmentation:
    """Multinomial logistic regression on the features of each cell.

    Args:
        spec: `classes`, the background among them.
        weights: the plan's weight of each class by name.

    Raises:
        DataError: the classes cannot be told apart.
    """

    features: FeatureKind = "map"
    primary: ClassVar[str] = "mean IoU"
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
        """Mean cross-entropy of a record's labelled pixels; 0 if it has none."""
        weights = outputs.new_tensor(self.weights)
        found = functional.cross_entropy(
            _at(outputs, labels), labels, weights, ignore_index=IGNORED, reduction="none"
        )
        return mean_over_places(found, labels)

    def read(self, written: Written) -> Labels:
        """A column of mask images, whose grey values the label map names (or class numbers)."""
        labels, masks = Labels(torch.empty(0)), []
        for i, value in enumerate(written.columns[0]):
            if written.mask is None or value is None:
                labels.broken[i] = "no mask"
                continue
            try:
                grey = written.mask(value)
            except ValueError as error:
                labels.broken[i] = f"mask: {error}"
                continue
            shades = grey.unique().tolist()
            found, _, unknown = class_numbers(shades, self.classes, written.names)
            labels.note_unknown(i, unknown)
            numbers = torch.zeros(max(shades) + 1, dtype=torch.int64)
            numbers[shades] = torch.tensor(found)
            masks.append((i, numbers[grey]))
        if masks:
            labels.values = torch.full((len(written.columns[0]), *masks[0][1].shape), IGNORED)
        for i, mask in masks:
            if mask.shape == labels.values.shape[1:]:
                labels.values[i] = mask
            else:
                labels.broken[i] = f"a mask of {tuple(mask.shape)} pixels; state data.size"
        return labels

    def check(self, labels: torch.Tensor, where: str) -> None:
        """A class number, or `IGNORED`, for each pixel."""
        fits = labels.dim() == 3 and labels.dtype is torch.int64
        check_form(labels, "(records, height, width) int64 class indices", fits, where)
        check_indices(labels, self.classes, where, IGNORED)

    def example(self, outputs: torch.Tensor) -> torch.Tensor:
        """Diagonal stripes at twice the map's size, one corner without a label."""
        count, _, height, width = outputs.shape
        rows, columns = torch.arange(2 * height), torch.arange(2 * width)
        grid = torch.arange(count)[:, None, None] + rows[:, None] + columns
        labels = grid.to(outputs.device) % self.outputs
        labels[:, 0, 0] = IGNORED
        return labels

    def scores(self, outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Of the labelled pixels: mean IoU and Dice over the classes that occur, and accuracy."""
        from torchmetrics.functional.classification import (
            multiclass_f1_score,
            multiclass_jaccard_index,
        )

        found = _at(outputs, labels).argmax(dim=1)
        present = labels[labels != IGNORED].unique()
        if len(present) == 0:
            return {"mean IoU": float("nan"), "Dice": float("nan"), "accuracy": float("nan")}
        kinds, known = self.outputs, labels != IGNORED
        overlap = multiclass_jaccard_index(found[known], labels[known], kinds, average="none")
        dice = multiclass_f1_score(found[known], labels[known], kinds, average="none")
        return {
            "mean IoU": float(overlap[present].mean()),
            "Dice": float(dice[present].mean()),  # of one class against the rest: F1 of pixels
            "accuracy": float((found == labels)[known].double().mean()),
        }

    def correct(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The share of a record's labelled pixels that are right; 1 if it has none."""
        wrong = (_at(outputs, labels).argmax(dim=1) != labels).double()
        return 1 - mean_over_places(wrong, labels)

    def answers(self, outputs: torch.Tensor) -> list[Answer]:
        """The share of the cells of each class; the map itself is what `outputs` holds."""
        found = outputs.argmax(dim=1)
        return [
            {name: round(float((one == k).double().mean()), 6) for k, name in self._numbered()}
            for one in found
        ]

    def _numbered(self) -> list[tuple[int, str]]:
        return list(enumerate(self.classes))


def _at(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The outputs at the size of the labels."""
    size = labels.shape[-2:]
    if outputs.shape[-2:] == size:
        return outputs
    return functional.interpolate(outputs, size=size, mode="bilinear", align_corners=False)
