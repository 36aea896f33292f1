"""Backbones: frozen pre-trained models, whichever source they come from.

Beside the weights may lie a `manifest.json` that says where they came from, how the input is
prepared and which blocks may carry adapters; without it the constants come from the model's own
files, and the blocks are found by looking. Weights are read from safetensors only; a pickle is
never opened, and no code that came with a model runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedgraft_common import plan as plans
from fedgraft_common.description import Manifest
from fedgraft_common.errors import BackboneError
from fedgraft_common.features import FeatureKind, Pooling, as_map, as_tokens, pool
from fedgraft_common.manifest import check_directory
from fedgraft_common.modality import Modality, Raw
from fedgraft_common.preparations import Preparation
from fedgraft_common.sources import find_source
from fedgraft_common.sources.directory import embedded_directory
from fedgraft_common.sources.source import Read

__all__ = ["Backbone", "Manifest", "embedded_directory", "load_backbone"]


@dataclass(frozen=True, slots=True)
class Backbone:
    """A loaded backbone: every parameter frozen, in eval mode, on the CPU.

    Attributes:
        preparation: makes the model's inputs of raw records.
        read: runs the model, or the same with an adapter, on its named inputs.
    """

    model: nn.Module
    manifest: Manifest
    sha256: str
    pooling: Pooling | None
    blocks: tuple[str, ...]
    directory: Path
    preparation: Preparation
    read: Read

    @property
    def modality(self) -> Modality:
        """Which raw form the backbone wants; see `fedgraft_common.modality.FORMS`."""
        return self.preparation.modality

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the model calls its inputs, in the order of the prepared tensors."""
        return self.preparation.input_names

    def prepare(self, raw: Raw) -> tuple[torch.Tensor, ...]:
        """The model's input tensors, N records first each, named by `input_names`.

        Raises:
            DataError: the records have not the form of `modality`.
        """
        return self.preparation(raw)

    def example(self, records: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Synthetic prepared inputs, for checks without data."""
        return self.preparation.example(records, generator)

    def features(
        self, model: nn.Module, inputs: tuple[torch.Tensor, ...], kind: FeatureKind = "pooled"
    ) -> torch.Tensor:
        """What a head gets: (N, D), (N, T, D) or (N, D, H, W) float32; see `features.py`.

        Args:
            model: this backbone's model, or the same with an adapter.
            inputs: prepared.
            kind: what the task needs.
        """
        named = dict(zip(self.input_names, inputs, strict=True))
        output = self.read(model, named)
        mask = named.get("attention_mask")
        if kind == "tokens":
            return as_tokens(output, mask)
        if kind == "map":
            return as_map(output)
        return self.standardise(pool(output, self.pooling, mask))

    def standardise(self, features: torch.Tensor) -> torch.Tensor:
        """Features (N, D) in units of the backbone's own public training data.

        Pooled features of a network that ends in a ReLU all point the same way; a head, and a
        fixed head above all, needs them centred. The statistics come with the backbone, never
        from a site's data; without them features are left as they are.
        """
        if not self.manifest.feature_mean:
            return features
        mean = features.new_tensor(self.manifest.feature_mean)
        return (features - mean) / features.new_tensor(self.manifest.feature_std)


def load_backbone(config: plans.Backbone, directory: Path | None = None) -> Backbone:
    """Loads what the plan names and checks its hash.

    Args:
        config: the plan's section.
        directory: where the model lies, if not where `config.source` says: what a site fetched
            for `server:NAME`. The hashes are checked all the same.

    Raises:
        BackboneError: no such model, no safetensors, a pickle instead, a damaged or incomplete
            file, a hash other than the plan's, or a `server:NAME` that was not fetched.
    """
    kind, _, location = config.source.partition(":")
    if directory is not None:
        kind, location = "dir", str(directory)
    elif kind == "embedded":
        kind, location = "dir", str(embedded_directory(location))
    if config.manifest_sha256 is not None:
        if kind != "dir":
            raise BackboneError(
                "backbone.manifest_sha256", config.source, "a directory or a fetched backbone",
                "Pin this source with backbone.sha256.",
            )  # fmt: skip
        check_directory(Path(location), config.manifest_sha256)
    loaded = find_source(kind).load(location, config)
    own = loaded.manifest.pooling
    return Backbone(
        model=loaded.model,
        manifest=loaded.manifest,
        sha256=loaded.sha256,
        pooling=own if config.pooling == "auto" else config.pooling,
        blocks=loaded.blocks,
        directory=loaded.directory,
        preparation=loaded.preparation,
        read=loaded.read,
    )
