"""The registry of sources."""

from __future__ import annotations

import pytest

from fedgraft_common.backbone import load_backbone
from fedgraft_common.errors import BackboneError
from fedgraft_common.plan import Backbone as Config
from fedgraft_common.sources import Source, find_source, register


def test_a_source_cannot_take_another_s_kind() -> None:
    taken = find_source("dir")
    for kind in ("dir", "server"):
        with pytest.raises(BackboneError, match="a new kind"):
            register(Source(kind, taken.load))
    assert find_source("dir") is taken


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(BackboneError, match=r"found 'keras'.*dir:.*timm:.*torchvision:"):
        find_source("keras")


def test_a_server_s_backbone_must_be_fetched_first() -> None:
    with pytest.raises(BackboneError, match="Fetch it from the federation's server first"):
        load_backbone(Config(source="server:glyphs", sha256="0" * 64))


@pytest.mark.parametrize("source", ["timm:resnet18", "embedded:glyphs"])
def test_a_signed_manifest_is_for_directories(source: str) -> None:
    config = Config(source=source, manifest_sha256="0" * 64, weights="/nowhere.safetensors")
    with pytest.raises(BackboneError, match=r"directory or a fetched backbone|no such file"):
        load_backbone(config)
