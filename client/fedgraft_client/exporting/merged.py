"""The backbone with the adapter worked into its weights: an ordinary model, no PEFT needed."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fedgraft_client.exporting.deployed import Parts
from fedgraft_client.exporting.onnx import first_line
from fedgraft_common.adapted import quiet_peft
from fedgraft_common.errors import ExportError
from fedgraft_common.manifest import is_shareable

TOLERANCE = 1e-4
MODEL = "model.safetensors"
HEAD = "head.safetensors"


def merge(parts: Parts, directory: Path) -> float:
    """Writes the merged backbone and the head.

    A model of transformers becomes a directory that `AutoModel` loads; one of timm or torchvision
    a safetensors file by the library's own names, for `backbone.weights`.

    Args:
        parts: backbone, adapter and head.
        directory: made if need be.

    Returns:
        The largest difference of a feature from the model with the adapter beside it, relative to
        the largest feature where that is above 1.

    Raises:
        ExportError: the adapter is no change of weights (prompts, prefixes), or the merged model
            computes something else.
    """
    backbone, kind = parts.model.backbone, parts.model.head.task.features
    inputs = backbone.example(2, torch.Generator().manual_seed(1))
    adapted: Any = parts.model.model
    if getattr(adapted.active_peft_config, "is_prompt_learning", False):
        raise ExportError(
            "merged", f"an adapter of {adapted.active_peft_config.peft_type.value}",
            "an adapter that changes weights", "Export it in PEFT's format.",
        )  # fmt: skip
    with torch.no_grad():
        expected = backbone.features(adapted, inputs, kind)
        merged = _merged(adapted)
        found = backbone.features(merged, inputs, kind)
    gap = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
    if not gap <= TOLERANCE:
        raise ExportError(
            "merged", f"features that differ by {gap:.1e}", f"at most {TOLERANCE:g}",
            "Export the adapter in PEFT's format.",
        )  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    _save(merged, backbone.directory, directory)
    _describe(parts, directory)
    head = {n: t.detach().cpu().contiguous() for n, t in parts.model.head.state_dict().items()}
    save_file(head, directory / HEAD, {"task": parts.model.head.task.spec.model_dump_json()})
    return gap


def _merged(adapted: Any) -> nn.Module:
    try:
        with quiet_peft(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged: nn.Module = copy.deepcopy(adapted).merge_and_unload(progressbar=False)
    except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError) as error:
        raise ExportError(
            "merged", first_line(error), "an adapter that PEFT can merge",
            "Export the adapter in PEFT's format.",
        ) from None  # fmt: skip
    return merged.requires_grad_(False).eval()


def _save(merged: Any, source: Path, directory: Path) -> None:
    if hasattr(merged, "save_pretrained") and hasattr(merged, "config"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged.save_pretrained(directory)
        for path in source.iterdir():  # tokenizer, feature extractor, licence
            if path.is_file() and is_shareable(path.name) and path.suffix != ".safetensors":
                target = directory / path.name
                if not target.exists():
                    shutil.copyfile(path, target)
        return
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in merged.state_dict().items()}
    save_file(tensors, directory / MODEL, {"format": "pt"})


def _describe(parts: Parts, directory: Path) -> None:
    """The manifest, so that the merged model is prepared and read as the backbone was."""
    backbone = parts.model.backbone
    about: Any = backbone.preparation
    manifest = backbone.manifest.model_dump(mode="json", exclude_defaults=True)
    manifest |= {
        "name": f"{backbone.manifest.name}-merged",
        "source": {"backbone": backbone.sha256, "plan": parts.plan},
        "preprocessing": about.model_dump(mode="json", exclude={"directory"}),
        "blocks": list(backbone.blocks),
    }
    if backbone.pooling is not None:
        manifest["pooling"] = backbone.pooling
    (directory / "manifest.json").write_text(
        json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
