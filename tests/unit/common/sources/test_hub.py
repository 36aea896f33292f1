"""The hub's cache, laid out as huggingface_hub lays it out, and no network."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch

from fedgraft_common.backbone import load_backbone
from fedgraft_common.errors import BackboneError
from fedgraft_common.plan import Backbone as Config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(vit_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one repository in it; whoever asks the network fails the test."""
    root = tmp_path / "hub"
    repository = root / "models--ward--vit"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(vit_directory, repository / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    return root


@pytest.mark.parametrize("name", ["ward/vit", f"ward/vit@{COMMIT}", "ward/vit@main"])
@pytest.mark.usefixtures("cache")
def test_what_is_in_the_cache_is_used_without_the_network(name: str, vit_directory: Path) -> None:
    cached = load_backbone(Config(source=f"hf:{name}"))
    same = load_backbone(Config(source=f"dir:{vit_directory}"))
    assert cached.sha256 == same.sha256
    inputs = cached.example(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(cached.features(cached.model, inputs), same.features(same.model, inputs))


@pytest.mark.usefixtures("cache")
def test_offline_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match=r"found 'hf:ward/other'.*copy the cache") as caught:
        load_backbone(Config(source="hf:ward/other"))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("cache")
def test_a_name_that_is_none() -> None:
    with pytest.raises(BackboneError, match="OWNER/NAME"):
        load_backbone(Config(source="hf:../../etc"))
