"""Backbones: frozen pre-trained models in the ordinary Hugging Face directory form.

A backbone is a directory with `config.json` and `model.safetensors`, and beside them a
`manifest.json` that says where it came from, how its input is prepared and which blocks may
carry adapters. A directory without a manifest is usable too: the constants are then read from
`preprocessor_config.json`, and the blocks are found by looking. Weights are read from safetensors
only; a pickle is never opened, and no code from the directory runs.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from fedgraft_common import plan as plans
from fedgraft_common.errors import BackboneError
from fedgraft_common.features import FeatureKind, Pooling, as_map, as_tokens, pool
from fedgraft_common.manifest import check_directory
from fedgraft_common.modality import Modality, Raw
from fedgraft_common.preparations import ImagePreparation, Preparation

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class Manifest(BaseModel):
    """What a backbone says about itself."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    licence: str = "unknown"
    source: str | dict[str, Any] = "unknown"
    preprocessing: ImagePreparation
    pooling: Pooling | None = None
    blocks: tuple[str, ...] = ()
    feature_mean: tuple[float, ...] = ()
    feature_std: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Backbone:
    """A loaded backbone: every parameter frozen, in eval mode, on the CPU.

    Attributes:
        preparation: makes the model's inputs of raw records.
    """

    model: nn.Module
    manifest: Manifest
    sha256: str
    pooling: Pooling | None
    blocks: tuple[str, ...]
    directory: Path
    preparation: Preparation

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
        output = model(**named)
        if kind == "tokens":
            return as_tokens(output)
        if kind == "map":
            return as_map(output)
        return self.standardise(pool(output, self.pooling, named.get("attention_mask")))

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


def embedded_directory(name: str) -> Path:
    """The directory of a backbone that ships with Fedgraft.

    Raises:
        BackboneError: there is none of that name.
    """
    root = Path(str(resources.files("fedgraft_common"))) / "embedded"
    directory = root / name
    if not (directory / "config.json").is_file():
        names = sorted(p.name for p in root.iterdir() if (p / "config.json").is_file())
        raise BackboneError(
            "backbone.source", f"embedded:{name}", ", ".join(f"embedded:{n}" for n in names),
            "Choose one of these, or dir:PATH.",
        )  # fmt: skip
    return directory


def load_backbone(config: plans.Backbone, directory: Path | None = None) -> Backbone:
    """Loads what the plan names and checks its hash.

    Args:
        config: the plan's section.
        directory: where the model lies, if not where `config.source` says: what a site fetched
            for `server:NAME`. The hashes are checked all the same.

    Raises:
        BackboneError: no such directory, no safetensors, a pickle instead, a damaged file, a
            hash other than the plan's, or a `server:NAME` that was not fetched.
    """
    directory = directory or _directory(config.source)
    if config.manifest_sha256 is not None:
        check_directory(directory, config.manifest_sha256)
    weights = _weights_file(directory)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if config.sha256 not in (None, digest):
        raise BackboneError(
            str(weights), f"sha256 {digest}", f"sha256 {config.sha256}, pinned by the plan",
            "Fetch the right file, or correct backbone.sha256.",
        )  # fmt: skip
    model = _load_model(directory)
    manifest = _manifest(directory, model)
    pooling: Pooling | None = manifest.pooling if config.pooling == "auto" else config.pooling
    blocks = manifest.blocks or find_blocks(model)
    return Backbone(
        model, manifest, digest, pooling, blocks, directory, preparation=manifest.preprocessing
    )


def _directory(source: str) -> Path:
    kind, _, location = source.partition(":")
    if kind == "server":
        raise BackboneError(
            "backbone.source", source, "embedded:NAME or dir:PATH where nothing is fetched",
            "Fetch it from the federation's server first, then name its directory.",
        )  # fmt: skip
    return embedded_directory(location) if kind == "embedded" else Path(location)


def _weights_file(directory: Path) -> Path:
    if not directory.is_dir():
        raise BackboneError(
            "backbone.source", str(directory), "an existing directory", "Check the path."
        )
    if (directory / "adapter_config.json").exists():
        raise BackboneError(
            str(directory / "adapter_config.json"), "an adapter beside the backbone",
            "a directory with a backbone only: transformers would apply the adapter unasked, and "
            "the backbone's hash would not show it", "Move the adapter to a directory of its own.",
        )  # fmt: skip
    weights = directory / "model.safetensors"
    if weights.is_file():
        return weights
    pickles = sorted(p.name for pattern in PICKLES for p in directory.glob(pattern))
    if pickles:
        raise BackboneError(
            str(directory / pickles[0]), "a pickle, which can run code when it is opened",
            "model.safetensors",
            "Convert it where you trust it: model.save_pretrained(directory).",
        )  # fmt: skip
    raise BackboneError(
        str(directory), "no model.safetensors", "a directory with config.json and "
        "model.safetensors", "Save the model with model.save_pretrained(directory).",
    )  # fmt: skip


def _load_model(directory: Path) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, report = AutoModel.from_pretrained(
                directory,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                attn_implementation="eager",  # faster than flash on CPUs, and vmap can trace it
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackboneError(
            str(directory), reason, "a model that transformers.AutoModel loads offline",
            "Compare the files with the manifest's hashes, or copy the directory again.",
        ) from None  # fmt: skip
    return _without_random_weights(model, report["missing_keys"], directory)


def _without_random_weights(model: Any, missing: Iterable[str], directory: Path) -> nn.Module:
    """Transformers draws what a checkpoint lacks at random: another model in every process.

    A pooler that was never trained is common and is left out; anything else is refused.
    """
    if missing and all(name.startswith("pooler.") for name in missing):
        model.pooler = None
    elif missing:
        raise BackboneError(
            str(directory / "model.safetensors"), f"no weights for {', '.join(sorted(missing))}",
            "a checkpoint with every weight of the architecture in config.json",
            "Save the whole model again, or correct config.json.",
        )  # fmt: skip
    frozen: nn.Module = model.requires_grad_(False).eval()
    return frozen


def _manifest(directory: Path, model: nn.Module) -> Manifest:
    path = directory / "manifest.json"
    try:
        if path.is_file():
            return Manifest.model_validate_json(path.read_bytes())
        return Manifest(name=directory.name, preprocessing=_processor_constants(directory, model))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BackboneError(
            f"{path}: {field}", first["input"], first["msg"], "Correct the file, or remove it."
        ) from None


def _processor_constants(directory: Path, model: nn.Module) -> ImagePreparation:
    config: Any = model.config
    path = directory / "preprocessor_config.json"
    try:
        processor = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise BackboneError(str(path), str(error), "JSON", "Correct or remove the file.") from None
    size = getattr(config, "image_size", None) or processor.get("size", 224)
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    channels = int(getattr(config, "num_channels", 3))
    return ImagePreparation(
        channels=channels,
        size=int(size[0] if isinstance(size, list | tuple) else size),
        mean=tuple(processor.get("image_mean", [0.5] * channels)),
        std=tuple(processor.get("image_std", [0.5] * channels)),
    )


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """The blocks of a model in order: the children of its longest list of like modules.

    Transformers keep theirs in one list (`layers.0`, `layers.1`, ...); a convolutional network
    nests lists (stages of layers), and the innermost lists together are taken.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0
    ]
    longest = max(lists, key=lambda item: len(item[1]), default=None)
    if longest is None:
        return ()
    kind = type(longest[1][0])
    return tuple(
        f"{name}.{index}"
        for name, module in lists
        if all(type(child) is kind for child in module)
        for index in range(len(module))
    )
