"""What the server hands out is whole, signed, and found by hash only."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner

from fedgraft_common.backbone import embedded_directory
from fedgraft_common.errors import BackboneError
from fedgraft_common.manifest import verify_manifest
from fedgraft_common.plan import Backbone
from fedgraft_server import backbone_library
from fedgraft_server.backbone_cli import app
from fedgraft_server.backbone_library import BackboneLibrary, read_operator_key

KEY = Ed25519PrivateKey.generate()
GLYPHS = embedded_directory("glyphs")


def write_key(path: Path, key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey = KEY) -> None:
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def test_an_added_backbone_is_found_by_hash(tmp_path: Path) -> None:
    library = BackboneLibrary(tmp_path)
    assert library.signed_manifest("0" * 64) is None
    manifest = library.add(GLYPHS, KEY)
    signed = library.signed_manifest(manifest.sha256)
    assert signed is not None
    assert verify_manifest(signed, KEY.public_key()) == manifest
    for entry in manifest.files:
        blob = library.blob(entry.sha256)
        assert blob is not None
        assert blob.read_bytes() == (GLYPHS / entry.name).read_bytes()
    assert len(list(tmp_path.rglob("*.*"))) == 1  # the manifest; no temporary file


def test_adding_again_replaces_the_name(tmp_path: Path) -> None:
    library = BackboneLibrary(tmp_path)
    library.add(GLYPHS, KEY)
    assert library.add(GLYPHS, KEY, "other").name == "other"
    assert len(list((tmp_path / "manifests").iterdir())) == 1


@pytest.mark.parametrize("digest", ["", "..", "../manifests", "0" * 64 + "/", "A" * 64])
def test_only_a_hash_is_looked_up(tmp_path: Path, digest: str) -> None:
    library = BackboneLibrary(tmp_path)
    library.add(GLYPHS, KEY)
    assert library.blob(digest) is None
    assert library.signed_manifest(digest) is None


def test_a_file_that_changes_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone_library, "read_pieces", lambda path: iter([b"changed"]))
    with pytest.raises(BackboneError, match="a file that changed while it was read"):
        BackboneLibrary(tmp_path).add(GLYPHS, KEY)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BackboneError, match=r"No space left on device.*Make room"):
        BackboneLibrary(tmp_path).add(GLYPHS, KEY)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_operators_key_is_read_or_the_reason_said(tmp_path: Path) -> None:
    path = tmp_path / "operator.key"
    with pytest.raises(BackboneError, match=r"operator\.key: found 'No such file"):
        read_operator_key(path)
    path.write_text("nothing")
    with pytest.raises(BackboneError, match="found 'no usable key'"):
        read_operator_key(path)
    write_key(path, ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(BackboneError, match="found 'another kind of key'"):
        read_operator_key(path)
    write_key(path)
    assert read_operator_key(path).public_key() == KEY.public_key()


def test_the_command_prints_what_a_plan_needs(tmp_path: Path) -> None:
    write_key(tmp_path / "operator.key")
    arguments = ["add", str(GLYPHS), "--server", str(tmp_path), "--name", "our-glyphs"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    table, source, sha256 = done.stdout.splitlines()
    assert table == "[backbone]"
    made = Backbone(source=source.split('"')[1], sha256=sha256.split('"')[1])
    assert made.source == "server:our-glyphs"
    assert BackboneLibrary(tmp_path / "backbones").blob(str(made.sha256)) is not None


def test_the_command_refuses_what_sites_could_not_load(tmp_path: Path) -> None:
    write_key(tmp_path / "operator.key")
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(BackboneError):
        CliRunner().invoke(
            app, ["add", str(source), "--server", str(tmp_path)], catch_exceptions=False
        )
    assert not (tmp_path / "backbones").exists()


def test_a_library_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BackboneError, match=r"found 'Not a directory'.*correct the permissions"):
        BackboneLibrary(tmp_path / "file" / "library").add(GLYPHS, KEY)
