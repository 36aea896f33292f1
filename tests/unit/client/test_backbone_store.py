"""The store keeps to its limit, evicts what was used least recently, and never what is in use."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedgraft_client.backbone_store import BlobStore
from fedgraft_client.partial_blob import PartialBlob
from fedgraft_common.errors import BackboneError, TransferError
from fedgraft_common.manifest import (
    DistributionManifest,
    FileEntry,
    build_manifest,
    read_pieces,
    sign_manifest,
)

KEY = Ed25519PrivateKey.generate()
SIZE = 1000


def put(store: BlobStore, root: Path, fill: int) -> DistributionManifest:
    """A backbone of SIZE bytes and a configuration of 2, as if it had been fetched."""
    source = root / f"source-{fill}"
    source.mkdir(exist_ok=True)
    (source / "config.json").write_bytes(b"{}")
    (source / "model.safetensors").write_bytes(bytes([fill]) * SIZE)
    manifest = build_manifest(source)
    store.make_room(manifest)
    for entry in manifest.files:
        if not store.has(entry.sha256):
            with PartialBlob(store.partial(entry.sha256), entry) as arriving:
                for piece in read_pieces(source / entry.name):
                    arriving.write(piece)
                assert arriving.finish(store.blob(entry.sha256))
    store.assemble(manifest, sign_manifest(manifest, KEY))
    age(store, manifest, fill)
    return manifest


def age(store: BlobStore, manifest: DistributionManifest, seconds: int) -> None:
    os.utime(store.directory / "manifests" / f"{manifest.sha256}.json", (seconds, seconds))


def names(store: BlobStore, folder: str) -> set[str]:
    return {path.name for path in (store.directory / folder).glob("*")}


def store_of(root: Path, limit: int) -> BlobStore:
    store = BlobStore(root / "store", limit)
    store.directory.mkdir(parents=True)
    return store


def test_the_least_recently_used_backbone_goes(tmp_path: Path) -> None:
    store = store_of(tmp_path, 2 * SIZE + 10)
    first, second = put(store, tmp_path, 1), put(store, tmp_path, 2)
    assert store.ready(first.sha256, KEY.public_key())  # used again: now the second is older
    third = put(store, tmp_path, 3)
    assert names(store, "backbones") == {first.sha256, third.sha256}
    config = first.files[0].sha256  # the same file in all of them
    assert names(store, "blobs") == {first.sha256, third.sha256, config}
    assert store.ready(second.sha256, KEY.public_key()) is None


def test_a_pinned_backbone_stays(tmp_path: Path) -> None:
    store = store_of(tmp_path, 2 * SIZE + 10)
    first, second = put(store, tmp_path, 1), put(store, tmp_path, 2)
    store.pin(first.sha256)
    third = put(store, tmp_path, 3)
    assert names(store, "backbones") == {first.sha256, third.sha256}
    store.pin(third.sha256)
    with pytest.raises(BackboneError, match=r"found '1000 bytes for source-2 .*Raise the store's"):
        put(store, tmp_path, 2)
    assert names(store, "backbones") == {first.sha256, third.sha256}
    store.unpin(first.sha256)
    put(store, tmp_path, 2)
    assert names(store, "backbones") == {second.sha256, third.sha256}


def test_leftovers_go_before_any_backbone(tmp_path: Path) -> None:
    store = store_of(tmp_path, 2 * SIZE + 10)
    first = put(store, tmp_path, 1)
    store.partial("0" * 64).write_bytes(b"x" * SIZE)
    store.blob("1" * 64).write_bytes(b"x")
    (store.directory / "backbones" / ".left-by-a-crash").mkdir()
    second = put(store, tmp_path, 2)
    assert names(store, "backbones") == {first.sha256, second.sha256}
    assert names(store, "partial") == set()
    assert "1" * 64 not in names(store, "blobs")


def test_a_backbone_larger_than_the_store_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path, SIZE)
    with pytest.raises(BackboneError, match=r"found '1002 bytes .*allowed: 1000 bytes in all"):
        put(store, tmp_path, 1)


def test_what_has_arrived_is_not_counted_twice(tmp_path: Path) -> None:
    store = store_of(tmp_path, SIZE + 2)
    manifest = put(store_of(tmp_path / "elsewhere", 10 * SIZE), tmp_path, 1)
    store.partial(manifest.sha256).parent.mkdir()
    store.partial(manifest.sha256).write_bytes(bytes([1]) * 600)
    store.make_room(manifest)
    assert store.partial(manifest.sha256).stat().st_size == 600


def test_without_hard_links_files_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    store = store_of(tmp_path, 10 * SIZE)
    manifest = put(store, tmp_path, 1)
    directory = store.ready(manifest.sha256, KEY.public_key())
    assert directory is not None
    assert (directory / "model.safetensors").stat().st_nlink == 1


def test_a_backbone_is_ready_only_if_signed_and_whole(tmp_path: Path) -> None:
    store = store_of(tmp_path, 10 * SIZE)
    manifest = put(store, tmp_path, 1)
    assert store.ready(manifest.sha256, Ed25519PrivateKey.generate().public_key()) is None
    directory = store.ready(manifest.sha256, KEY.public_key())
    assert directory is not None
    (directory / "config.json").unlink()
    (directory / "config.json").write_bytes(b"[]")
    assert store.ready(manifest.sha256, KEY.public_key()) is None
    assert not directory.exists()


def test_a_full_disk_while_assembling_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = store_of(tmp_path, 10 * SIZE)
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(TransferError, match="No space left on device"):
        put(store, tmp_path, 1)
    monkeypatch.undo()
    assert names(store, "backbones") == set()


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"")
    partial = tmp_path / "partial"
    partial.symlink_to(victim)
    with pytest.raises(TransferError):
        PartialBlob(partial, FileEntry(name="a.json", size=1, sha256="0" * 64))


def test_an_empty_file_is_whole_at_once(tmp_path: Path) -> None:
    digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # FIPS 180-4
    entry = FileEntry(name="empty.txt", size=0, sha256=digest)
    with PartialBlob(tmp_path / "partial", entry) as arriving:
        assert arriving.finish(tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b""


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = BlobStore(tmp_path / "file" / "store", SIZE)
    with pytest.raises(TransferError, match="found 'Not a directory'"), store.lock():
        pass
