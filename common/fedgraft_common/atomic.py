"""Files that are replaced in one step: a reader sees the old one or the new one.

Apart from `files.py`, so that what writes no tensors (keys, certificates) does not import torch.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Replaces a file in one step.

    Args:
        path: its directory is made if need be.
        content: all of it.
        durable: whether to wait until the disk has it (fsync of file and directory).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        owner_only = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(owner_only, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def remove_leftovers(directory: Path) -> None:
    """Removes what killed processes had begun to write here; only where nobody else writes now."""
    for suffix in ("tmp", "new"):
        for file in directory.glob(f".*.*.{suffix}"):
            file.unlink(missing_ok=True)


def write_new(path: Path, content: bytes, durable: bool = True) -> bool:
    """Writes a file whole, unless there is one: of several processes exactly one succeeds.

    Args:
        path: its directory is made if need be.
        content: all of it.
        durable: whether to wait until the disk has it.

    Returns:
        Whether this call wrote it.
    """
    whole = path.with_name(f".{path.name}.{os.getpid()}.new")
    write_atomically(whole, content, durable)
    try:
        os.link(whole, path)
    except FileExistsError:
        return False
    finally:
        whole.unlink(missing_ok=True)
    return True
