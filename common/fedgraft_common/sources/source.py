"""What a source of backbones has to give, and the registry of sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedgraft_common import plan as plans
from fedgraft_common.description import Manifest
from fedgraft_common.errors import BackboneError
from fedgraft_common.preparations import Preparation

Read = Callable[[nn.Module, dict[str, torch.Tensor]], Any]
"""Runs a model (with or without an adapter) on its named inputs.

What it gives has `last_hidden_state`, (N, T, D) tokens or an (N, D, H, W) map, and maybe
`pooler_output`, (N, D, ...)."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model as its source gives it.

    Attributes:
        model: every weight from a file, or from a public seed; no class-specific output layer.
        manifest: what is known about it.
        preparation: makes the model's inputs of raw records.
        read: runs it.
        blocks: modules that may carry adapters, in order.
        sha256: of the weights.
        directory: where the weights lie.
    """

    model: nn.Module
    manifest: Manifest
    preparation: Preparation
    read: Read
    blocks: tuple[str, ...]
    sha256: str
    directory: Path


@dataclass(frozen=True, slots=True)
class Source:
    """One place backbones come from.

    Attributes:
        kind: what stands before the colon in `backbone.source`.
        load: gives the model of what stands behind it. Raises BackboneError.
    """

    kind: str
    load: Callable[[str, plans.Backbone], Loaded]


@dataclass(frozen=True, slots=True)
class Output:
    """A model's output, by the names that transformers gave them."""

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None = None


def base_of(model: nn.Module) -> Any:
    """The backbone's own module inside PEFT's wrapper; adapters stay in place in it."""
    inner: Any = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


_SOURCES: dict[str, Source] = {}


def register(source: Source) -> None:
    """Adds a source.

    Raises:
        BackboneError: the kind is taken.
    """
    if source.kind in _SOURCES or source.kind == "server":
        raise BackboneError("backbone.source", source.kind, "a new kind", "Rename the source.")
    _SOURCES[source.kind] = source


def find_source(kind: str) -> Source:
    """The source of a kind.

    Raises:
        BackboneError: there is none, or it is `server`, which must be fetched first.
    """
    if kind == "server":
        raise BackboneError(
            "backbone.source", "server:NAME", "embedded:NAME or dir:PATH where nothing is fetched",
            "Fetch it from the federation's server first, then name its directory.",
        )  # fmt: skip
    if kind not in _SOURCES:
        raise BackboneError(
            "backbone.source", kind, ", ".join(f"{name}:..." for name in sorted(_SOURCES)),
            "Choose one of these.",
        )  # fmt: skip
    return _SOURCES[kind]
