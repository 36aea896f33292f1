"""The head of each kind of task: always one linear layer, applied where the task asks.

Shapes: N records, T tokens, D features, K outputs at a place, V tokens of a vocabulary.
"""

from __future__ import annotations

import torch

from fedgraft_client.few_shot import check_few_shot
from fedgraft_client.head import LinearHead
from fedgraft_client.tasks import Task
from fedgraft_client.tasks.detection import Detection
from fedgraft_client.tasks.language_modelling import LanguageModelling, vocabulary_table
from fedgraft_client.tasks.sequence_to_class import SequenceToClass
from fedgraft_client.tasks.task import no_prototype
from fedgraft_client.zero_shot import text_prototypes
from fedgraft_common.adapted import AdaptedBackbone
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan


class MapHead(LinearHead):
    """Outputs (N, K, H, W) from a feature map (N, D, H, W): the layer at every cell."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        return super().forward(features.movedim(1, -1)).movedim(-1, 1)


class MeanHead(LinearHead):
    """Outputs (N, K) from tokens (N, T, D): the layer at every token, then the mean over them.

    Tokens whose features are all zero are padding and do not count.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        known = features.ne(0).any(dim=-1, keepdim=True).to(features)
        total = (super().forward(features) * known).sum(dim=1)
        return total / known.sum(dim=1).clamp(min=1)


class VocabularyHead(LinearHead):
    """Outputs (N, T, V) from tokens (N, T, D) as the language model itself makes them."""

    public = True

    @staticmethod
    def normalise(features: torch.Tensor) -> torch.Tensor:
        """Features as they are: the table was trained with their length."""
        return features


def empty_head(task: Task, features: int, outputs: int | None = None) -> LinearHead:
    """A head of zeros (of `RARE` answers, for detection).

    Args:
        task: what it is for.
        features: D.
        outputs: K, if not what the task says: a vocabulary's size.

    Raises:
        PlanError: the task has no private head.
    """
    kinds: dict[type, type[LinearHead]] = {
        SequenceToClass: MeanHead,
        LanguageModelling: VocabularyHead,
    }
    kind = kinds.get(type(task), MapHead if task.features == "map" else LinearHead)
    head = kind(features, task.outputs if outputs is None else outputs, task)
    if isinstance(task, Detection):
        with torch.no_grad():
            head.linear.bias.copy_(task.start)
    return head


def start_head(plan: Plan, task: Task, adapted: AdaptedBackbone) -> LinearHead:
    """The head a site starts a run with: trained from nothing, or public and frozen.

    Args:
        plan: says which.
        task: the site's own.
        adapted: the plan's model; its features are of the kind that the task takes.

    Raises:
        PlanError: the plan's choice has no meaning for this task.
    """
    width = adapted.feature_dim
    if isinstance(task, LanguageModelling) and plan.head.training == "fixed":
        table = vocabulary_table(adapted).cpu()
        head = _frozen(empty_head(task, width, len(table)), table, torch.zeros(len(table)))
    elif plan.head.training == "text":
        rows = text_prototypes(plan, task.spec.classes, adapted)
        empty = empty_head(task, width)
        if len(rows) != empty.linear.out_features:
            raise no_prototype(task, "its outputs are not one for each class")
        head = _frozen(empty, rows * plan.head.scale, torch.zeros(len(rows)))
    else:
        head = head_of_width(plan, task, width)
    return head.with_affine() if plan.head.local_affine else head


def head_of_width(plan: Plan, task: Task, features: int) -> LinearHead:
    """The same, for tasks whose head is a function of the plan and of D alone.

    Raises:
        PlanError: the plan's choice has no meaning for this task.
    """
    if plan.head.training == "private":
        return empty_head(task, features)
    if plan.head.training == "prototype":  # zeros until the site's own means are released
        head = empty_head(task, features).requires_grad_(False)
        check_few_shot(head)
        return head
    weight, bias = task.prototype(plan.seed, features)
    return _frozen(empty_head(task, features), weight * plan.head.scale, bias)


def _frozen(head: LinearHead, weight: torch.Tensor, bias: torch.Tensor) -> LinearHead:
    with torch.no_grad():
        head.linear.weight.copy_(weight)
        head.linear.bias.copy_(bias)
    return head.requires_grad_(False)


def initial_state(head: LinearHead) -> Tensors:
    """Where the trained parameters of a head of this form begin."""
    fresh = empty_head(head.task, head.linear.in_features, head.linear.out_features)
    fresh = fresh.with_affine() if head.affine is not None else fresh
    return {name: p.detach() for name, p in fresh.named_parameters()}
