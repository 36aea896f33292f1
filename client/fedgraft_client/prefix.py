"""The frozen part before the first adapted block, computed once per record.

Shapes: N records; everything a site caches has N as its first dimension.

Everything that runs before the first adapted block is a pure function of the record. A `Prefix`
runs the model up to that block's door and keeps what would have gone in; later it runs the rest
from there. It needs no knowledge of the architecture: when the rest is run, every module that
finished before the door is replaced by a stub that returns placeholder zeros, and the block
receives the kept tensors instead. If anything else flows past the door (a skip connection from
an early stage, say), the result would differ; that is checked on synthetic records when the
object is made, and then the whole model is run each time and `reason` says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fedgraft_common.adapted import AdaptedBackbone

Cached = tuple[torch.Tensor, ...]
_HARMLESS = (nn.modules.dropout._DropoutNd, nn.Identity)
"""Modules that do nothing in eval mode: they may run on placeholders, and again behind the door."""


class _AtTheDoor(Exception):  # noqa: N818 - a signal, not an error
    """Carries a block's inputs out of a forward pass that need not go on."""

    def __init__(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.arguments = (arguments, options)


class Prefix(nn.Module):
    """A model cut in two: `compute` is the frozen part, `forward` the rest.

    Attributes:
        reason: why nothing is cached, or None if the model was cut.
        door: name of the first adapted block; `features` for a head-only plan.
    """

    def __init__(self, model: AdaptedBackbone, tolerance: float = 1e-5) -> None:
        super().__init__()
        self.model = model
        self.reason: str | None = None
        self._skipped: list[tuple[nn.Module, Callable[..., Any], Any]] = []
        self._layout: pytree.TreeSpec | None = None
        self._constants: list[Any] = []
        self._given: Cached | None = None
        self._entry: tuple[nn.Module, ...] = ()  # in a tuple: already registered inside the model
        example = model.backbone.example(1, torch.Generator())
        self._blank = torch.zeros_like(example[0])
        self._beside = 0  # inputs that are kept as they are
        self.door = model.adapted_blocks[0] if model.adapted_blocks else "features"
        if model.adapter and not model.adapted_blocks:
            self.door = "inputs"
            self.reason = "the adapter stands before the first block"
        elif model.adapter:
            self._cut(tolerance)

    def _cut(self, tolerance: float) -> None:
        device = next(self.model.parameters()).device
        drawn = self.model.backbone.example(3, torch.Generator().manual_seed(1))
        example = tuple(tensor.to(device) for tensor in drawn)
        self._beside = len(example) - 1
        self._entry = (self._root().get_submodule(self.door),)
        own = self.model.state()
        try:
            self._learn_what_to_skip(example)
            cached = self.compute(*example)
            self._disturb()  # kept tensors must not hold anything of the adapter
            with torch.no_grad():
                whole = self.model(*example)
                gap = float((whole - self(*cached)).abs().max() / whole.abs().max().clamp(min=1))
            problem = None if gap <= tolerance else "something flows past it"
            if any(c.each != 1 for c in self._constants if isinstance(c, _Rows)):
                problem = "it is given a tensor with parts of records folded together"
        except Exception as error:  # whatever a foreign model does, the answer is "not cut"
            problem = f"the rest does not run alone ({_first_line(error)})"
        finally:
            self.model.load(own)
        if problem is not None:
            self.reason = f"the model cannot be cut before {self.door}: {problem}"
            self._restore()

    def _disturb(self) -> None:
        """Another adapter than the start, where LoRA does nothing."""
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.model.adapter.values():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise.to(parameter.device))

    def _root(self) -> nn.Module:
        peft: Any = self.model.peft
        root: nn.Module = peft.get_base_model() if hasattr(peft, "get_base_model") else peft
        return root

    def _learn_what_to_skip(self, example: tuple[torch.Tensor, ...]) -> None:
        """Two traced passes: which modules finish before the door, and what they return.

        With two records, then with three: what changes its shape depends on the records.
        """
        two, outputs = self._trace(tuple(tensor[:2] for tensor in example))
        three, others = self._trace(example)
        values, self._layout = pytree.tree_flatten(two)
        more, layout = pytree.tree_flatten(three)
        if layout != self._layout:
            raise ValueError("it is given a list with a part for each record")
        self._constants = [_place(a, b) for a, b in zip(values, more, strict=True)]
        outer = {child for module in outputs for child in module.modules() if child is not module}
        for module, output in outputs.items():
            if module not in outer and not isinstance(module, _HARMLESS):
                output = pytree.tree_map(_place, output, others[module])
                self._skipped.append((module, module.forward, output))
                module.forward = self._stub(module.forward, output)
        self._entry[0].register_forward_pre_hook(self._hand_over, with_kwargs=True)

    def _trace(self, example: tuple[torch.Tensor, ...]) -> tuple[Any, dict[nn.Module, Any]]:
        """What the door is given, and what each module returned that finished before it."""
        finished: dict[nn.Module, Any] = {}
        handles = []
        for name, module in self._root().named_modules():
            if name and module not in self._entry:
                handles.append(module.register_forward_hook(self._note(finished)))
        handles.append(self._entry[0].register_forward_pre_hook(_stop, with_kwargs=True))
        try:
            with torch.no_grad():
                self.model(*example)
        except _AtTheDoor as door:
            return door.arguments, finished
        finally:
            for handle in handles:
                handle.remove()
        raise RuntimeError(f"{self.door} does not run")

    @staticmethod
    def _note(finished: dict[nn.Module, Any]) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            finished[module] = output

        return hook

    def _stub(self, original: Callable[..., Any], output: Any) -> Callable[..., Any]:
        """A forward that skips the module while the rest is run alone."""

        def placeholder(value: Any) -> Any:
            if not isinstance(value, _Rows):
                return value
            assert self._given is not None  # noqa: S101 - only called while the rest runs
            return value.blank(self._given[0])

        def forward(*arguments: Any, **options: Any) -> Any:
            if self._given is None:
                return original(*arguments, **options)
            return pytree.tree_map(placeholder, output)

        return forward

    def _hand_over(self, _: nn.Module, arguments: Any, options: Any) -> Any:
        if self._given is None or self._layout is None:
            return arguments, options
        given = iter(self._given)
        values = [
            next(given).movedim(0, c.place) if isinstance(c, _Rows) else c for c in self._constants
        ]
        return pytree.tree_unflatten(values, self._layout)

    def _restore(self) -> None:
        for module, original, _ in self._skipped:
            module.forward = original
        self._skipped.clear()
        self._layout = None

    def compute(self, *inputs: torch.Tensor) -> Cached:
        """What to keep for prepared inputs: features, or the door's tensors.

        Inputs after the first (an attention mask, say) are small and often needed behind the
        door, too, so they are kept beside. A model that cannot be cut keeps all inputs.
        """
        if not self.model.adapter:
            return (self.model(*inputs),)
        if self._layout is None:
            return inputs
        handle = self._entry[0].register_forward_pre_hook(_stop, with_kwargs=True, prepend=True)
        try:
            with torch.no_grad():
                self.model(*inputs)
        except _AtTheDoor as door:
            values = pytree.tree_leaves(door.arguments)
            kept = (
                value.movedim(c.place, 0)
                for value, c in zip(values, self._constants, strict=True)
                if isinstance(c, _Rows)
            )
            return (*kept, *inputs[1:])
        finally:
            handle.remove()
        raise RuntimeError(f"{self.door} did not run")  # the example went through it

    def forward(self, *cached: torch.Tensor) -> torch.Tensor:
        """Features from what `compute` kept."""
        if not self.model.adapter:
            return cached[0]
        if self._layout is None:
            features: torch.Tensor = self.model(*cached)
            return features
        kept = len(cached) - self._beside
        self._given = cached[:kept]
        try:
            blank = self._blank.to(cached[0].device).expand(len(cached[0]), *self._blank.shape[1:])
            return self.model(blank, *cached[kept:])  # type: ignore[no-any-return]
        finally:
            self._given = None


def _first_line(error: Exception) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__


def _stop(_: nn.Module, arguments: Any, options: Any) -> None:
    raise _AtTheDoor(arguments, options)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A tensor that depends on the records: its shape without them, and where they are.

    `each` is how many rows of that dimension belong to one record: 1, or more where parts of a
    record (windows, say) are folded into it.
    """

    place: int
    each: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def blank(self, given: torch.Tensor) -> torch.Tensor:
        """Zeros that take no memory, for as many records as are given."""
        shape = list(self.shape)
        shape[self.place] = self.each * len(given)
        return torch.zeros((), dtype=self.dtype, device=given.device).expand(shape)


def _place(two: Any, three: Any) -> Any:
    """Where the records are in a value, from the same value for two and for three records."""
    if not isinstance(two, torch.Tensor) or two.shape == three.shape:
        return two
    differ = [i for i, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
    each, rest = divmod(two.shape[differ[0]], 2)
    if len(differ) > 1 or rest or three.shape[differ[0]] != 3 * each:
        raise ValueError("a number of rows that does not follow from the number of records")
    return _Rows(differ[0], each, tuple(two.shape), two.dtype)
