"""Tensor files that are either whole or refused.

A file is written beside its place and renamed into it, so a reader sees the old one or the new
one. Its metadata holds a SHA-256 of the content, so damage is found when it is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedgraft_common.atomic import write_atomically as write_atomically
from fedgraft_common.errors import CheckpointError

_DIGEST = "sha256"


def save_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    durable: bool = True,
) -> None:
    """Writes a safetensors file with text metadata, atomically."""
    plain = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    facts = {**metadata, _DIGEST: _digest(plain, metadata)}
    write_atomically(path, save(plain, metadata=facts), durable)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads what `save_tensors` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except FileNotFoundError:
        raise CheckpointError(
            str(path), "no such file", "a file written by fedgraft", "Check the path."
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    expected = metadata.pop(_DIGEST, None)
    if expected != _digest(tensors, metadata):
        raise _damaged(path, "content that does not match its SHA-256")
    return tensors, metadata


def _digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        str(path), found, "an undamaged file written by fedgraft",
        "Restore it from a backup, or delete it: an older checkpoint beside it is used then.",
    )  # fmt: skip
