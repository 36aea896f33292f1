"""The next token of a text, at every place.

Labels: (N, T) int64, the token that follows, `IGNORED` at the end and where there is padding; they
are the text itself, so a record needs no other. Outputs: (N, T, V) unnormalised log-probabilities.

The head is the backbone's own table of tokens, public and frozen: a private one of V x D values
would be all noise under DP. So what is adapted is the backbone, and at the end the site refits
one number for each token, how often it is used there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from fedgraft_client.tasks.reading import Labels, Written
from fedgraft_client.tasks.task import IGNORED, Answer, Prototype, check_form, mean_over_places
from fedgraft_common.adapted import AdaptedBackbone
from fedgraft_common.backbone import Backbone
from fedgraft_common.errors import DataError, PlanError
from fedgraft_common.features import FeatureKind
from fedgraft_common.modality import Raw
from fedgraft_common.task_spec import TaskSpec


class LanguageModelling:
    """The model's own prediction of the next token.

    Args:
        spec: nothing of it is used.
        weights: of no meaning here.
    """

    features: FeatureKind = "tokens"
    primary: ClassVar[str] = "accuracy"
    countable: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype] = torch.int64

    def __init__(self, spec: TaskSpec, weights: Mapping[str, float] | None = None) -> None:
        self.spec = spec

    @property
    def outputs(self) -> int:
        """None: a private head has no place here."""
        raise PlanError(
            "head.training", "private", "fixed, for language-modelling: the head is the "
            "backbone's own table of tokens", 'Set head.training = "fixed" in the plan.',
        )  # fmt: skip

    def prototype(self, seed: int, features: int) -> Prototype:
        """Not drawn; see `vocabulary_head`."""
        raise PlanError(
            "backbone.source", "a backbone without a table of tokens", "a language model",
            "Choose another backbone for language-modelling.",
        )  # fmt: skip

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of a record's tokens; 0 if it has only one."""
        found = functional.cross_entropy(
            outputs.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        return mean_over_places(found, labels)

    def read(self, written: Written) -> Labels:
        """Nothing: the text is its own label."""
        return Labels(torch.full((len(written.texts), 1), IGNORED))

    def align(self, labels: torch.Tensor, inputs: Raw, backbone: Backbone) -> torch.Tensor:
        """The token that follows, at each place."""
        prepared = dict(zip(backbone.input_names, backbone.prepare(inputs), strict=True))
        if "input_ids" not in prepared:
            raise DataError(
                "task: kind", "language-modelling", "a backbone that reads text",
                "Choose another backbone, or another task.",
            )  # fmt: skip
        return next_tokens(prepared["input_ids"], prepared.get("attention_mask"))

    def check(self, labels: torch.Tensor, where: str) -> None:
        """Token numbers."""
        fits = labels.dim() == 2 and labels.dtype is torch.int64
        check_form(labels, "(records, tokens) int64 token numbers", fits, where)
        wrong = (labels < 0) & (labels != IGNORED)
        if wrong.any():
            raise DataError(
                f"{where}: labels", int(labels[wrong][0]), f"0 or more, or {IGNORED}",
                "Take the numbers that the backbone's tokenizer gives.",
            )  # fmt: skip

    def example(self, outputs: torch.Tensor) -> torch.Tensor:
        """The tokens in turn, none at the end."""
        count, tokens, vocabulary = outputs.shape
        grid = torch.arange(count)[:, None] + torch.arange(tokens)
        labels = grid.to(outputs.device) % vocabulary
        labels[:, -1] = IGNORED
        return labels

    def scores(self, outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Share of tokens that were the most probable ones, and perplexity; of all records."""
        from torchmetrics.functional.text import perplexity

        known = labels != IGNORED
        if not known.any():
            return {"accuracy": float("nan"), "perplexity": float("nan")}
        right = (outputs.argmax(dim=2) == labels)[known].double().mean()
        found = perplexity(outputs, labels, ignore_index=IGNORED)
        return {"accuracy": float(right), "perplexity": float(found)}

    def correct(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The share of a record's tokens that were the most probable ones."""
        wrong = (outputs.argmax(dim=2) != labels).double()
        return 1 - mean_over_places(wrong, labels)

    def answers(self, outputs: torch.Tensor) -> list[Answer]:
        """The number of the most probable token after the last one."""
        return [{"next token": i} for i in outputs[:, -1].argmax(dim=1).tolist()]


def next_tokens(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Labels of texts: at each place the token that follows.

    Args:
        tokens: (N, T) int64.
        mask: (N, T), 0 where there is padding.
    """
    labels = torch.full_like(tokens, IGNORED)
    labels[:, :-1] = tokens[:, 1:]
    if mask is not None:
        labels[:, :-1][(mask[:, 1:] == 0) | (mask[:, :-1] == 0)] = IGNORED
    return labels


def vocabulary_table(adapted: AdaptedBackbone) -> torch.Tensor:
    """(V, D): the backbone's table of tokens, which is also its own output layer.

    Raises:
        PlanError: it has none of that width, its output layer is another, or a token's features
            depend on later tokens, which are what is asked for.
    """
    model = adapted.backbone.model
    table = getattr(model, "get_input_embeddings", lambda: None)()
    width = adapted.feature_dim
    if not isinstance(table, nn.Embedding) or table.embedding_dim != width:
        raise PlanError(
            "backbone.source", "a backbone without a table of tokens as wide as its features",
            "a language model", "Choose another backbone for language-modelling.",
        )  # fmt: skip
    if not getattr(model.config, "tie_word_embeddings", False):
        raise PlanError(
            "backbone.source", "a backbone whose output layer is not its table of tokens",
            "one with tie_word_embeddings in its config.json, such as GPT-2",
            "Choose another backbone for language-modelling.",
        )  # fmt: skip
    if not _looks_back_only(adapted):
        raise PlanError(
            "backbone.source", "a backbone that reads text in both directions",
            "one that reads forwards, such as GPT-2", "It would see what it is to predict; choose "
            "another backbone for language-modelling.",
        )  # fmt: skip
    return table.weight.detach().clone()


def _looks_back_only(adapted: AdaptedBackbone) -> bool:
    """Whether changing the last token of a text leaves the features of the others as they are."""
    inputs = adapted.backbone.example(1, torch.Generator().manual_seed(0))
    device = next(adapted.parameters()).device
    changed = [tensor.clone() for tensor in inputs]
    tokens = changed[adapted.backbone.input_names.index("input_ids")]
    tokens[:, -1] = (tokens[:, -1] + 1) % int(tokens.max() + 2)
    with torch.no_grad():
        first = adapted(*(tensor.to(device) for tensor in inputs))[:, :-1]
        second = adapted(*(tensor.to(device) for tensor in changed))[:, :-1]
    return bool(torch.allclose(first, second, rtol=0, atol=1e-6))
