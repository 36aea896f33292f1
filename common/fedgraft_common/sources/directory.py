"""`dir:PATH` and `embedded:NAME`: models in the ordinary Hugging Face directory form."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedgraft_common import plan as plans
from fedgraft_common.description import read_manifest
from fedgraft_common.errors import BackboneError
from fedgraft_common.preparations import build
from fedgraft_common.sources import families, weights
from fedgraft_common.sources.blocks import find_blocks
from fedgraft_common.sources.source import Loaded


def load(location: str, config: plans.Backbone) -> Loaded:
    """Loads a directory with config.json and safetensors weights.

    Raises:
        BackboneError: no such directory, no safetensors, a pickle instead, a damaged file, an
            incomplete checkpoint, or a hash other than the plan's.
    """
    directory = Path(location)
    if config.weights is None:
        files = weights.in_directory(directory)
    elif directory.is_dir():
        files = (weights.file_of(Path(config.weights)),)
    else:
        raise BackboneError(
            "backbone.source", str(directory), "an existing directory", "Check the path."
        )
    digest = weights.check_hash(files, config.sha256)
    if _is_timm(directory):
        from fedgraft_common.sources import timm

        return timm.load_directory(directory, files[0], digest, config)
    model = _load_model(directory, None if config.weights is None else files[0], config)
    manifest = read_manifest(directory, directory.name)
    modality = families.modality_of(model, config.modality)
    found = families.preparation_settings(model, directory, modality)
    given = found if manifest.preprocessing is None else manifest.preprocessing
    if modality != "image":  # the manifest's constants, and what only the model can know
        given = found | (manifest.preprocessing or {})
    preparation = build(
        given, modality, directory,
        str(directory / "manifest.json") if manifest.preprocessing is not None else str(directory),
        config.preprocessing,
    )  # fmt: skip
    blocks = manifest.blocks or families.blocks_of(model, modality) or find_blocks(model)
    read = families.reader_of(model, modality)
    return Loaded(model, manifest, preparation, read, blocks, digest, directory)


def load_embedded(name: str, config: plans.Backbone) -> Loaded:
    """Loads a backbone that ships with Fedgraft.

    Raises:
        BackboneError: as `load`, or there is none of that name.
    """
    return load(str(embedded_directory(name)), config)


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


def _is_timm(directory: Path) -> bool:
    """Whether config.json is timm's, which names an architecture and no model type."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return False  # transformers says what is wrong with it
    return isinstance(config, dict) and "architecture" in config and "model_type" not in config


def _load_model(directory: Path, file: Path | None, config: plans.Backbone) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options: dict[str, Any] = {} if file is None else {"state_dict": weights.read(file)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            described = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, **dict(config.options)
            )
            families.settle(described)
            kind = families.class_of(described)
            if file is not None:  # an Auto class wants a directory, the class itself does not
                with torch.device("meta"):
                    kind = type(kind.from_config(described))
            model, report = kind.from_pretrained(
                directory if file is None else None,
                config=described,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                attn_implementation="eager",  # faster than flash on CPUs, and vmap can trace it
                **options,
            )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackboneError(
            str(directory), reason, "a model that transformers.AutoModel loads offline",
            "Compare the files with the manifest's hashes, or copy the directory again.",
        ) from None  # fmt: skip
    where = directory / weights.WEIGHTS if file is None else file
    return _without_random_weights(model, report["missing_keys"], where)


def _without_random_weights(model: Any, missing: Iterable[str], where: Path) -> nn.Module:
    """Transformers draws what a checkpoint lacks at random: another model in every process.

    A pooler that was never trained is common and is left out, as a segmenter's output layer always
    is; anything else is refused.
    """
    model = families.without_output_layer(model)
    missing = [name for name in missing if not name.startswith(families.OUTPUT_LAYER)]
    if missing and all(name.startswith("pooler.") for name in missing):
        model.pooler = None
    elif missing:
        raise BackboneError(
            str(where), f"no weights for {', '.join(sorted(missing))}",
            "a checkpoint with every weight of the architecture in config.json",
            "Save the whole model again, or correct config.json.",
        )  # fmt: skip
    frozen: nn.Module = model.requires_grad_(False).eval()
    return frozen
