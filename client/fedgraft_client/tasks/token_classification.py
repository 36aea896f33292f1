"""One class for each token of a text, or for each step of a series.

Labels: (N, T) int64, indices into the classes, `IGNORED` where there is none (padding, the later
pieces of a word). Outputs: (N, T, K) unnormalised log-probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from fedgraft_client.head import simplex_prototypes
from fedgraft_client.tasks.reading import Labels, Written, class_numbers
from fedgraft_client.tasks.single_label import class_scores
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
from fedgraft_common.backbone import Backbone
from fedgraft_common.errors import DataError
from fedgraft_common.features import FeatureKind
from fedgraft_common.modality import Raw
from fedgraft_common.preparations.text import TextPreparation
from fedgraft_common.task_spec import TaskSpec


class TokenClassification:
    """Multinomial logistic regression on the features of each token.

    Args:
        spec: `classes`.
        weights: the plan's weight of each class by name.

    Raises:
        DataError: the classes cannot be told apart.
    """

    features: FeatureKind = "tokens"
    primary: ClassVar[str] = "F1"
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
        """Mean cross-entropy of a record's labelled tokens; 0 if it has none."""
        weights = outputs.new_tensor(self.weights)
        found = functional.cross_entropy(
            outputs.transpose(1, 2), labels, weights, ignore_index=IGNORED, reduction="none"
        )
        return mean_over_places(found, labels)

    def read(self, written: Written) -> Labels:
        """A column of lists, one class for each word of the text or step of the series."""
        rows, labels = [], Labels(torch.empty(0))
        for i, value in enumerate(written.columns[0]):
            tags = value.split() if isinstance(value, str) else list(value or ())
            found, _, unknown = class_numbers(tags, self.classes, written.names)
            labels.note_unknown(i, unknown)
            words = len(written.texts[i].split(" ")) if written.texts else len(tags)
            if len(tags) != words:
                labels.broken[i] = f"{len(tags)} labels for {words} words"
            rows.append(torch.tensor(found, dtype=torch.int64))
        labels.values = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        return labels

    def align(self, labels: torch.Tensor, inputs: Raw, backbone: Backbone) -> torch.Tensor:
        """A word's label goes to its first token, the others are left out (Devlin et al. 2019)."""
        if isinstance(inputs, torch.Tensor):
            return labels
        preparation = backbone.preparation
        if not isinstance(preparation, TextPreparation):
            raise DataError(
                "task: kind", "token-classification", "a backbone that reads text",
                "Choose another backbone, or another task.",
            )  # fmt: skip
        places = preparation.words(inputs)
        found = torch.full(places.shape, IGNORED)
        begins = torch.ones_like(places, dtype=torch.bool)
        begins[:, 1:] = places[:, 1:] != places[:, :-1]
        here = (places >= 0) & begins & (places < labels.shape[1])
        row = torch.arange(len(places))[:, None].expand_as(places)
        found[here] = labels[row[here], places[here]]
        return found

    def check(self, labels: torch.Tensor, where: str) -> None:
        """A class number, or `IGNORED`, for each token."""
        fits = labels.dim() == 2 and labels.dtype is torch.int64
        check_form(labels, "(records, tokens) int64 class indices", fits, where)
        check_indices(labels, self.classes, where, IGNORED)

    def example(self, outputs: torch.Tensor) -> torch.Tensor:
        """The classes in turn, the last token of each record without one."""
        count, tokens = outputs.shape[:2]
        grid = torch.arange(count)[:, None] + torch.arange(tokens)
        labels = grid.to(outputs.device) % self.outputs
        labels[:, -1] = IGNORED
        return labels

    def scores(self, outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Of the labelled tokens, all together: F1 (mean over classes) and accuracy."""
        known = labels != IGNORED
        if not known.any():
            return {"F1": float("nan"), "accuracy": float("nan")}
        found = class_scores(outputs[known].softmax(dim=1), labels[known])
        return {"F1": found["F1"], "accuracy": found["accuracy"]}

    def correct(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The share of a record's labelled tokens that are right; 1 if it has none."""
        wrong = (outputs.argmax(dim=2) != labels).double()
        return 1 - mean_over_places(wrong, labels)

    def answers(self, outputs: torch.Tensor) -> list[Answer]:
        """The most probable class of each token."""
        rows = outputs.argmax(dim=2).tolist()
        return [{"tokens": [self.classes[i] for i in row]} for row in rows]
