"""The signed description of a backbone that a federation hands out.

A manifest lists every file of a backbone with its size and SHA-256, and says under which licence
it may be used, where it came from, how its input is prepared and which blocks may carry adapters.
The operator signs its canonical form (sorted JSON without white space) with Ed25519; a site checks
the signature with the operator's key before it believes one word of it.

A backbone has two hashes. `weights_sha256`, of model.safetensors, is what a plan names in
`backbone.sha256`. `hash`, of the canonical manifest, also fixes every other file: configuration,
preprocessing and blocks; a plan may name it in `backbone.manifest_sha256`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedgraft_common.errors import BackboneError

WEIGHTS: Final = "model.safetensors"
MANIFEST_FILE: Final = "distribution.json"
"""Name of the signed manifest inside a backbone directory that came from a server."""
MAX_DOCUMENT: Final = 1 << 20
"""Bytes of a signed manifest; a longer one is refused unread."""
MAX_FILE: Final = 1 << 40
"""Bytes of one file."""
_PURPOSE: Final = b"fedgraft backbone manifest 1\n"  # a signature for this is good for nothing else
_BLOCK: Final = 1 << 20
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\.(json|safetensors|txt|md)")
_UNNAMED_ENDINGS: Final = ("LICENSE", "LICENCE", "NOTICE", "README")
_FACTS: Final = ("licence", "source", "preprocessing", "blocks")
_NOT_SHARED: Final = frozenset({MANIFEST_FILE, "adapter_config.json"})

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
BackboneName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ManifestFile(_Frozen):
    """One file."""

    name: str = Field(description="Without directories.")
    size: int = Field(ge=0, le=MAX_FILE, description="Bytes.")
    sha256: Digest = Field(description="Of the whole file, hexadecimal.")

    @field_validator("name")
    @classmethod
    def _is_shareable(cls, name: str) -> str:
        if not is_shareable(name):
            raise ValueError(
                "a plain file name that ends in .json, .safetensors, .txt or .md is needed"
            )
        return name


class DistributionManifest(_Frozen):
    """What the operator vouches for."""

    format: Literal["fedgraft-backbone-1"] = "fedgraft-backbone-1"
    name: BackboneName = Field(description="For people; the hash is the identity.")
    files: Annotated[tuple[ManifestFile, ...], Field(min_length=1, max_length=64, strict=False)]
    licence: str = Field(default="unknown", max_length=256)
    source: str | dict[str, Any] = Field(default="unknown", description="Where it came from.")
    preprocessing: dict[str, Any] | None = Field(
        default=None, description="Constants of the input: channels, size, mean, std."
    )
    blocks: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="Modules that may carry adapters; empty: found by looking."
    )

    @model_validator(mode="after")
    def _files_fit_together(self) -> DistributionManifest:
        names = [file.name.casefold() for file in self.files]
        if len(set(names)) < len(names):
            raise ValueError("two files have the same name")
        if not {"config.json", WEIGHTS} <= set(names):
            raise ValueError(f"config.json and {WEIGHTS} are needed")
        return self

    @cached_property
    def canonical(self) -> bytes:
        """Sorted JSON without white space: what is hashed and signed."""
        document = self.model_dump(mode="json")
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical form, hexadecimal."""
        return hashlib.sha256(self.canonical).hexdigest()

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of model.safetensors: `backbone.sha256` of a plan."""
        return next(file.sha256 for file in self.files if file.name == WEIGHTS)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def is_shareable(name: str) -> bool:
    """Whether a file of this name may be handed out: plain name, no pickle, nothing executable."""
    if name in _NOT_SHARED:
        return False
    return name in _UNNAMED_ENDINGS or _NAME.fullmatch(name) is not None


def build_manifest(directory: Path, name: str | None = None) -> DistributionManifest:
    """Describes a backbone directory.

    Every shareable file directly in it is listed. Licence, source, preprocessing and blocks come
    from its manifest.json, if it has one.

    Args:
        directory: config.json, model.safetensors and, optionally, manifest.json and texts.
        name: default: the name in manifest.json, else the directory's.

    Raises:
        BackboneError: no such directory, a file is missing, an adapter lies beside the backbone
            (transformers would apply it unasked), or manifest.json is damaged.
    """
    if not directory.is_dir():
        raise BackboneError(str(directory), "no such directory", "a directory", "Check the path.")
    if (directory / "adapter_config.json").exists():
        raise BackboneError(
            str(directory / "adapter_config.json"), "an adapter beside the backbone",
            "a directory with a backbone only", "Move the adapter to a directory of its own.",
        )  # fmt: skip
    about = _about(directory / "manifest.json")
    paths = sorted(path for path in directory.iterdir() if path.is_file())
    files = [
        {"name": path.name, "size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in paths
        if is_shareable(path.name)
    ]
    facts = {key: about[key] for key in _FACTS if key in about}
    chosen = name or about.get("name") or directory.resolve().name
    return _validated({**facts, "name": chosen, "files": files}, str(directory))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SignedManifest:
    """A canonical manifest and the operator's signature, as they travel.

    Args:
        manifest: canonical bytes; not believed before `verify`.
        signature: Ed25519, 64 bytes.
    """

    __slots__ = ("manifest", "signature")

    def __init__(self, manifest: bytes, signature: bytes) -> None:
        self.manifest = manifest
        self.signature = signature

    def to_bytes(self) -> bytes:
        """JSON: the manifest as text, the signature in base64."""
        document = {
            "manifest": self.manifest.decode(),
            "signature": base64.b64encode(self.signature).decode(),
        }
        return json.dumps(document, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, content: bytes, where: str = "signed manifest") -> SignedManifest:
        """Reads what `to_bytes` wrote.

        Raises:
            BackboneError: not such a document.
        """
        if len(content) > MAX_DOCUMENT:
            raise _refused(where, f"{len(content)} bytes", f"at most {MAX_DOCUMENT} bytes")
        try:
            document = json.loads(content)
            manifest, signature = document["manifest"], document["signature"]
            return cls(manifest.encode(), base64.b64decode(signature, validate=True))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError, binascii.Error):
            raise _refused(where, "no signed manifest", "manifest and signature in JSON") from None

    def verify(self, operator: Ed25519PublicKey, where: str = "manifest") -> DistributionManifest:
        """The manifest, if the operator signed exactly these bytes.

        Args:
            operator: the key the site pinned when it joined.
            where: for the error.

        Raises:
            BackboneError: another signature, a form that is not canonical, or a manifest that
                breaks a rule, such as a file name with a directory in it.
        """
        try:
            operator.verify(self.signature, _PURPOSE + self.manifest)
        except InvalidSignature:
            raise _refused(
                f"{where}: signature", "one that the operator's key did not make",
                "the signature of this federation's operator",
            ) from None  # fmt: skip
        try:
            document = json.loads(self.manifest)
        except (ValueError, RecursionError):
            raise _refused(where, "text that is not JSON", "a manifest in JSON") from None
        manifest = _validated(document, where)
        if manifest.canonical != self.manifest:
            raise _refused(where, "a form that is not canonical", "sorted JSON, no white space")
        return manifest


def sign(manifest: DistributionManifest, key: Ed25519PrivateKey) -> SignedManifest:
    """Signs with the operator's key (Ed25519, RFC 8032, over a purpose line and the manifest)."""
    return SignedManifest(manifest.canonical, key.sign(_PURPOSE + manifest.canonical))


