"""The backbones a server hands out.

    DIR/manifests/<name>.json    signed manifest
    DIR/blobs/<sha256>           files, shared by backbones that have them in common
    DIR/assembled/<sha256>/      a backbone's files by name, for the runs on the server itself

A manifest is written after its blobs, so what is listed can be sent. A running service sees a new
backbone at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from fedgraft_common.backbone_protocol import ManifestRequest
from fedgraft_common.errors import BackboneError
from fedgraft_common.manifest import (
    MANIFEST_FILE,
    DistributionManifest,
    ManifestFile,
    SignedManifest,
    build_manifest,
    sign,
)

_BLOCK: Final = 1 << 20


class BackboneLibrary:
    """A directory; several processes may use it.

    Args:
        directory: made when the first backbone is added.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def add(
        self, source: Path, key: Ed25519PrivateKey, name: str | None = None
    ) -> DistributionManifest:
        """Copies a backbone and signs its manifest; the same one again changes nothing.

        Args:
            source: a backbone directory.
            key: the operator's.
            name: see `build_manifest`.

        Raises:
            BackboneError: the directory is not a backbone, changes while it is read, or the name
                is taken by another backbone.
        """
        manifest = build_manifest(source, name)
        target = self._manifest_file(manifest.name)
        if target.exists():
            held = SignedManifest.from_bytes(target.read_bytes(), str(target))
            if held.manifest != manifest.canonical:
                raise BackboneError(
                    "--name", manifest.name, "a name that no other backbone here has",
                    "Choose another name: plans that are running may use the old one.",
                )  # fmt: skip
        for file in manifest.files:
            self._copy(source / file.name, file)
        _replace(target, sign(manifest, key).to_bytes())
        return manifest

    def manifests(self) -> Iterator[tuple[SignedManifest, DistributionManifest]]:
        """Every backbone, by name. The server trusts its own directory: sites verify."""
        for path in sorted((self.directory / "manifests").glob("*.json")):
            signed = SignedManifest.from_bytes(path.read_bytes(), str(path))
            try:
                yield signed, DistributionManifest.model_validate_json(signed.manifest)
            except ValidationError:
                raise BackboneError(
                    str(path), "no manifest", "a file written by fedgraft",
                    "Remove it and add the backbone again.",
                ) from None  # fmt: skip

    def find(self, request: ManifestRequest) -> SignedManifest | None:
        """The first backbone that fits all of a request; None if none does, or it is empty."""
        wanted = request.model_dump(exclude_none=True)
        for signed, manifest in self.manifests():
            facts = {
                "name": manifest.name,
                "sha256": manifest.weights_sha256,
                "manifest_sha256": manifest.hash,
            }
            if wanted and wanted.items() <= facts.items():
                return signed
        return None

    def assembled(self, request: ManifestRequest) -> Path:
        """A backbone's files side by side, as `load_backbone` wants them.

        Raises:
            BackboneError: there is no such backbone.
        """
        signed = self.find(request)
        if signed is None:
            raise BackboneError(
                "backbone", request.sha256 or request.name, "a backbone this server hands out",
                "Add it with `fedgraft server backbone add DIR`.",
            )  # fmt: skip
        manifest = DistributionManifest.model_validate_json(signed.manifest)
        target = self.directory / "assembled" / manifest.hash
        for file in manifest.files:
            if not (target / file.name).exists():
                target.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    os.link(self.blob(file.sha256), target / file.name)
        if not (target / MANIFEST_FILE).exists():
            _replace(target / MANIFEST_FILE, signed.to_bytes())
        return target

    def blob(self, sha256: str) -> Path:
        """Where a file is.

        Args:
            sha256: 64 hexadecimal digits; whoever calls checked that.
        """
        return self.directory / "blobs" / sha256

    def _copy(self, source: Path, file: ManifestFile) -> None:
        """A copy, not a link: a later change of the source must not reach the sites."""
        target = self.blob(file.sha256)
        if target.is_file() and target.stat().st_size == file.size:
            return
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = target.with_name(f".{file.sha256}.{os.getpid()}")
        hasher = hashlib.sha256()
        try:
            with source.open("rb") as reader, temporary.open("wb") as writer:
                while block := reader.read(_BLOCK):
                    hasher.update(block)
                    writer.write(block)
                writer.flush()
                os.fsync(writer.fileno())
            if hasher.hexdigest() != file.sha256:
                raise BackboneError(
                    str(source), "a file that changes", "one that nobody writes to",
                    "Wait until it is written, then add it again.",
                )  # fmt: skip
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def _manifest_file(self, name: str) -> Path:
        return self.directory / "manifests" / f"{name}.json"


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
