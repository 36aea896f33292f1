"""A site's own output layer: linear, over the backbone's features, never sent.

Shapes: N records, D features, K classes or other outputs of this site's task.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from fedgraft_common.plan import Plan
from fedgraft_common.task_spec import TaskSpec

if TYPE_CHECKING:
    from fedgraft_client.tasks.task import Task


class LinearHead(nn.Module):
    """Outputs (..., K) from features (..., D), which are first brought to unit length.

    Unit length keeps a fixed prototype head on one scale for every backbone and bounds the
    gradient a single record can cause.

    Args:
        features: D.
        outputs: K.
        task: whose loss it is trained with; None: to tell K classes apart.

    Attributes:
        public: whether the weights are the backbone's own, which a refit leaves alone.
    """

    public = False

    def __init__(self, features: int, outputs: int, task: Task | None = None) -> None:
        super().__init__()
        self.task = task or _numbered_classes(outputs)
        self.affine: nn.Conv1d | None = None
        self.linear = nn.Linear(features, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """What the task's loss takes: unnormalised log-probabilities, for classes."""
        outputs: torch.Tensor = self.linear(self.normalise(self.localise(features)))
        return outputs

    def localise(self, features: torch.Tensor) -> torch.Tensor:
        """Features (..., D) through the site's own scale and shift, if it has them."""
        if self.affine is None:
            return features
        shown: torch.Tensor = self.affine(features.reshape(-1, features.shape[-1], 1))
        return shown.reshape(features.shape)

    def with_affine(self) -> Self:
        """The same head with a scale of 1 and a shift of 0 for each feature, trained at home.

        As a convolution of one channel each, because Opacus knows its per-example gradients.
        """
        width = self.linear.in_features
        self.affine = nn.Conv1d(width, width, 1, groups=width)
        nn.init.ones_(self.affine.weight)
        assert self.affine.bias is not None  # noqa: S101 - Conv1d has one unless told otherwise
        nn.init.zeros_(self.affine.bias)
        return self

    def like(self) -> Self:
        """A new head of the same form and task, that trains what this one trains."""
        made = type(self)(self.linear.in_features, self.linear.out_features, self.task)
        made.linear.requires_grad_(self.linear.weight.requires_grad)
        if self.affine is not None:
            made.with_affine()
        return made

    @staticmethod
    def normalise(features: torch.Tensor) -> torch.Tensor:
        """Features (N, D) at unit length."""
        return nn.functional.normalize(features, dim=-1)


def _numbered_classes(count: int) -> Task:
    from fedgraft_client.tasks import build_task  # which draws its prototypes here

    return build_task(TaskSpec(classes=tuple(str(i) for i in range(max(count, 2)))))


def initial_head(plan: Plan, classes: tuple[str, ...], features: int) -> LinearHead:
    """The head a site that tells classes apart starts a run with; see `start_head`."""
    from fedgraft_client.task_head import head_of_width
    from fedgraft_client.tasks import build_task

    return head_of_width(plan, build_task(TaskSpec(classes=classes)), features)


def simplex_prototypes(seed: int, classes: tuple[str, ...], features: int) -> torch.Tensor:
    """A simplex equiangular tight frame: K unit vectors, every pair at cosine -1/(K-1).

    What the classifier of a well-trained network converges to (Papyan, Han and Donoho 2020,
    "Prevalence of neural collapse"). Its rotation is drawn from the plan's seed and the names of
    the classes, both public, so it holds no information about any record.

    Args:
        seed: the plan's seed.
        classes: the site's class names, K of them; sites with the same names agree.
        features: D; if D < K no such frame exists, and independent random directions are used.

    Returns:
        (K, D) float32, rows of length 1.
    """
    count = len(classes)
    gaussian = _public_gaussian(seed, classes, features)
    if features < count:
        return nn.functional.normalize(gaussian, dim=0).T.float()
    basis, _ = torch.linalg.qr(gaussian)
    centred = torch.eye(count, dtype=torch.float64) - 1 / count
    frame: torch.Tensor = math.sqrt(count / (count - 1)) * basis @ centred
    return frame.T.float()


def orthogonal_prototypes(seed: int, names: tuple[str, ...], features: int) -> torch.Tensor:
    """Unit vectors at right angles to each other, for answers that do not exclude each other.

    Args:
        seed: the plan's seed.
        names: of the classes or targets, K of them; sites with the same names agree.
        features: D; if D < K there is no room, and independent random directions are used.

    Returns:
        (K, D) float32, rows of length 1.
    """
    gaussian = _public_gaussian(seed, names, features)
    if features < len(names):
        return nn.functional.normalize(gaussian, dim=0).T.float()
    basis: torch.Tensor = torch.linalg.qr(gaussian)[0]
    return basis.T.float()


def _public_gaussian(seed: int, names: tuple[str, ...], features: int) -> torch.Tensor:
    """(D, K) float64 standard normal, a function of the plan's seed and public names."""
    digest = hashlib.sha256("\0".join(["fedgraft head", str(seed), *names]).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(features, max(len(names), 1), generator=generator, dtype=torch.float64)
