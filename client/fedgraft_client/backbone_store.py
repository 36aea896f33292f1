"""The backbones a site has: files by their hash, and directories made of them.

    DIR/blobs/<SHA-256>             whole files, verified before they got here
    DIR/partial/<SHA-256>           files that are still arriving
    DIR/manifests/<SHA-256>.json    signed; its time is when the backbone was last used
    DIR/backbones/<SHA-256>/        hard links to blobs (copies where links are impossible)
    DIR/lock                        held by whoever fetches or evicts

<SHA-256> of a manifest and of a directory is that of model.safetensors, as in a plan. When space
is needed, the backbone that was used least recently goes, but never one that is pinned.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedgraft_common.atomic import write_atomically
from fedgraft_common.errors import BackboneError, TransferError
from fedgraft_common.manifest import DistributionManifest, file_sha256, verify_manifest


def _free_bytes(directory: Path) -> int:
    return shutil.disk_usage(directory).free


class BlobStore:
    """One site's store; several processes may share it.

    Args:
        directory: made if need be.
        limit_bytes: for all files together.
        free_bytes: space left on a directory's disk.
    """

    def __init__(
        self,
        directory: Path,
        limit_bytes: int,
        free_bytes: Callable[[Path], int] = _free_bytes,
    ) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        self._free_bytes = free_bytes
        self._pinned: set[str] = set()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Waits until no other process or thread fetches into this store.

        Raises:
            TransferError: the directory cannot be made or written.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = (self.directory / "lock").open("ab")
        except OSError as error:
            raise _cannot_write(self.directory, error) from None
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def pin(self, sha256: str) -> None:
        """Keeps a backbone while this process uses it."""
        self._pinned.add(sha256)

    def unpin(self, sha256: str) -> None:
        """Lets a backbone go when its space is needed."""
        self._pinned.discard(sha256)

    def blob(self, sha256: str) -> Path:
        """Where a whole file is, or will be."""
        return self.directory / "blobs" / sha256

    def partial(self, sha256: str) -> Path:
        """Where a file is while it arrives."""
        return self.directory / "partial" / sha256

    def ready(self, sha256: str, key: Ed25519PublicKey) -> Path | None:
        """The directory of a backbone that is here, every file hashed again.

        Args:
            sha256: of model.safetensors.
            key: the operator's.

        Returns:
            None if it is not here or is damaged; damaged files are thrown away.
        """
        directory = self._backbone(sha256)
        try:
            manifest = verify_manifest(self._manifest(sha256).read_bytes(), key)
        except (OSError, BackboneError):
            return None
        whole = manifest.sha256 == sha256
        for entry in manifest.files:
            path = directory / entry.name
            if not path.is_file() or file_sha256(path) != entry.sha256:
                whole = False
        if not whole:
            shutil.rmtree(directory, ignore_errors=True)
            return None
        os.utime(self._manifest(sha256))
        return directory

    def has(self, sha256: str) -> bool:
        """Whether a file is here; one that is damaged is thrown away."""
        path = self.blob(sha256)
        if path.is_file() and file_sha256(path) == sha256:
            return True
        path.unlink(missing_ok=True)
        return False

    def make_room(self, manifest: DistributionManifest) -> None:
        """Evicts until the files of a backbone that are not here yet have space.

        Raises:
            BackboneError: they do not fit, even with everything evicted that may be.
            TransferError: the disk has no space.
        """
        kept = {entry.sha256 for entry in manifest.files}
        sizes = {e.sha256: e.size for e in manifest.files if not self.blob(e.sha256).exists()}
        needed = sum(size - _size(self.partial(name)) for name, size in sizes.items())
        candidates = self._evictable(kept | self._pinned)
        while self._used() + needed > self.limit_bytes:
            if not candidates:
                raise BackboneError(
                    f"backbone store {self.directory}",
                    f"{needed} bytes for {manifest.name} beside what is in use",
                    f"{self.limit_bytes} bytes in all", "Raise the store's limit.",
                )  # fmt: skip
            self._evict(candidates.pop(0), kept)
        free = self._free_bytes(self.directory)
        if needed > free:
            raise TransferError(
                f"backbone store {self.directory}", f"{free} bytes free on the disk",
                f"{needed} bytes for {manifest.name}", "Make room and try again.",
            )  # fmt: skip

    def assemble(self, manifest: DistributionManifest, signed: bytes) -> Path:
        """Makes the directory of a backbone whose files are all here, in one step.

        Raises:
            TransferError: the disk is full or may not be written.
        """
        target = self._backbone(manifest.sha256)
        building = target.with_name(f".{target.name}")
        try:
            for old in (building, target):  # left by a crash, or of another manifest
                if old.exists():
                    shutil.rmtree(old)
            building.mkdir(parents=True)
            for entry in manifest.files:
                _link(self.blob(entry.sha256), building / entry.name)
            building.replace(target)
            write_atomically(self._manifest(manifest.sha256), signed)
        except OSError as error:
            raise _cannot_write(target, error) from None
        return target

    def _backbone(self, sha256: str) -> Path:
        return self.directory / "backbones" / sha256

    def _manifest(self, sha256: str) -> Path:
        return self.directory / "manifests" / f"{sha256}.json"

    def _used(self) -> int:
        """Bytes of all files; links are counted once."""
        sizes = {}
        for name in ("blobs", "partial", "backbones"):
            for path in (self.directory / name).rglob("*"):
                facts = path.lstat()
                if not path.is_dir():
                    sizes[facts.st_ino] = facts.st_size
        return sum(sizes.values())

    def _evictable(self, kept: set[str]) -> list[str]:
        """Backbones that nobody needs, the least recently used first; "" stands for leftovers."""
        found = (p for p in (self.directory / "manifests").glob("*.json") if p.stem not in kept)
        return ["", *(p.stem for p in sorted(found, key=lambda p: p.stat().st_mtime_ns))]

    def _evict(self, sha256: str, kept: set[str]) -> None:
        """Removes a backbone, then every file that no directory holds."""
        if sha256:
            self._manifest(sha256).unlink(missing_ok=True)
            shutil.rmtree(self._backbone(sha256), ignore_errors=True)
        held = set()
        for directory in (self.directory / "backbones").glob("*"):
            if directory.name.startswith("."):  # left by a crash
                shutil.rmtree(directory, ignore_errors=True)
            else:
                held |= {path.stat().st_ino for path in directory.iterdir()}
        for path in (*self.directory.glob("blobs/*"), *self.directory.glob("partial/*")):
            if path.name not in kept and path.stat().st_ino not in held:
                path.unlink()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another kind of file system
        shutil.copyfile(source, target)


def _cannot_write(path: Path, error: OSError) -> TransferError:
    return TransferError(
        str(path), error.strerror or str(error), "a disk with room that may be written",
        "Make room or correct the permissions, and try again.",
    )  # fmt: skip
