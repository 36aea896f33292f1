"""The bugs that an audit must catch, planted into the production code for a while.

Each one is a mistake that was made in real systems and that leaves everything looking normal: the
model learns, the ledger adds up, the report says the promised epsilon. PRIVACY.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft_client.dp import JointOptimizer
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.site import Site
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan
from fedgraft_simulations.audit.replaced import replaced


@dataclass(frozen=True, slots=True)
class Bug:
    """A planted mistake.

    Attributes:
        name: a few words.
        mistake: what the code does wrong.
        plant: puts it into the production code, for plans like the one given.
    """

    name: str
    mistake: str
    plant: Callable[[Plan], AbstractContextManager[None]]


@contextmanager
def no_noise(plan: Plan) -> Iterator[None]:
    """The clipped sum leaves as it is, or as integers without a share of noise."""

    def add_noise(self: Any) -> None:
        for parameter in self.params:
            total = parameter.summed_grad
            parameter.grad = torch.zeros_like(parameter) if total is None else total.clone()

    def no_share(self: NoiseSource, size: int, sampler: Any) -> NDArray[np.int64]:
        return np.zeros(size, dtype=np.int64)

    with (
        replaced(JointOptimizer, "add_noise", add_noise),
        replaced(NoiseSource, "discrete_gaussian", no_share),
    ):
        yield


@contextmanager
def noise_divided_twice(plan: Plan) -> Iterator[None]:
    """The noise is scaled for an average and then averaged again with the sum."""
    gaussian = NoiseSource.gaussian
    batch = plan.training.expected_batch

    def weaker(self: NoiseSource, shape: Any, std: float) -> torch.Tensor:
        return gaussian(self, shape, std / batch)

    share = NoiseSource.discrete_gaussian

    def weaker_share(self: NoiseSource, size: int, sampler: Any) -> NDArray[np.int64]:
        return np.rint(share(self, size, sampler) / batch).astype(np.int64)

    with (
        replaced(NoiseSource, "gaussian", weaker),
        replaced(NoiseSource, "discrete_gaussian", weaker_share),
    ):
        yield


@contextmanager
def no_clipping(plan: Plan) -> Iterator[None]:
    """Gradients are summed as they are; the noise is as strong as for clipped ones."""

    def accumulate(self: Any) -> None:
        for parameter in self.params:
            _add(parameter, parameter.grad_sample.sum(dim=0))

    with replaced(JointOptimizer, "clip_and_accumulate", accumulate):
        yield


@contextmanager
def seed_reuse(plan: Plan) -> Iterator[None]:
    """Every round of a site starts from the same seed."""

    def repeated(self: Site, purpose: str, plan: Plan, number: int) -> NoiseSource:
        return NoiseSource.for_simulation(purpose, plan.hash, self.config.name)

    with replaced(Site, "_noise", repeated):
        yield


@contextmanager
def head_outside(plan: Plan) -> Iterator[None]:
    """Clipping and noise cover the adapter only; the head is trained as if it were alone."""
    initialise = JointOptimizer.__init__

    def without_head(self: Any, *args: Any, **keywords: Any) -> None:
        initialise(self, *args, **keywords)
        for group in self.param_groups[1:]:
            group["noise_std"] = 0.0

    def accumulate(self: Any) -> None:
        adapter = self.param_groups[0]["params"]
        norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in adapter]).norm(dim=0)
        factors = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        for parameter in adapter:
            _add(parameter, torch.einsum("i,i...", factors, parameter.grad_sample))
        for group in self.param_groups[1:]:
            for parameter in group["params"]:
                _add(parameter, parameter.grad_sample.sum(dim=0))

    with (
        replaced(JointOptimizer, "__init__", without_head),
        replaced(JointOptimizer, "clip_and_accumulate", accumulate),
    ):
        yield


@contextmanager
def shuffling(plan: Plan) -> Iterator[None]:
    """Batches of one size from a shuffled list of records, accounted as Poisson samples."""
    round_of = vars(Site)["_round"]
    current, decks = [""], {}  # type: ignore[var-annotated]

    def here(self: Site, *args: Any) -> Tensors:
        current[0] = self.config.name
        update: Tensors = round_of(self, *args)
        return update

    def deal(self: NoiseSource, size: int, rate: float) -> NDArray[np.int64]:
        wanted = max(1, round(rate * size))
        deck: list[int] = decks.get((current[0], size), [])
        if len(deck) < wanted:
            keys = self.gaussian((size,), 1.0).numpy()
            deck = np.argsort(keys).tolist()
        decks[current[0], size] = deck[wanted:]
        return np.sort(np.array(deck[:wanted], dtype=np.int64))

    with replaced(Site, "_round", here), replaced(NoiseSource, "poisson_sample", deal):
        yield


def _add(parameter: Any, gradient: torch.Tensor) -> None:
    """Adds to a parameter's sum."""
    before = parameter.summed_grad
    parameter.summed_grad = gradient if before is None else before + gradient


BUGS = (
    Bug("no noise", "The clipped sum leaves without noise.", no_noise),
    Bug(
        "noise divided twice", "The noise is divided by the batch size once too often.",
        noise_divided_twice,
    ),
    Bug("no clipping", "Gradients are summed without clipping.", no_clipping),
    Bug("seed reuse", "Every round draws the same random numbers.", seed_reuse),
    Bug("head outside", "The head is trained without clipping and noise.", head_outside),
    Bug("shuffling", "Batches are shuffled, and accounted as Poisson samples.", shuffling),
)  # fmt: skip
