"""Per-example gradients, and the check that they are what they claim to be.

Differential privacy rests on clipping the gradient of each record. Opacus' hooks take the first
dimension of every layer's input for the record, which some models (sequence first, windows
folded into the batch) silently violate; a frozen BatchNorm silences them altogether. So every
model is compared with the definition, a loop over single records, on synthetic inputs before any
private record is touched, and the first exact method in the list is used:

    hooks   Opacus' GradSampleHooks: fastest
    vmap    torch.func: each record alone, vectorised
    loop    each record alone, one after the other: the definition

Shapes: N records; a per-example gradient has shape (N, *parameter.shape), float32. What a label is
depends on the task: a class index (N,) int64, or any tensor with N records first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from fedgraft_client.prefix import Cached
from fedgraft_common.errors import FedgraftError, GradientError

TOLERANCE = 1e-4  # largest allowed error, relative to the record's whole gradient
CHECK_RECORDS = 3
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A task's loss of each record, (N,), from what the model gives and labels, N records first both.

A record's loss must depend on that record alone."""


def class_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each record, (N,), from logits (N, K) and labels (N,) int64."""
    return functional.cross_entropy(logits, labels, reduction="none")


class Engine(Protocol):
    """Sets `grad_sample` (N, *shape) on every trained parameter of a model."""

    name: str

    def __call__(self, cached: Cached, labels: torch.Tensor) -> None:
        """Computes the gradients of N >= 1 records with their labels."""

    def close(self) -> None:
        """Leaves the model as it was found."""


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that receive gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Hooks:
    """Opacus' hooks on each layer (no wrapper around the model)."""

    name = "hooks"

    def __init__(self, model: nn.Module, loss: Loss = class_loss) -> None:
        self._model = model
        self._loss = loss
        self._parameters = list(trained(model).values())  # a walk over all modules, done once
        self._attach()

    def _attach(self) -> None:
        from opacus.grad_sample import GradSampleHooks

        try:
            self._hooks = GradSampleHooks(
                self._model, batch_first=True, loss_reduction="sum", strict=False
            )
        except BaseException:  # what was attached before it failed would spoil the next engine
            for handle in self._model.__dict__.pop("autograd_grad_sample_hooks", []):
                handle.remove()
            raise

    def __call__(self, cached: Cached, labels: torch.Tensor) -> None:
        try:
            self._compute(cached, labels)
        except BaseException:  # a forward pass without its backward would spoil the next batch
            self.close()
            self._attach()
            raise

    def _compute(self, cached: Cached, labels: torch.Tensor) -> None:
        parameters = self._parameters
        for parameter in parameters:
            parameter.grad_sample = None  # type: ignore[attr-defined]
        with warnings.catch_warnings():  # no input needs a gradient: that is what frozen means
            warnings.filterwarnings("ignore", message=".*[Ff]ull backward hook.*")
            loss = self._loss(self._model(*cached), labels).sum()
            torch.autograd.backward(loss, inputs=parameters)
        for parameter in parameters:
            parameter.grad = None
            if parameter.grad_sample is None:  # type: ignore[attr-defined]
                parameter.grad_sample = parameter.new_zeros(len(labels), *parameter.shape)  # type: ignore[attr-defined]

    def close(self) -> None:
        self._hooks.cleanup()


class Vmap:
    """torch.func: the gradient of one record's loss, vectorised over records."""

    name = "vmap"

    def __init__(self, model: nn.Module, loss: Loss = class_loss) -> None:
        def objective(
            parameters: dict[str, torch.Tensor], cached: Cached, label: torch.Tensor
        ) -> torch.Tensor:
            one = tuple(tensor.unsqueeze(0) for tensor in cached)
            output = functional_call(model, parameters, one)
            return loss(output, label.unsqueeze(0)).sum()

        self._model = model
        self._gradient: Callable[..., dict[str, torch.Tensor]] = vmap(
            grad(objective), in_dims=(None, 0, 0)
        )

    def __call__(self, cached: Cached, labels: torch.Tensor) -> None:
        parameters = trained(self._model)
        values = {name: p.detach() for name, p in parameters.items()}
        with warnings.catch_warnings():  # an operator without a batching rule is slower, not wrong
            warnings.filterwarnings("ignore", message=".*performance drop.*")
            gradients = self._gradient(values, cached, labels)
        for name, gradient in gradients.items():
            parameters[name].grad_sample = gradient.detach()  # type: ignore[attr-defined]

    def close(self) -> None:
        pass


