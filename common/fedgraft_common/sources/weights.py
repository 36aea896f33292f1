"""Files of weights: safetensors only, hashed before they are used, complete or refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fedgraft_common.errors import BackboneError
from fedgraft_common.manifest import sha256_of

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.th", "*.tar", "*.npz")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def in_directory(directory: Path) -> tuple[Path, ...]:
    """The weights of a model directory: one file, or the shards that its index lists.

    Raises:
        BackboneError: no directory, an adapter in it, no safetensors, or a pickle instead.
    """
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
    if (directory / WEIGHTS).is_file():
        return (directory / WEIGHTS,)
    if (directory / INDEX).is_file():
        return _shards(directory / INDEX)
    pickles = sorted(p.name for pattern in PICKLES for p in directory.glob(pattern))
    if pickles:
        raise pickled(directory / pickles[0])
    raise BackboneError(
        str(directory), f"no {WEIGHTS}", f"a directory with config.json and {WEIGHTS}",
        "Save the model with model.save_pretrained(directory).",
    )  # fmt: skip


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        paths = tuple(sorted(index.parent / str(name) for name in names))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackboneError(
            str(index), str(error), "an index of shards", "Copy the directory again."
        ) from None
    for path in paths:
        if path.parent != index.parent or path.suffix != ".safetensors" or not path.is_file():
            raise BackboneError(
                str(path), "missing, or no safetensors file of this directory",
                f"the shards that {index.name} lists", "Copy the directory again.",
            )  # fmt: skip
    return paths


def file_of(path: Path) -> Path:
    """A plan's `backbone.weights`, if it is a safetensors file.

    Raises:
        BackboneError: no such file, or a pickle.
    """
    if not path.is_file():
        raise BackboneError(
            "backbone.weights", str(path), "an existing safetensors file", "Check the path."
        )
    if path.suffix != ".safetensors":
        if any(path.match(pattern) for pattern in PICKLES):
            raise pickled(path)
        raise BackboneError(
            "backbone.weights", str(path), "a file that ends in .safetensors", "Convert the file."
        )
    return path


def pickled(path: Path) -> BackboneError:
    """The error for weights in a format that may run code."""
    return BackboneError(
        str(path), "a pickle, which can run code when it is opened", "a safetensors file",
        "Convert it where you trust it: model.save_pretrained(directory), or "
        "safetensors.torch.save_file(model.state_dict(), path).",
    )  # fmt: skip


def check_hash(paths: tuple[Path, ...], pinned: str | None) -> str:
    """SHA-256 of the weights, hexadecimal: of the file, or of the list of its shards' hashes.

    Args:
        paths: one file, or shards.
        pinned: what the plan says; None accepts any.

    Raises:
        BackboneError: another hash than the plan's.
    """
    digests = [sha256_of(path) for path in paths]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256(
        "".join(f"{d}  {p.name}\n" for d, p in zip(digests, paths, strict=True)).encode()
    ).hexdigest()  # fmt: skip
    if pinned not in (None, digest):
        raise BackboneError(
            str(paths[0]), f"sha256 {digest}", f"sha256 {pinned}, pinned by the plan",
            "Fetch the right file, or correct backbone.sha256.",
        )  # fmt: skip
    return digest


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, floats in float32.

    Raises:
        BackboneError: it cannot be read.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BackboneError(
            str(path), str(error).splitlines()[0], "a safetensors file", "Copy the file again."
        ) from None
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def fill(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Sets every weight of a model from a file; what the model has no place for is left out.

    Raises:
        BackboneError: a weight is missing, or has another shape.
    """
    require(model, tensors, path)
    own = model.state_dict()
    try:
        model.load_state_dict({n: t for n, t in tensors.items() if n in own}, strict=False)
    except RuntimeError as error:
        raise BackboneError(
            str(path), str(error).splitlines()[-1].strip(), "the shapes of this architecture",
            "Correct backbone.source or backbone.options, or take the right file.",
        ) from None  # fmt: skip


def require(model: nn.Module, names: Iterable[str], path: Path) -> None:
    """Refuses weights that leave a part of the model at its random start.

    Raises:
        BackboneError: a weight is missing.
    """
    held = set(names)
    missing = sorted(
        name
        for name in model.state_dict()
        if name not in held and not name.endswith("num_batches_tracked")
    )
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" * (len(missing) > 3))
        raise BackboneError(
            str(path), f"no weights for {shown}",
            "a file with every weight of the architecture, by its own names",
            "Save the whole model again, or correct backbone.source.",
        )  # fmt: skip