def check_directory(directory: Path, manifest_sha256: str) -> None:
    """Refuses a backbone directory that is not byte for byte the one of a manifest.

    The hash decides, so no signature is needed: whoever named it (a signed plan) vouches for it.

    Args:
        directory: with the manifest in distribution.json.
        manifest_sha256: `DistributionManifest.hash`, hexadecimal.

    Raises:
        BackboneError: no manifest, another manifest, or a file that is missing, changed or extra.
    """
    path = directory / MANIFEST_FILE
    try:
        with path.open("rb") as file:
            content = file.read(MAX_DOCUMENT + 1)
    except OSError:
        raise BackboneError(
            str(path), "no such file", "the manifest that the plan's manifest_sha256 names",
            "Fetch the backbone from the federation's server.",
        ) from None  # fmt: skip
    manifest = SignedManifest.from_bytes(content, str(path)).manifest
    found = hashlib.sha256(manifest).hexdigest()
    if found != manifest_sha256:
        raise BackboneError(
            str(path), f"sha256 {found}", f"sha256 {manifest_sha256}, pinned by the plan",
            "Fetch the right backbone, or correct backbone.manifest_sha256.",
        )  # fmt: skip
    described = {file.name: file for file in _validated(json.loads(manifest), str(path)).files}
    extra = sorted({entry.name for entry in os.scandir(directory)} - {*described, MANIFEST_FILE})
    if extra:
        raise BackboneError(
            str(directory / extra[0]), "a file that the manifest does not list",
            "the manifest's files only", "Remove it, or fetch the backbone again.",
        )  # fmt: skip
    for name, listed in described.items():
        held = directory / name
        if (
            not held.is_file()
            or held.stat().st_size != listed.size
            or sha256_of(held) != listed.sha256
        ):
            raise BackboneError(
                str(held), "a missing or changed file", f"sha256 {listed.sha256}",
                "Fetch the backbone again.",
            )  # fmt: skip


def _about(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_bytes())
    except ValueError as error:
        raise BackboneError(str(path), str(error), "JSON", "Correct or remove the file.") from None
    if not isinstance(about, dict):
        raise BackboneError(str(path), "no table", "a JSON object", "Correct or remove the file.")
    return about


def _validated(document: Any, where: str) -> DistributionManifest:
    try:
        return DistributionManifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        value = first["input"]
        shown = value if isinstance(value, str | int | float) else type(value).__name__
        raise _refused(f"{where}: {field}" if field else where, shown, first["msg"]) from None


def _refused(field: str, value: object, allowed: str) -> BackboneError:
    if isinstance(value, str) and len(value) > 200:
        value = value[:200] + "..."
    return BackboneError(
        field, value, allowed, "Nothing was changed; tell the federation's operator."
    )
