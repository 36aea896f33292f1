"""Signed manifests: what is listed, what is refused, and what a signature covers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedgraft_common.backbone import embedded_directory
from fedgraft_common.errors import BackboneError
from fedgraft_common.manifest import (
    MANIFEST_FILE,
    MAX_DOCUMENT,
    SignedManifest,
    build_manifest,
    check_directory,
    is_shareable,
    sha256_of,
    sign,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
GLYPHS = embedded_directory("glyphs")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GLYPHS, tmp_path / "glyphs"))


def test_it_describes_the_embedded_backbone() -> None:
    manifest = build_manifest(GLYPHS)
    about = json.loads((GLYPHS / "manifest.json").read_bytes())
    assert [file.name for file in manifest.files] == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    assert manifest.weights_sha256 == sha256_of(GLYPHS / "model.safetensors")
    assert manifest.weights_sha256 == about["files"][1]["sha256"]
    assert (manifest.name, manifest.licence) == ("glyphs", about["licence"])
    assert manifest.blocks == tuple(about["blocks"])
    assert manifest.preprocessing == about["preprocessing"]


def test_only_shareable_files_are_listed(directory: Path) -> None:
    for name in ("model.bin", "model.py", ".hidden.json", MANIFEST_FILE):
        (directory / name).write_text("x")
    (directory / "LICENSE").write_text("x")
    (directory / "sub.json").mkdir()
    names = {file.name for file in build_manifest(directory).files}
    assert names == {"config.json", "manifest.json", "model.safetensors", "LICENSE"}


def test_a_directory_that_is_no_backbone_is_refused(directory: Path) -> None:
    with pytest.raises(BackboneError, match="no such directory"):
        build_manifest(directory / "no")
    with pytest.raises(BackboneError, match=r"name: found 'a b'"):
        build_manifest(directory, "a b")
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(BackboneError, match="an adapter beside the backbone"):
        build_manifest(directory)
    (directory / "adapter_config.json").unlink()
    (directory / "manifest.json").write_text("{")
    with pytest.raises(BackboneError, match=r"allowed: JSON\. Correct or remove the file"):
        build_manifest(directory)
    (directory / "manifest.json").write_text("[]")
    with pytest.raises(BackboneError, match="a JSON object"):
        build_manifest(directory)
    (directory / "manifest.json").unlink()
    (directory / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"config\.json and model\.safetensors are needed"):
        build_manifest(directory)


def test_a_signed_manifest_survives_the_journey() -> None:
    manifest = build_manifest(GLYPHS)
    signed = SignedManifest.from_bytes(sign(manifest, KEY).to_bytes())
    assert signed.verify(KEY.public_key()) == manifest


@given(place=st.integers(min_value=0), bit=st.integers(0, 7))
def test_every_bit_is_signed(place: int, bit: int) -> None:
    signed = sign(build_manifest(GLYPHS), KEY)
    changed = bytearray(signed.manifest)
    changed[place % len(changed)] ^= 1 << bit
    with pytest.raises(BackboneError, match="one that the operator's key did not make"):
        SignedManifest(bytes(changed), signed.signature).verify(KEY.public_key())


def test_a_signature_for_something_else_is_refused() -> None:
    manifest = build_manifest(GLYPHS)
    other = SignedManifest(manifest.canonical, KEY.sign(manifest.canonical))
    with pytest.raises(BackboneError, match="did not make"):
        other.verify(KEY.public_key())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "text that is not JSON"),
        (b"[" * 100_000, "text that is not JSON"),
        (b"[]", "found 'list'"),
        (b"{}", "Field required"),
        (json.dumps(json.loads(build_manifest(GLYPHS).canonical)).encode(), "not canonical"),
    ],
)
def test_signed_nonsense_is_refused(content: bytes, message: str) -> None:
    signature = KEY.sign(b"fedgraft backbone manifest 1\n" + content)
    with pytest.raises(BackboneError, match=message):
        SignedManifest(content, signature).verify(KEY.public_key())


@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_refused(content: bytes) -> None:
    with pytest.raises(BackboneError, match="no signed manifest"):
        SignedManifest.from_bytes(content)


def test_a_huge_document_is_refused_unread() -> None:
    with pytest.raises(BackboneError, match=f"at most {MAX_DOCUMENT} bytes"):
        SignedManifest.from_bytes(b" " * (MAX_DOCUMENT + 1))


@given(st.text(max_size=20))
def test_no_shareable_name_leaves_its_directory(name: str) -> None:
    if is_shareable(name):
        assert Path(name).name == name and not name.startswith(".") and name.isascii()


def test_a_directory_is_held_against_its_manifest(directory: Path) -> None:
    manifest = build_manifest(directory)
    with pytest.raises(BackboneError, match=r"distribution\.json: found 'no such file'"):
        check_directory(directory, manifest.hash)
    (directory / MANIFEST_FILE).write_bytes(sign(manifest, KEY).to_bytes())
    check_directory(directory, manifest.hash)
    with pytest.raises(BackboneError, match="pinned by the plan"):
        check_directory(directory, "0" * 64)
    (directory / "preprocessor_config.json").write_text("{}")
    with pytest.raises(BackboneError, match="a file that the manifest does not list"):
        check_directory(directory, manifest.hash)
    (directory / "preprocessor_config.json").unlink()
    config = (directory / "config.json").read_bytes()
    (directory / "config.json").write_bytes(config.replace(b"24", b"25", 1))
    with pytest.raises(BackboneError, match=r"config\.json: found 'a missing or changed file'"):
        check_directory(directory, manifest.hash)
    (directory / "config.json").unlink()
    with pytest.raises(BackboneError, match=r"config\.json: found 'a missing or changed file'"):
        check_directory(directory, manifest.hash)
