"""Networks of timm from a local file, from timm's own directory form and from the hub's cache."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fedgraft_common.backbone import Backbone, load_backbone
from fedgraft_common.errors import BackboneError
from fedgraft_common.plan import Backbone as Config

OPTIONS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 2,
}
NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(timm.create_model(NAME, num_classes=7, **OPTIONS).state_dict(), path)
    return path


def load(file: Path, **changes: Any) -> Backbone:
    config = {"source": f"timm:{NAME}", "weights": str(file), "options": OPTIONS} | changes
    return load_backbone(Config.model_validate(config))


def test_the_features_are_timm_s(file: Path) -> None:
    backbone = load(file)
    own: Any = timm.create_model(NAME, num_classes=7, **OPTIONS).eval()
    own.load_state_dict(load_file(file))
    (inputs,) = backbone.example(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = own.forward_features(inputs)
        torch.testing.assert_close(
            backbone.features(backbone.model, (inputs,)), own.forward_head(hidden, pre_logits=True)
        )
        torch.testing.assert_close(backbone.features(backbone.model, (inputs,), "tokens"), hidden)
    assert backbone.blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert backbone.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert not any(p.requires_grad for p in backbone.model.parameters())


def test_the_input_is_prepared_as_timm_says(file: Path) -> None:
    (prepared,) = load(file).prepare(torch.full((1, 3, 40, 40), 0.75))
    assert prepared.shape == (1, 3, 32, 32)
    torch.testing.assert_close(prepared, torch.full((1, 3, 32, 32), 0.5))  # mean .5, std .5
    (prepared,) = load(file, preprocessing={"mean": [0, 0, 0], "std": [1, 1, 1]}).prepare(
        torch.full((1, 1, 32, 32), 0.75)
    )
    torch.testing.assert_close(prepared, torch.full((1, 3, 32, 32), 0.75))


def test_one_channel(file: Path) -> None:
    backbone = load(file, options=OPTIONS | {"in_chans": 1})
    colour = load(file)
    grey = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        one = backbone.features(backbone.model, backbone.prepare(grey))
        three = colour.features(colour.model, colour.prepare(grey))
    torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-4)


def test_a_pinned_hash(file: Path) -> None:
    with pytest.raises(BackboneError, match="pinned by the plan"):
        load(file, sha256="0" * 64)


def test_weights_that_lack_a_part_are_refused(file: Path, tmp_path: Path) -> None:
    """timm itself leaves them at random when there is no classifier to fill."""
    tensors = load_file(file)
    del tensors["blocks.1.mlp.fc1.weight"]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(BackboneError, match=r"blocks\.1\.mlp\.fc1\.weight"):
        load(tmp_path / "less.safetensors")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"source": "timm:no_such_network"}, "list_models"),
        ({"options": OPTIONS | {"depht": 3}}, "depht"),
        ({"options": OPTIONS | {"embed_dim": 32}}, "size mismatch"),
        ({"weights": "/nowhere/x.safetensors"}, "existing safetensors file"),
        ({"weights": None, "source": "timm:test_vit"}, "hub cache|published weights"),
    ],
)
def test_what_does_not_fit(
    file: Path, changes: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match=text) as caught:
        load(file, **changes)
    assert "\n" not in str(caught.value)


def test_timm_s_directory_form(file: Path, tmp_path: Path) -> None:
    described = {
        "architecture": NAME,
        "num_classes": 7,
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]},
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "model.safetensors").write_bytes(file.read_bytes())
    config = {"source": f"dir:{tmp_path}", "weights": None}
    backbone = load(file, **config)
    (prepared,) = backbone.prepare(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(prepared[0, :, 0, 0], torch.tensor([-0.1, -0.2, -0.3]))
    assert len(backbone.blocks) == 3
