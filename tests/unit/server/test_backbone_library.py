"""What a server hands out, and the command that adds to it."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner

from fedgraft_common.backbone import embedded_directory, load_backbone
from fedgraft_common.backbone_protocol import ManifestRequest
from fedgraft_common.errors import BackboneError
from fedgraft_common.manifest import build_manifest
from fedgraft_common.plan import Backbone
from fedgraft_server import backbone_library
from fedgraft_server.backbone_cli import app
from fedgraft_server.backbone_library import BackboneLibrary

KEY = Ed25519PrivateKey.generate()
GLYPHS = embedded_directory("glyphs")


@pytest.fixture
def server(tmp_path: Path) -> Path:
    directory = tmp_path / "server"
    directory.mkdir()
    pem = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (directory / "operator.key").write_bytes(pem)
    return directory


def test_added_twice_is_added_once(tmp_path: Path) -> None:
    library = BackboneLibrary(tmp_path)
    manifest = library.add(GLYPHS, KEY)
    files = sorted(tmp_path.rglob("*"))
    assert library.add(GLYPHS, KEY) == manifest
    assert sorted(tmp_path.rglob("*")) == files
    for file in manifest.files:
        assert library.blob(file.sha256).read_bytes() == (GLYPHS / file.name).read_bytes()
    for request in (
        ManifestRequest(name="glyphs"),
        ManifestRequest(sha256=manifest.weights_sha256),
        ManifestRequest(name="glyphs", manifest_sha256=manifest.hash),
    ):
        signed = library.find(request)
        assert signed is not None and signed.verify(KEY.public_key()) == manifest
    assert library.find(ManifestRequest()) is None
    assert library.find(ManifestRequest(name="glyphs", sha256="0" * 64)) is None


def test_the_server_loads_what_it_hands_out(tmp_path: Path) -> None:
    """Runs check the same manifest as sites do."""
    library = BackboneLibrary(tmp_path)
    manifest = library.add(GLYPHS, KEY)
    request = ManifestRequest(sha256=manifest.weights_sha256, manifest_sha256=manifest.hash)
    directory = library.assembled(request)
    config = Backbone(
        source="server:glyphs", sha256=manifest.weights_sha256, manifest_sha256=manifest.hash
    )
    assert load_backbone(config, directory).manifest.name == "glyphs"
    assert library.assembled(request) == directory


def test_a_name_stays_with_its_backbone(tmp_path: Path) -> None:
    library = BackboneLibrary(tmp_path / "library")
    library.add(GLYPHS, KEY)
    other = Path(shutil.copytree(GLYPHS, tmp_path / "other"))
    (other / "config.json").write_text("{}")
    with pytest.raises(BackboneError, match="a name that no other backbone here has"):
        library.add(other, KEY)
    library.add(other, KEY, "other")
    assert [manifest.name for _, manifest in library.manifests()] == ["glyphs", "other"]


def test_a_file_that_changes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(GLYPHS, tmp_path / "source"))
    stale = build_manifest(source)
    (source / "config.json").write_text("{}")
    monkeypatch.setattr(backbone_library, "build_manifest", lambda *_: stale)
    with pytest.raises(BackboneError, match="a file that changes"):
        BackboneLibrary(tmp_path / "library").add(source, KEY)
    assert not [path for path in (tmp_path / "library").rglob("*") if path.is_file()]


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    library = BackboneLibrary(tmp_path)
    library.add(GLYPHS, KEY)
    path = tmp_path / "manifests" / "glyphs.json"
    path.write_text(json.dumps({"manifest": "{}", "signature": ""}))
    with pytest.raises(BackboneError, match=r"glyphs\.json: found 'no manifest'"):
        list(library.manifests())


def test_the_command_prints_what_a_plan_needs(server: Path) -> None:
    run = CliRunner().invoke(app, ["add", str(GLYPHS), "--name", "mine", "--server", str(server)])
    assert run.exit_code == 0, run.output
    section = Backbone(**tomllib.loads(run.output)["backbone"])
    assert section.source == "server:mine"
    assert section.manifest_sha256 == build_manifest(GLYPHS, "mine").hash
    arguments = ["add", str(GLYPHS), "--name", "mine", "--server", str(server), "--json"]
    assert Backbone(**json.loads(CliRunner().invoke(app, arguments).output)) == section
    shown = CliRunner().invoke(app, ["list", "--server", str(server)]).output
    assert shown.startswith("mine  ") and str(section.sha256) in shown
    listed = CliRunner().invoke(app, ["list", "--server", str(server), "--json"]).output
    assert json.loads(listed)[0]["hash"] == section.manifest_sha256


@pytest.mark.parametrize("content", [None, b"nonsense", "another kind of key"])
def test_without_the_operator_key_nothing_is_signed(
    server: Path, content: bytes | str | None
) -> None:
    path = server / "operator.key"
    if content is None:
        path.unlink()
    elif isinstance(content, str):
        other = generate_private_key(SECP256R1())
        path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    else:
        path.write_bytes(content)
    run = CliRunner().invoke(app, ["add", str(GLYPHS), "--server", str(server)])
    assert isinstance(run.exception, BackboneError)
    assert "the operator's Ed25519 key in PEM" in str(run.exception)
    assert {entry.name for entry in server.iterdir()} <= {"operator.key"}
