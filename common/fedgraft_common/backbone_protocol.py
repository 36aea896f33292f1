"""What site and server say to each other about backbones: two gRPC methods, JSON in, bytes out.

    Manifest   {"backbone": SHA-256}              ->  the signed manifest
    Blob       {"sha256": SHA-256, "offset": N}   ->  a stream: the file's bytes from N on

Requests are so small that a code generator would be more to maintain than it saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from fedgraft_common.manifest import MAX_FILE, Digest

SERVICE: Final = "fedgraft.v1.Backbone"
MANIFEST: Final = "Manifest"
BLOB: Final = "Blob"
CHUNK: Final = 2**20
"""Bytes of one message of a stream, at most."""
MAX_REQUEST: Final = 4096
"""Bytes."""
FRAME: Final = 2**20
"""Bytes of an HTTP/2 frame, at most; gRPC's own 16 KiB cost a tenth of the speed."""


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ManifestRequest(_Request):
    """Asks for the manifest of a backbone."""

    backbone: Digest = Field(description="SHA-256 of model.safetensors.")


class BlobRequest(_Request):
    """Asks for the rest of a file."""

    sha256: Digest
    offset: int = Field(default=0, ge=0, le=MAX_FILE, description="Bytes that are there already.")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of one side of mutual TLS.

    Attributes:
        ca: the federation's CA, the only one trusted.
        certificate: this side's own.
        key: its private key.
    """

    ca: Path
    certificate: Path
    key: Path
