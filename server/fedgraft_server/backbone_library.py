"""The backbones a server hands out: files by their hash, and a signed manifest for each backbone.

    DIR/blobs/<SHA-256>                   a file's content
    DIR/manifests/<SHA-256>.json          signed; named after the hash of model.safetensors

A file is copied in under a temporary name, hashed on the way and renamed; the manifest is written
last. Whatever is under its final name is therefore whole, also after a crash.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedgraft_common.atomic import write_atomically
from fedgraft_common.errors import BackboneError
from fedgraft_common.manifest import (
    DistributionManifest,
    FileEntry,
    build_manifest,
    is_digest,
    read_pieces,
    sign_manifest,
)


class BackboneLibrary:
    """A directory of backbones.

    Args:
        directory: made when the first backbone is added.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def add(
        self, source: Path, key: Ed25519PrivateKey, name: str | None = None
    ) -> DistributionManifest:
        """Copies a backbone in and signs its manifest; adding it again replaces the manifest.

        Args:
            source: a backbone directory.
            key: the operator's.
            name: in plans; None for the backbone's own.

        Raises:
            BackboneError: not a backbone, a file that changed meanwhile, or no space.
        """
        manifest = build_manifest(source, name)
        blobs, path = self.directory / "blobs", self._manifest(manifest.sha256)
        try:
            blobs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(blobs, error) from None
        for entry in manifest.files:
            if not self._blob(entry.sha256).is_file():
                self._copy(source / entry.name, entry)
        try:
            write_atomically(path, sign_manifest(manifest, key))
        except OSError as error:
            raise _cannot_write(path, error) from None
        return manifest

    def signed_manifest(self, sha256: str) -> bytes | None:
        """The manifest of a backbone as it travels; None if there is none."""
        try:
            return self._manifest(sha256).read_bytes() if is_digest(sha256) else None
        except FileNotFoundError:
            return None

    def blob(self, sha256: str) -> Path | None:
        """A file by its hash; None if there is none."""
        path = self._blob(sha256)
        return path if is_digest(sha256) and path.is_file() else None

    def _blob(self, sha256: str) -> Path:
        return self.directory / "blobs" / sha256

    def _manifest(self, sha256: str) -> Path:
        return self.directory / "manifests" / f"{sha256}.json"

    def _copy(self, source: Path, entry: FileEntry) -> None:
        target = self._blob(entry.sha256)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        digest = hashlib.sha256()
        try:
            with temporary.open("wb") as file:
                for piece in read_pieces(source):
                    digest.update(piece)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            if digest.hexdigest() != entry.sha256:
                raise BackboneError(
                    str(source), "a file that changed while it was read", "one that stays as it is",
                    "Add the backbone again when nothing writes to its directory.",
                )  # fmt: skip
            temporary.replace(target)
        except OSError as error:
            raise _cannot_write(target, error) from None
        finally:
            temporary.unlink(missing_ok=True)


def _cannot_write(path: Path, error: OSError) -> BackboneError:
    return BackboneError(
        str(path), error.strerror or str(error), "a disk with room that may be written",
        "Make room or correct the permissions, then add the backbone again.",
    )  # fmt: skip


def read_operator_key(path: Path) -> Ed25519PrivateKey:
    """The operator's signing key, PKCS#8 in PEM without a passphrase.

    Raises:
        BackboneError: missing, or another kind of file.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        found = error.strerror or str(error)
    except (ValueError, TypeError):
        found = "no usable key"
    else:
        if isinstance(key, Ed25519PrivateKey):
            return key
        found = "another kind of key"
    raise BackboneError(
        str(path), found, "the operator's Ed25519 key in PEM",
        "Name the server's directory with --server.",
    )  # fmt: skip
