"""What an adapter method has to say, and the registry of methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fedgraft_common.errors import AdapterError
from fedgraft_common.plan import Adapter


@dataclass(frozen=True, slots=True)
class AdapterMethod:
    """One way to adapt a frozen model.

    Attributes:
        name: what `adapter.method` says in a plan.
        suits: whether a module of the backbone can carry this adapter.
        config: builds the PEFT configuration for the chosen module names.
        trains: whether a parameter of the PEFT model, by name, is trained and sent.
        random: whether a parameter is drawn from the plan's public seed at the start; others
            keep what PEFT gave them (zeros for LoRA's B, the backbone's own scale and shift).
        place: what it is attached to: modules that suit, inside the chosen blocks; the blocks as
            a whole; or the model, in front of its first block.
    """

    name: str
    suits: Callable[[nn.Module], bool]
    config: Callable[[Adapter, list[str]], Any]
    trains: Callable[[str], bool]
    random: Callable[[str], bool]
    place: Literal["modules", "blocks", "model"] = "modules"


_METHODS: dict[str, AdapterMethod] = {}


def register(method: AdapterMethod) -> None:
    """Adds a method.

    Raises:
        AdapterError: the name is taken.
    """
    if method.name in _METHODS or method.name == "none":
        raise AdapterError("adapter.method", method.name, "a new name", "Rename the method.")
    _METHODS[method.name] = method


def find_method(name: str) -> AdapterMethod:
    """The method a plan names.

    Raises:
        AdapterError: there is none of that name.
    """
    if name not in _METHODS:
        raise AdapterError(
            "adapter.method", name, ", ".join(sorted([*_METHODS, "none"])), "Choose one of these."
        )
    return _METHODS[name]
