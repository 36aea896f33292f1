"""A signed manifest is the operator's word on which files make up a backbone, and nothing else."""

from __future__ import annotations

import contextlib
import json
import shutil
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedgraft_common.errors import BackboneError
from fedgraft_common.manifest import (
    DistributionManifest,
    build_manifest,
    file_sha256,
    is_digest,
    sign_manifest,
    verify_manifest,
)

KEY = Ed25519PrivateKey.generate()
PREFIX = b"fedgraft backbone manifest 1\n"


def backbone(directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def document(directory: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(build_manifest(backbone(directory)).canonical)
    return made


def signed(changed: object) -> bytes:
    """Signed by the operator, whatever it says."""
    text = json.dumps(changed, sort_keys=True, separators=(",", ":"))
    signature = b64encode(KEY.sign(PREFIX + text.encode())).decode()
    return json.dumps({"manifest": text, "signature": signature}).encode()


def test_files_are_listed_with_size_and_hash(tmp_path: Path) -> None:
    directory = backbone(tmp_path / "tiny")
    facts = {"name": "own-name", "licence": "MIT", "source": {"made": "here"}}
    (directory / "manifest.json").write_text(json.dumps(facts))
    (directory / ".gitattributes").write_text("hidden: left out")
    (directory / "onnx").mkdir()
    manifest = build_manifest(directory)
    assert (manifest.name, manifest.licence, manifest.source) == (
        "own-name", "MIT", '{"made": "here"}',
    )  # fmt: skip
    assert [entry.name for entry in manifest.files] == [
        "config.json", "manifest.json", "model.safetensors",
    ]  # fmt: skip
    assert manifest.sha256 == file_sha256(directory / "model.safetensors")
    assert manifest.size == sum(p.stat().st_size for p in directory.glob("[a-z]*.*"))
    assert build_manifest(directory, "another").name == "another"


def test_the_embedded_backbone_has_a_manifest() -> None:
    import fedgraft_common

    root = Path(str(fedgraft_common.__file__)).parent / "embedded" / "glyphs"
    manifest = build_manifest(root)
    assert manifest.name == "glyphs"
    assert manifest.sha256.startswith("fdf275af")


def test_signed_and_verified(tmp_path: Path) -> None:
    manifest = build_manifest(backbone(tmp_path / "tiny"))
    assert verify_manifest(sign_manifest(manifest, KEY), KEY.public_key()) == manifest


def test_another_signer_is_refused(tmp_path: Path) -> None:
    made = sign_manifest(build_manifest(backbone(tmp_path / "tiny")), KEY)
    with pytest.raises(BackboneError, match="a signature that does not fit"):
        verify_manifest(made, Ed25519PrivateKey.generate().public_key())


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_changed_bit_is_refused_or_changes_nothing(position: int, bit: int) -> None:
    root = Path(__file__).parents[3] / "common/fedgraft_common/embedded/glyphs"
    manifest = build_manifest(root)
    altered = bytearray(sign_manifest(manifest, KEY))
    altered[position % len(altered)] ^= 1 << bit
    with contextlib.suppress(BackboneError):
        assert verify_manifest(bytes(altered), KEY.public_key()) == manifest


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b"\xff", b'{"manifest":1,"signature":""}',
                b"[" * 100_000, b" " * 300_000],
)  # fmt: skip
def test_something_else_is_refused(content: bytes) -> None:
    with pytest.raises(BackboneError, match="allowed: a signed manifest"):
        verify_manifest(content, KEY.public_key())


def test_a_signature_for_another_purpose_is_refused(tmp_path: Path) -> None:
    text = build_manifest(backbone(tmp_path / "tiny")).canonical
    signature = b64encode(KEY.sign(text)).decode()
    content = json.dumps({"manifest": text.decode(), "signature": signature}).encode()
    with pytest.raises(BackboneError, match="a signature that does not fit"):
        verify_manifest(content, KEY.public_key())


