"""The store of backbones: its limit, what it evicts and what it never does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedgraft_client.blob_store import BlobStore
from fedgraft_common.errors import BackboneError
from fedgraft_common.manifest import DistributionManifest, build_manifest, sign

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
KILO = 1000


def backbone(
    folder: Path, fill: bytes, size: int = KILO, config: str = "{}"
) -> DistributionManifest:
    source = folder / f"source-{fill.decode()}"
    source.mkdir(exist_ok=True)
    (source / "config.json").write_text(config)
    (source / "model.safetensors").write_bytes(fill * size)
    return build_manifest(source, fill.decode())


def put(store: BlobStore, folder: Path, manifest: DistributionManifest) -> Path:
    missing = store.missing(manifest)
    store.make_room(manifest, missing)
    for file in missing:
        with store.open_partial(file.sha256) as output:
            output.write((folder / f"source-{manifest.name}" / file.name).read_bytes())
        store.accept(file.sha256)
    return store.assemble(manifest, sign(manifest, KEY))


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "store", 2 * KILO + 10)


def test_what_was_put_is_found(store: BlobStore, tmp_path: Path) -> None:
    manifest = backbone(tmp_path, b"a")
    path = put(store, tmp_path, manifest)
    key = KEY.public_key()
    assert store.find(key, manifest.weights_sha256) == path
    assert store.find(key, manifest.weights_sha256, manifest.hash) == path
    assert store.find(key, manifest.weights_sha256, "0" * 64) is None
    assert store.find(key, "0" * 64) is None
    stranger = Ed25519PrivateKey.generate().public_key()
    assert store.find(stranger, manifest.weights_sha256) is None
    assert store.missing(manifest) == ()
    (path / "config.json").unlink()
    assert store.find(key, manifest.weights_sha256) is None


def test_the_least_recently_used_goes_first(store: BlobStore, tmp_path: Path) -> None:
    first, second = backbone(tmp_path, b"a"), backbone(tmp_path, b"b")
    paths = [put(store, tmp_path, first), put(store, tmp_path, second)]
    time.sleep(0.02)
    assert store.find(KEY.public_key(), first.weights_sha256) == paths[0]  # used again
    put(store, tmp_path, backbone(tmp_path, b"c"))
    assert paths[0].is_dir() and not paths[1].exists()
    assert not store.blob(second.weights_sha256).exists()
    assert store.blob(first.weights_sha256).exists()
    assert store.size() <= store.limit_bytes


def test_shared_blobs_stay_with_the_one_that_uses_them(store: BlobStore, tmp_path: Path) -> None:
    first, second = backbone(tmp_path, b"a"), backbone(tmp_path, b"b")
    put(store, tmp_path, first)
    kept = put(store, tmp_path, second)
    with store.pin(second.hash):
        put(store, tmp_path, backbone(tmp_path, b"c"))
    assert (kept / "config.json").read_text() == "{}"
    assert store.find(KEY.public_key(), second.weights_sha256) == kept


def test_a_pinned_one_is_never_evicted(store: BlobStore, tmp_path: Path) -> None:
    manifests = [backbone(tmp_path, b"a"), backbone(tmp_path, b"b")]
    paths = [put(store, tmp_path, manifest) for manifest in manifests]
    third = backbone(tmp_path, b"c")
    with store.pin(manifests[0].hash), store.pin(manifests[1].hash):
        before = sorted(store.directory.rglob("*"))
        with pytest.raises(BackboneError, match=r"1000 bytes to fetch, 992 too many.*2010 bytes"):
            put(store, tmp_path, third)
        assert sorted(store.directory.rglob("*")) == before
        assert all(path.is_dir() for path in paths)
    put(store, tmp_path, third)


def test_a_pin_of_another_process_holds_and_dies_with_it(store: BlobStore, tmp_path: Path) -> None:
    manifest = backbone(tmp_path, b"a")
    put(store, tmp_path, manifest)
    code = (
        "import sys; from pathlib import Path; from fedgraft_client.blob_store import BlobStore\n"
        "with BlobStore(Path(sys.argv[1]), 1).pin(sys.argv[2]): print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(store.directory), manifest.hash]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert store.is_pinned(manifest.hash)
        process.kill()
        process.wait(10)
    assert not store.is_pinned(manifest.hash)


def test_nothing_goes_if_it_cannot_help(store: BlobStore, tmp_path: Path) -> None:
    path = put(store, tmp_path, backbone(tmp_path, b"a"))
    with pytest.raises(BackboneError, match="Raise the limit"):
        put(store, tmp_path, backbone(tmp_path, b"b", size=3 * KILO))
    assert path.is_dir()


def test_leavings_go_before_backbones(store: BlobStore, tmp_path: Path) -> None:
    path = put(store, tmp_path, backbone(tmp_path, b"a"))
    store.partial("f" * 64).write_bytes(b"x" * 500)
    put(store, tmp_path, backbone(tmp_path, b"b"))
    assert path.is_dir() and not store.partial("f" * 64).exists()


def test_a_disk_without_room_is_said_first(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(BackboneError, match=r"1002 bytes to fetch, 100 bytes free.*Free some"):
        put(store, tmp_path, backbone(tmp_path, b"a"))


def test_without_hard_links_there_are_symbolic_ones(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "link", no_link)
    manifest = backbone(tmp_path, b"a")
    path = put(store, tmp_path, manifest)
    assert (path / "config.json").is_symlink()
    assert store.find(KEY.public_key(), manifest.weights_sha256) == path


@pytest.mark.parametrize("name", ["../x", "", "A" * 64, "0" * 63])
def test_a_name_that_is_no_hash_becomes_no_path(store: BlobStore, name: str) -> None:
    for path in (store.blob, store.partial, store.path, store.is_pinned):
        with pytest.raises(BackboneError, match="64 hexadecimal digits"):
            path(name)
