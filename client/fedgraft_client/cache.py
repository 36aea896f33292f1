"""Where cached prefix outputs live: in memory, or beyond a size in a private mapped file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from fedgraft_client.prefix import Cached

MEMORY_LIMIT = 256 * 2**20  # bytes of one site's cache that stay in memory


def keep(cached: Cached, directory: Path, limit: int = MEMORY_LIMIT) -> Cached:
    """Moves large tensors into memory-mapped files.

    They hold private data in another form, so a file is readable by its owner only and has no
    name: it is gone with the process, whichever way that ends.

    Args:
        cached: tensors with the site's records as first dimension.
        directory: where the files are made; the site's own disk.
        limit: bytes up to which they stay in memory.

    Returns:
        The same values.
    """
    if sum(tensor.nbytes for tensor in cached) <= limit:
        return cached
    directory.mkdir(parents=True, exist_ok=True)
    mapped = []
    for tensor in cached:
        with tempfile.NamedTemporaryFile(dir=directory) as file:  # mode 0600
            file.truncate(tensor.nbytes)
            storage = torch.UntypedStorage.from_file(file.name, shared=True, nbytes=tensor.nbytes)
        view = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape)  # type: ignore[call-overload]
        mapped.append(view.copy_(tensor))
    return tuple(mapped)