class Loop:
    """One record at a time: slow, obvious, the definition of a per-example gradient."""

    name = "loop"

    def __init__(self, model: nn.Module, loss: Loss = class_loss) -> None:
        self._model = model
        self._loss = loss

    def __call__(self, cached: Cached, labels: torch.Tensor) -> None:
        parameters = list(trained(self._model).values())
        rows: list[list[torch.Tensor]] = [[] for _ in parameters]
        for i in range(len(labels)):
            one = tuple(tensor[i : i + 1] for tensor in cached)
            loss = self._loss(self._model(*one), labels[i : i + 1]).sum()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for row, parameter, gradient in zip(rows, parameters, gradients, strict=True):
                row.append(torch.zeros_like(parameter) if gradient is None else gradient)
        for parameter, row in zip(parameters, rows, strict=True):
            parameter.grad_sample = torch.stack(row)  # type: ignore[attr-defined]

    def close(self) -> None:
        pass


ENGINES: tuple[Callable[[nn.Module, Loss], Engine], ...] = (Hooks, Vmap, Loop)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of checking one engine.

    Attributes:
        engine: its name.
        error: largest relative error against the loop; infinity if it did not run.
        note: why it did not run, or an empty string.
    """

    engine: str
    error: float
    note: str = ""

    @property
    def exact(self) -> bool:
        """Whether the engine may touch private data."""
        return self.error <= TOLERANCE


def choose_engine(
    model: nn.Module, cached: Cached, labels: torch.Tensor, loss: Loss = class_loss
) -> tuple[Engine, tuple[Verdict, ...]]:
    """The first exact engine for a model, found on synthetic records.

    Trained parameters get random values for the check and their own back after it: at the usual
    start (zero head, LoRA's B zero) most gradients vanish and an error would not show.

    Args:
        model: maps cached tensors to what the loss takes, such as logits (N, K).
        cached: what the prefix keeps for a few synthetic records.
        labels: of these records, on the same device.
        loss: of the task.

    Returns:
        The engine, attached and ready, and the verdict on each engine tried.

    Raises:
        GradientError: no engine agrees with the definition, or the definition is not
            deterministic (dropout that cannot be turned off, for example).
    """
    parameters = trained(model)
    own = {name: p.detach().clone() for name, p in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(0.3 * noise)
    verdicts: list[Verdict] = []
    try:
        truth = _gradients(Loop(model, loss), model, cached, labels)
        for make in ENGINES:
            engine, verdict = _try(make, model, cached, labels, loss, truth)
            verdicts.append(verdict)
            if engine is not None and verdict.exact:
                return engine, tuple(verdicts)
            if engine is not None:
                engine.close()
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(own[name])
    raise GradientError(
        "per-example gradients",
        ", ".join(f"{v.engine}: error {v.error:.1e} {v.note}".strip() for v in verdicts),
        f"a relative error of at most {TOLERANCE:g} against single records",
        "This backbone and adapter cannot be trained under DP; choose others.",
    )


def _gradients(
    engine: Engine, model: nn.Module, cached: Cached, labels: torch.Tensor
) -> torch.Tensor:
    """All per-example gradients side by side: (N, number of trained values)."""
    engine(cached, labels)
    parameters = trained(model).values()
    rows = [p.grad_sample.reshape(len(labels), -1) for p in parameters]  # type: ignore[attr-defined]
    return torch.cat(rows, dim=1)


def _try(
    make: Callable[[nn.Module, Loss], Engine],
    model: nn.Module,
    cached: Cached,
    labels: torch.Tensor,
    loss: Loss,
    truth: torch.Tensor,
) -> tuple[Engine | None, Verdict]:
    name = getattr(make, "name", str(make))
    engine: Engine | None = None
    try:
        engine = make(model, loss)
        found = _gradients(engine, model, cached, labels)
        error = float(((found - truth).norm(dim=1) / truth.norm(dim=1).clamp(min=1e-12)).max())
    except FedgraftError:
        raise
    except Exception as failure:  # whatever a foreign model does, the answer is "not this engine"
        if engine is not None:
            engine.close()
        return None, Verdict(name, float("inf"), f"({type(failure).__name__})")
    return engine, Verdict(name, error if error == error else float("inf"))
