"""The distribution manifest: which files make up a backbone, signed by the federation's operator.

A backbone travels as a flat directory. Its manifest lists every file with size and SHA-256, so a
site knows what it will get before it gets it, and the operator's Ed25519 signature says that the
operator chose these files. The signed text is the canonical form (sorted JSON without white
space) after a fixed prefix, which keeps a signature on a manifest from serving for anything else.

A plan names a backbone by the SHA-256 of `model.safetensors`. File names come from the network, so
they are plain names of a few kinds: no separators, nothing hidden, no pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedgraft_common.errors import BackboneError

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
MAX_FILES: Final = 64
MAX_FILE: Final = 2**40
"""Bytes of one file."""
MAX_SIGNED: Final = 256 * 1024
"""Bytes of a signed manifest."""
_PREFIX: Final = b"fedgraft backbone manifest 1\n"
_READ: Final = 2**20
_SUFFIXES: Final = (".json", ".safetensors", ".txt", ".md")
_ADAPTER: Final = "adapter_config.json"  # transformers would apply the adapter unasked

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
BackboneName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
FileName = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,119}\.(json|safetensors|txt|md)$",
        description="Plain name in the backbone's directory.",
    ),
]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Strict):
    """One file."""

    name: FileName
    size: int = Field(ge=0, le=MAX_FILE, description="Bytes.")
    sha256: Digest


class DistributionManifest(_Strict):
    """What a server hands out as one backbone."""

    format: Literal[1] = 1
    name: BackboneName
    files: tuple[FileEntry, ...] = Field(min_length=2, max_length=MAX_FILES, strict=False)
    licence: str = Field(default="unknown", max_length=500)
    source: str = Field(default="unknown", max_length=4000, description="Where it came from.")

    @model_validator(mode="after")
    def _whole_and_plain(self) -> DistributionManifest:
        names = [entry.name for entry in self.files]
        if len({name.lower() for name in names}) < len(names):
            raise ValueError("a file name occurs twice")
        if missing := {CONFIG, WEIGHTS} - set(names):
            raise ValueError(f"{', '.join(sorted(missing))} is missing")
        if _ADAPTER in names:
            raise ValueError(f"{_ADAPTER} would change the model without changing its hash")
        return self

    @property
    def sha256(self) -> str:
        """The backbone's identity in a plan: SHA-256 of model.safetensors."""
        return next(entry.sha256 for entry in self.files if entry.name == WEIGHTS)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)

    @property
    def canonical(self) -> bytes:
        """Sorted JSON without white space, UTF-8."""
        document = self.model_dump(mode="json")
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def build_manifest(directory: Path, name: str | None = None) -> DistributionManifest:
    """Lists a backbone directory's files.

    Args:
        directory: config.json and model.safetensors, perhaps fedgraft's manifest.json, from which
            name, licence and source are taken. Hidden files and sub-directories are left out.
        name: the name in plans (`server:NAME`); None for the manifest's, else the directory's.

    Raises:
        BackboneError: a file of a kind that is not handed out, or no backbone.
    """
    entries = []
    for path in _visible_files(directory):
        if path.suffix not in _SUFFIXES:
            raise BackboneError(
                str(path), f"a file of kind {path.suffix or 'without ending'}",
                f"only {', '.join(_SUFFIXES)}: a pickle can run code when it is opened",
                "Remove it from the directory, or save the model as safetensors.",
            )  # fmt: skip
        entries.append(
            {"name": path.name, "size": path.stat().st_size, "sha256": file_sha256(path)}
        )
    facts = _facts(directory / "manifest.json")
    source = facts.get("source", "unknown")
    document = {
        "name": name or facts.get("name") or directory.name,
        "files": entries,
        "licence": str(facts.get("licence", "unknown"))[:500],
        "source": (source if isinstance(source, str) else json.dumps(source))[:4000],
    }
    return _validated(document, str(directory))


def sign_manifest(manifest: DistributionManifest, key: Ed25519PrivateKey) -> bytes:
    """The signed manifest as it travels: JSON with the signed text and the signature."""
    text = manifest.canonical
    signature = b64encode(key.sign(_PREFIX + text)).decode("ascii")
    document = {"manifest": text.decode(), "signature": signature}
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def verify_manifest(signed: bytes, key: Ed25519PublicKey) -> DistributionManifest:
    """Reads a signed manifest; nothing of it is looked at before the signature is verified.

    Args:
        signed: what `sign_manifest` gave.
        key: the operator's.

    Raises:
        BackboneError: not a signed manifest, another signer, or a manifest that is not allowed.
    """
    try:
        if len(signed) > MAX_SIGNED:
            raise ValueError
        envelope = json.loads(signed)
        text = envelope["manifest"].encode()
        signature = b64decode(envelope["signature"], validate=True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BackboneError(
            "backbone manifest", f"{len(signed)} bytes of something else", "a signed manifest",
            "Compare the versions of fedgraft on both sides.",
        ) from None  # fmt: skip
    try:
        key.verify(signature, _PREFIX + text)
    except InvalidSignature:
        raise BackboneError(
            "backbone manifest", "a signature that does not fit", "the operator's signature",
            "Do not use it: it was altered, or another operator signed it. Tell the federation's "
            "operator.",
        ) from None  # fmt: skip
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    manifest = _validated(document, "backbone manifest")
    if manifest.canonical != text:
        raise BackboneError(
            "backbone manifest", "another spelling", "the canonical form",
            "Add the backbone again on the server.",
        )  # fmt: skip
    return manifest


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read piece by piece."""
    digest = hashlib.sha256()
    for piece in read_pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def read_pieces(path: Path) -> Iterator[bytes]:
    """A file's content, a mebibyte at a time."""
    with path.open("rb") as file:
        while piece := file.read(_READ):
            yield piece


def is_digest(text: str) -> bool:
    """Whether a text is a SHA-256 in lower-case hexadecimal, and thereby a safe file name."""
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def _visible_files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise BackboneError(
            str(directory), "no such directory", "a backbone directory", "Check the path."
        )
    found = (path for path in directory.iterdir() if not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def _facts(path: Path) -> dict[str, Any]:
    """Fedgraft's own manifest, which the loader validates; only three texts are taken from it."""
    try:
        facts = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise BackboneError(str(path), str(error), "JSON", "Correct the file.") from None
    return facts if isinstance(facts, dict) else {}


def _validated(document: object, where: str) -> DistributionManifest:
    try:
        return DistributionManifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        found = first["input"] if first["loc"] else "files that are no backbone"
        raise BackboneError(
            f"{where}: {field}" if field else where, found,
            first["msg"].removeprefix("Value error, "),
            "Correct the directory on the server and add it again.",
        ) from None  # fmt: skip
