"""Backbones that a site fetched, kept by hash, within a limit of disk space.

    DIR/blobs/<sha256>                verified files
    DIR/partial/<sha256>              downloads that are not finished; never used
    DIR/backbones/<manifest hash>/    links to blobs, and the signed manifest
    DIR/pins/<manifest hash>          locked while the backbone is in use; its time is the last use
    DIR/lock                          held by whoever adds or removes

A blob gets its place by a rename after its hash was checked, so what lies under blobs/ is whole.
A pin is a lock on a file: it holds against other processes and ends with a crashed one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedgraft_common.errors import BackboneError
from fedgraft_common.manifest import (
    MANIFEST_FILE,
    DistributionManifest,
    ManifestFile,
    SignedManifest,
    sha256_of,
)

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_HEX: Final = frozenset("0123456789abcdef")


class BlobStore:
    """A directory of backbones, private to the site.

    Args:
        directory: made if need be.
        limit_bytes: of blobs and partial downloads together. Whoever adds past it evicts the
            backbones that were not used for longest and are not pinned.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        for name in ("blobs", "partial", "backbones", "pins"):
            (directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, manifest_sha256: str) -> Path:
        """Where a backbone is or will be."""
        return self.directory / "backbones" / _digest(manifest_sha256)

    def blob(self, sha256: str) -> Path:
        """Where a verified file is or will be."""
        return self.directory / "blobs" / _digest(sha256)

    def partial(self, sha256: str) -> Path:
        """Where an unfinished download is."""
        return self.directory / "partial" / _digest(sha256)

    def size(self) -> int:
        """Bytes of blobs and partial downloads."""
        folders = (self.directory / "blobs", self.directory / "partial")
        return sum(entry.stat().st_size for folder in folders for entry in os.scandir(folder))

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Waits until nobody else adds or removes, in this process or another."""
        with (self.directory / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def pin(self, manifest_sha256: str) -> Iterator[None]:
        """Keeps a backbone from eviction for as long as the context lasts."""
        with self._pin_file(manifest_sha256).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(file.name)
            yield

    def is_pinned(self, manifest_sha256: str) -> bool:
        """Whether somebody uses it now."""
        with self._pin_file(manifest_sha256).open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def find(
        self, operator: Ed25519PublicKey, sha256: str, manifest_sha256: str | None = None
    ) -> Path | None:
        """A whole backbone that was fetched before; each of its files is read and hashed.

        Args:
            operator: its key must have signed the manifest.
            sha256: of model.safetensors.
            manifest_sha256: of the manifest; None takes any with these weights.

        Returns:
            Its directory; None if there is none, or if it is damaged.
        """
        for name, signed in self._held():
            if manifest_sha256 not in (None, name):
                continue
            with contextlib.suppress(BackboneError):
                manifest = signed.verify(operator)
                if manifest.hash == name and manifest.weights_sha256 == sha256:
                    directory = self.path(name)
                    if all(_is_whole(directory / file.name, file) for file in manifest.files):
                        os.utime(self._touched(name))
                        return directory
        return None

    def missing(self, manifest: DistributionManifest) -> tuple[ManifestFile, ...]:
        """The files of a manifest that are not here; a damaged blob is removed and counts."""
        absent: dict[str, ManifestFile] = {}
        for file in manifest.files:
            blob = self.blob(file.sha256)
            if not _is_whole(blob, file):
                blob.unlink(missing_ok=True)
                absent[file.sha256] = file
        return tuple(absent.values())

    def make_room(self, manifest: DistributionManifest, files: tuple[ManifestFile, ...]) -> None:
        """Evicts until some files of a manifest fit.

        Raises:
            BackboneError: they cannot fit, in the limit or on the disk; nothing was evicted then.
        """
        keep = {file.sha256 for file in manifest.files}
        begun = sum(self._size_of(self.partial(file.sha256)) for file in files)
        needed = sum(file.size for file in files) - begun
        wanted = self.size() + needed - self.limit_bytes
        evictable, freed = self._plan_eviction(keep, wanted)
        over = wanted - freed
        if over > 0:
            raise BackboneError(
                str(self.directory), f"{needed} bytes to fetch, {over} too many",
                f"{self.limit_bytes} bytes in all, backbones in use included",
                "Raise the limit of the backbone store, or finish the runs that use the others.",
            )  # fmt: skip
        free = shutil.disk_usage(self.directory).free + freed
        if needed > free:
            raise disk_full(self.directory, f"{needed} bytes to fetch, {free} bytes free")
        for remove in evictable:
            remove()

    @contextlib.contextmanager
    def open_partial(self, sha256: str) -> Iterator[BinaryIO]:
        """A download to go on with, for reading and appending; unbuffered.

        Raises:
            BackboneError: the disk is full. What was written stays, to be resumed.
        """
        try:
            with self.partial(sha256).open("a+b", buffering=0) as file:
                file.seek(0)
                yield file
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise disk_full(self.directory, "no space left") from error

    def accept(self, sha256: str) -> None:
        """Moves a partial download whose hash was checked to its place, durably."""
        partial, blob = self.partial(sha256), self.blob(sha256)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.chmod(0o400)
        partial.replace(blob)
        _sync(blob.parent)

    def assemble(self, manifest: DistributionManifest, signed: SignedManifest) -> Path:
        """The directory of a backbone whose blobs are all here."""
        directory = self.path(manifest.hash)
        building = directory.with_name(f".{manifest.hash}")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(mode=0o700)
        for file in manifest.files:
            _link(self.blob(file.sha256), building / file.name)
        with (building / MANIFEST_FILE).open("wb") as output:
            output.write(signed.to_bytes())
            output.flush()
            os.fsync(output.fileno())
        shutil.rmtree(directory, ignore_errors=True)
        building.replace(directory)
        _sync(directory.parent)
        os.utime(self._touched(manifest.hash))
        return directory

    def _plan_eviction(self, keep: set[str], wanted: int) -> tuple[list[Callable[[], object]], int]:
        """What to remove, in order, and the bytes that frees; nothing is removed here."""
        removals: list[Callable[[], object]] = []
        freed = 0
        if wanted <= 0:
            return removals, freed
        users = {name: _digests(signed) for name, signed in self._held()}
        # Leavings first: other downloads that never finished, blobs of no backbone.
        used = keep.union(*users.values())
        leavings = [
            *(path for path in (self.directory / "partial").iterdir() if path.name not in keep),
            *(path for path in (self.directory / "blobs").iterdir() if path.name not in used),
        ]
        for path in leavings:
            freed += self._size_of(path)
            removals.append(partial(path.unlink, missing_ok=True))
        for name in sorted(users, key=self._last_use):
            if freed >= wanted:
                break
            if self.is_pinned(name):
                continue
            mine = users.pop(name)
            blobs = [self.blob(digest) for digest in mine.difference(keep, *users.values())]
            freed += sum(map(self._size_of, blobs))
            removals.append(partial(self._evict, name, blobs))
        return removals, freed

    def _evict(self, name: str, blobs: list[Path]) -> None:
        with self._pin_file(name).open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # pinned a moment ago
                return
            shutil.rmtree(self.path(name), ignore_errors=True)
            for blob in blobs:
                blob.unlink(missing_ok=True)

    def _held(self) -> list[tuple[str, SignedManifest]]:
        held = []
        for directory in sorted((self.directory / "backbones").iterdir()):
            with contextlib.suppress(OSError, BackboneError):
                content = (directory / MANIFEST_FILE).read_bytes()
                if len(directory.name) == 64:
                    held.append((directory.name, SignedManifest.from_bytes(content)))
        return held

    def _pin_file(self, manifest_sha256: str) -> Path:
        return self.directory / "pins" / _digest(manifest_sha256)

    def _touched(self, manifest_sha256: str) -> Path:
        path = self._pin_file(manifest_sha256)
        path.touch(mode=0o600)
        return path

    def _last_use(self, manifest_sha256: str) -> int:
        path = self._pin_file(manifest_sha256)
        return path.stat().st_mtime_ns if path.exists() else 0

    @staticmethod
    def _size_of(path: Path) -> int:
        return path.stat().st_size if path.exists() else 0


def disk_full(directory: Path, found: str) -> BackboneError:
    """The error for a disk without room."""
    return BackboneError(
        str(directory), found, "enough free disk space for the backbone",
        "Free some space and start again: the download goes on where it stopped.",
    )  # fmt: skip


def _digests(signed: SignedManifest) -> set[str]:
    """Blobs that a held manifest names; it was verified when it was assembled."""
    try:
        return {str(file["sha256"]) for file in json.loads(signed.manifest)["files"]}
    except (ValueError, LookupError, TypeError):  # damaged since: it uses nothing
        return set()


def _is_whole(path: Path, file: ManifestFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size and sha256_of(path) == file.sha256


def _link(blob: Path, target: Path) -> None:
    try:
        os.link(blob, target)
    except OSError:  # a file system without hard links
        target.symlink_to(os.path.relpath(blob, target.parent))


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(text: str) -> str:
    """Guards every path: a name that is not a SHA-256 never becomes one."""
    if len(text) != 64 or not _HEX.issuperset(text):
        raise BackboneError("sha256", text, "64 hexadecimal digits", "Correct the hash.")
    return text
