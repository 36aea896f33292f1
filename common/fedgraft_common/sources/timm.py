"""`timm:NAME`: image networks of timm, with weights from a local file or the hub's cache.

The weights are timm's own safetensors files, by timm's names. timm adapts the first convolution
to `in_chans` and position embeddings to `img_size`, if `backbone.options` asks for another.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from fedgraft_common import plan as plans
from fedgraft_common.description import Manifest, read_manifest
from fedgraft_common.errors import BackboneError
from fedgraft_common.preparations import build
from fedgraft_common.sources import weights
from fedgraft_common.sources.blocks import find_stages
from fedgraft_common.sources.hub import fetched
from fedgraft_common.sources.source import Loaded, Output, base_of


def load(name: str, config: plans.Backbone) -> Loaded:
    """Builds the named network and fills it.

    Raises:
        BackboneError: timm knows no such network or option, there are no weights for it on this
            machine, they are no safetensors, incomplete, or have another hash than the plan's.
    """
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise BackboneError(
            "backbone.source", f"timm:{name}", "a name that timm.list_models() lists",
            "Correct the plan.",
        )  # fmt: skip
    file = _file(name, config)
    digest = weights.check_hash((file,), config.sha256)
    return _loaded(name, file, digest, config, read_manifest(file.parent, f"timm:{name}"), {})


def load_directory(directory: Path, file: Path, digest: str, config: plans.Backbone) -> Loaded:
    """Builds the network that timm's own config.json in a directory names."""
    described = json.loads((directory / "config.json").read_bytes())
    about = described.get("pretrained_cfg", {})
    name = str(described["architecture"])
    manifest = read_manifest(directory, directory.name)
    return _loaded(name, file, digest, config, manifest, about if isinstance(about, dict) else {})


def _file(name: str, config: plans.Backbone) -> Path:
    if config.weights is not None:
        return weights.file_of(Path(config.weights))
    import timm

    about = timm.models.get_pretrained_cfg(name)
    repository = None if about is None else about.hf_hub_id
    if not repository:
        raise BackboneError(
            "backbone.weights", f"none, and timm has no published weights for {name}",
            "a safetensors file", "Name one, or choose another network.",
        )  # fmt: skip
    wanted = {"repo_id": repository, "filename": weights.WEIGHTS}
    return Path(fetched("hf_hub_download", f"timm:{name} ({repository})", wanted))


def _loaded(
    name: str,
    file: Path,
    digest: str,
    config: plans.Backbone,
    manifest: Manifest,
    about: dict[str, Any],
) -> Loaded:
    model = _build(name, file, config)
    constants = {**model.pretrained_cfg, **about}
    channels, size = int(constants["input_size"][0]), int(constants["input_size"][-1])
    channels = int(dict(config.options).get("in_chans", channels))  # type: ignore[arg-type]
    size = int(dict(config.options).get("img_size", size))  # type: ignore[arg-type]
    settings = manifest.preprocessing or {
        "channels": channels,
        "size": size,
        "mean": _per_channel(constants["mean"], channels),
        "std": _per_channel(constants["std"], channels),
    }
    preparation = build(settings, "image", file.parent, str(file), config.preprocessing)
    blocks = manifest.blocks or find_stages(model)
    return Loaded(model, manifest, preparation, _read, blocks, digest, file.parent)


def _build(name: str, file: Path, config: plans.Backbone) -> Any:
    import timm
    from safetensors import SafetensorError
    from timm.layers.config import set_fused_attn

    logging.getLogger("timm").setLevel(logging.ERROR)
    set_fused_attn(False)  # vmap can trace the plain products, and on CPUs they are as fast
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with safe_open(file, "pt") as tensors:
                names = set(tensors.keys())
            options: dict[str, Any] = {**config.options, "num_classes": 0}
            overlay = {"file": str(file), "custom_load": False}
            model = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, **options
            )
    except (OSError, RuntimeError, TypeError, ValueError, KeyError, AssertionError,
            AttributeError, SafetensorError) as error:  # fmt: skip
        reason = str(error).splitlines()[-1].strip() if str(error) else type(error).__name__
        raise BackboneError(
            "backbone.source", f"timm:{name} with {file}", f"a network and its weights ({reason})",
            "Correct backbone.options, or take the file of this network.",
        ) from None  # fmt: skip
    weights.require(model, names, file)
    return model.float().requires_grad_(False).eval()


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    """The constants, or their mean where the network was made for other channels."""
    given = tuple(float(value) for value in values)
    return given if len(given) == channels else (sum(given) / len(given),) * channels


def _read(model: nn.Module, named: dict[str, torch.Tensor]) -> Output:
    """Tokens or map, and timm's own pooling before its classifier."""
    base = base_of(model)
    hidden = base.forward_features(named["pixel_values"])
    pooled = base.forward_head(hidden, pre_logits=True)
    if hidden.dim() == 4 and getattr(base, "output_fmt", "NCHW") == "NHWC":
        hidden = hidden.permute(0, 3, 1, 2)
    return Output(hidden, pooled)
