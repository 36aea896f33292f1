"""The two calls of the backbone service, as both sides know them.

    GetManifest(request) -> SignedManifest.to_bytes()
    GetBlob(request)     -> stream of chunks, plain bytes from an offset to the end of the file

A request is a small JSON object, a chunk is the bytes themselves: there is no code to generate,
and no copy of a chunk is made to wrap it. What is right or wrong with an answer is decided by
signature and hash, never by the transport.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedgraft_common.errors import MessageError
from fedgraft_common.manifest import MAX_FILE, BackboneName, Digest

SERVICE: Final = "fedgraft.Backbone"
GET_MANIFEST: Final = f"/{SERVICE}/GetManifest"
GET_BLOB: Final = f"/{SERVICE}/GetBlob"
CHUNK: Final = 1 << 20
"""Bytes of a chunk, as sent."""
MAX_CHUNK: Final = 4 << 20
"""Bytes of a chunk, as accepted."""
MAX_REQUEST: Final = 4096
"""Bytes of a request."""


class ManifestRequest(BaseModel):
    """Which backbone: everything that is given must fit."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: BackboneName | None = None
    sha256: Digest | None = Field(default=None, description="Of model.safetensors.")
    manifest_sha256: Digest | None = Field(default=None, description="Of the manifest.")

    def to_bytes(self) -> bytes:
        """As JSON."""
        return self.model_dump_json(exclude_none=True).encode()


class BlobRequest(BaseModel):
    """Which file, and from which byte."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sha256: Digest
    offset: Annotated[int, Field(ge=0, le=MAX_FILE, description="Bytes to leave out.")] = 0

    def to_bytes(self) -> bytes:
        """As JSON."""
        return self.model_dump_json().encode()


Request = TypeVar("Request", ManifestRequest, BlobRequest)


def read_request(kind: type[Request], content: bytes) -> Request:
    """What `to_bytes` wrote.

    Raises:
        MessageError: anything else.
    """
    if len(content) > MAX_REQUEST:
        raise _malformed(f"{len(content)} bytes", f"at most {MAX_REQUEST} bytes")
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise _malformed(f"a wrong {field or 'document'}", first["msg"]) from None


def _malformed(found: str, allowed: str) -> MessageError:
    return MessageError("backbone request", found, allowed, "Use a client of the same version.")