@pytest.mark.parametrize(
    "name",
    ["../escape.json", "/etc/passwd.json", "a/b.json", "a\\b.json", "..", ".hidden.json",
     "C:x.json", "pickle.bin", "pytorch_model.pt", "code.py", "x.json\n", "x.json\x00", "",
     "x" * 200 + ".json", "ünicode.json"],
)  # fmt: skip
def test_names_that_are_not_plain_are_refused(tmp_path: Path, name: str) -> None:
    changed = document(tmp_path / "tiny")
    changed["files"].append({"name": name, "size": 1, "sha256": "0" * 64})
    with pytest.raises(BackboneError, match=r"files\.2\.name"):
        verify_manifest(signed(changed), KEY.public_key())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"files": []}, "files"),
        ({"files": [{"name": "model.safetensors", "size": 1, "sha256": "0" * 64}] * 2}, "twice"),
        ({"format": 2}, "format"),
        ({"surprise": 1}, "surprise"),
        ({"name": "../x"}, "name"),
    ],
)
def test_a_manifest_that_is_not_allowed_is_refused_though_signed(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    with pytest.raises(BackboneError, match=text):
        verify_manifest(signed(document(tmp_path / "tiny") | change), KEY.public_key())


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", -1), ("size", 2**41), ("size", 1.5), ("size", "1"), ("sha256", "../x"),
     ("sha256", "A" * 64), ("sha256", "0" * 63)],
)  # fmt: skip
def test_a_wrong_size_or_hash_is_refused(tmp_path: Path, field: str, value: object) -> None:
    changed = document(tmp_path / "tiny")
    changed["files"][0][field] = value
    with pytest.raises(BackboneError, match=rf"files\.0\.{field}"):
        verify_manifest(signed(changed), KEY.public_key())


def test_names_that_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    changed = document(tmp_path / "tiny")
    changed["files"].append(changed["files"][0] | {"name": "CONFIG.json"})
    with pytest.raises(BackboneError, match="a file name occurs twice"):
        verify_manifest(signed(changed), KEY.public_key())


def test_only_the_canonical_spelling_is_accepted(tmp_path: Path) -> None:
    text = json.dumps(document(tmp_path / "tiny"), indent=1)
    signature = b64encode(KEY.sign(PREFIX + text.encode())).decode()
    content = json.dumps({"manifest": text, "signature": signature}).encode()
    with pytest.raises(BackboneError, match="allowed: the canonical form"):
        verify_manifest(content, KEY.public_key())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.pkl", "noending"])
def test_a_directory_with_a_pickle_is_not_handed_out(tmp_path: Path, name: str) -> None:
    directory = backbone(tmp_path / "tiny")
    (directory / name).write_bytes(b"")
    with pytest.raises(BackboneError, match=f"{name}: found 'a file of kind .*a pickle can run"):
        build_manifest(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_directory_without_a_model_is_refused(tmp_path: Path, name: str) -> None:
    directory = backbone(tmp_path / "tiny")
    (directory / name).rename(directory / "other.json")
    with pytest.raises(BackboneError, match=f"{name} is missing"):
        build_manifest(directory)


def test_an_adapter_beside_the_backbone_is_refused(tmp_path: Path) -> None:
    directory = backbone(tmp_path / "tiny")
    shutil.copy(directory / "config.json", directory / "adapter_config.json")
    with pytest.raises(BackboneError, match="would change the model without changing its hash"):
        build_manifest(directory)


def test_no_directory_and_no_json_are_said(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="no such directory"):
        build_manifest(tmp_path / "absent")
    directory = backbone(tmp_path / "tiny")
    (directory / "manifest.json").write_text("{")
    with pytest.raises(BackboneError, match="allowed: JSON"):
        build_manifest(directory)


def test_only_a_digest_is_a_digest() -> None:
    assert is_digest("0" * 64)
    assert not any(map(is_digest, ["", "0" * 63, "A" * 64, "0" * 64 + "\n", "../" + "0" * 61]))


def test_the_manifest_is_frozen(tmp_path: Path) -> None:
    manifest = build_manifest(backbone(tmp_path / "tiny"))
    with pytest.raises(ValueError, match="frozen"):
        manifest.name = "x"
    assert isinstance(manifest, DistributionManifest)
