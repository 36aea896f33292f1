from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LNTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from fedgraft_common.backbone import (
    Backbone,
    embedded_directory,
    load_backbone,
)
from fedgraft_common.errors import BackboneError
from fedgraft_common.plan import Backbone as Config
from fedgraft_common.preparations import ImagePreparation


def load(directory: Path, sha256: str | None = None) -> Backbone:
    return load_backbone(Config(source=f"dir:{directory}", sha256=sha256))


@pytest.fixture
def copy(resnet_directory: Path, tmp_path: Path) -> Path:
    """A directory that a test may break."""
    return Path(shutil.copytree(resnet_directory, tmp_path / "copy"))


@pytest.fixture(params=["vit_directory", "resnet_directory"])
def directory(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


# --- loading


def test_frozen_in_eval_mode_and_named_by_its_hash(directory: Path) -> None:
    backbone = load(directory)
    weights = (directory / "model.safetensors").read_bytes()
    assert backbone.sha256 == hashlib.sha256(weights).hexdigest()
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}


def test_pinned_hash(directory: Path) -> None:
    digest = load(directory).sha256
    assert load(directory, digest).sha256 == digest
    with pytest.raises(BackboneError) as caught:
        load(directory, "0" * 64)
    assert caught.value.field == str(directory / "model.safetensors")
    assert digest in str(caught.value.value)
    assert "0" * 64 in caught.value.allowed


def test_every_weight_comes_from_the_file(directory: Path) -> None:
    """Also the ones a checkpoint lacks: a random pooler would differ from site to site."""
    features = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        backbone = load(directory)
        output = backbone.model(*backbone.example(2, torch.Generator().manual_seed(0)))
        pooled = getattr(output, "pooler_output", None)
        features.append([output.last_hidden_state, *([] if pooled is None else [pooled])])
    assert all(torch.equal(one, other) for one, other in zip(*features, strict=True))


def test_incomplete_weights(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    lost = sorted(name for name in weights if name.endswith("convolution.weight"))[0]
    del weights[lost]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=lost):
        load(copy)


def test_an_adapter_beside_the_weights(copy: Path) -> None:
    """transformers would load and apply it, behind the back of the pinned hash."""
    with warnings.catch_warnings():  # PEFT does not know BatchNorm
        warnings.simplefilter("ignore")
        foreign = get_peft_model(
            AutoModel.from_pretrained(copy),
            LNTuningConfig(target_modules=["encoder.stages.0.layers.0.layer.0.normalization"]),
        )
    foreign.save_pretrained(copy)
    with pytest.raises(BackboneError, match=r"adapter_config\.json"):
        load(copy)


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (lambda d: d.rename(d.with_name("gone")), "an existing directory"),
        (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda d: shorten(d / "model.safetensors", 10), "not fully covered"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "header too small"),
        (lambda d: (d / "config.json").unlink(), "AutoModel loads offline"),
        (lambda d: (d / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda d: (d / "config.json").write_text('{"model_type": "x"}'), "model type `x`"),
    ],
)
def test_broken_directory(copy: Path, break_it: Callable[[Path], object], text: str) -> None:
    break_it(copy)
    with pytest.raises(BackboneError, match=text) as caught:
        load(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def shorten(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


class OpensFile:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
def test_a_pickle_is_named_and_never_opened(copy: Path, tmp_path: Path, name: str) -> None:
    trace = tmp_path / "opened"
    (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(pickle.dumps({"weight": OpensFile(trace)}))
    with pytest.raises(BackboneError) as caught:
        load(copy)
    assert caught.value.field == str(copy / name)
    assert "run code" in str(caught.value.value)
    assert not trace.exists()
    pickle.loads((copy / name).read_bytes())  # noqa: S301 - the trap itself works
    assert trace.exists()


def test_code_in_the_directory_does_not_run(copy: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_x.X", "AutoConfig": "modeling_x.C"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "modeling_x.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\n")
    load(copy)
    assert not trace.exists()


# --- manifest and preprocessing

MANIFEST = {
    "name": "test",
    "licence": "CC0",
    "blocks": ["encoder.stages.2"],
    "pooling": "mean",
    "preprocessing": {"channels": 1, "size": 12, "mean": [0.25], "std": [0.5], "more": "ignored"},
}


def test_manifest(copy: Path) -> None:
    (copy / "manifest.json").write_text(json.dumps(MANIFEST))
    backbone = load(copy)
    assert (backbone.manifest.name, backbone.pooling) == ("test", "mean")
    assert backbone.blocks == ("encoder.stages.2",)
    (prepared,) = backbone.prepare(torch.full((2, 1, 12, 12), 0.75))
    assert torch.equal(prepared, torch.ones(2, 1, 12, 12))
    assert backbone.example(5, torch.Generator())[0].shape == (5, 1, 12, 12)


def test_plan_may_choose_another_pooling(copy: Path) -> None:
    (copy / "manifest.json").write_text(json.dumps(MANIFEST))
    assert load_backbone(Config(source=f"dir:{copy}", pooling="pooler")).pooling == "pooler"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "Invalid JSON"),
        ("[]", "manifest.json"),
        ("{}", "name: found .*Field required"),
        (json.dumps(MANIFEST | {"preprocessing": {}}), r"preprocessing\.channels: .*required"),
        (json.dumps(MANIFEST | {"pooling": "max"}), "pooling: found 'max'"),
        (
            json.dumps(
                MANIFEST | {"preprocessing": {"channels": 1, "size": 0, "mean": [0], "std": [1]}}
            ),
            r"preprocessing\.size: found 0",
        ),
    ],
)
def test_broken_manifest(copy: Path, content: str, text: str) -> None:
    (copy / "manifest.json").write_text(content)
    with pytest.raises(BackboneError, match=text) as caught:
        load(copy)
    assert str(copy / "manifest.json") in str(caught.value)


@pytest.mark.parametrize(
    ("mean", "std"), [([0.1, 0.2, 0.3], [1, 1, 1]), ([0.5], [0.5, 0.5]), ([0.5], [0.0]), ([], [])]
)
def test_constants_fit_the_channels(copy: Path, mean: list[float], std: list[float]) -> None:
    preprocessing = {"channels": 1, "size": 16, "mean": mean, "std": std}
    (copy / "manifest.json").write_text(json.dumps(MANIFEST | {"preprocessing": preprocessing}))
    with pytest.raises(BackboneError, match="preprocessing"):
        load(copy)


def test_without_manifest_constants_come_from_the_processor(copy: Path) -> None:
    processor = {"size": {"height": 20, "width": 20}, "image_mean": [0.2], "image_std": [0.3]}
    (copy / "preprocessor_config.json").write_text(json.dumps(processor))
    found = load(copy).preparation
    assert isinstance(found, ImagePreparation)
    assert (found.channels, found.mean, found.std) == (1, (0.2,), (0.3,))


def test_broken_processor_file(copy: Path) -> None:
    (copy / "preprocessor_config.json").write_text("{")
    with pytest.raises(BackboneError, match="preprocessor_config"):
        load(copy)


# --- blocks


def test_blocks_of_a_transformer_are_its_layers(vit_directory: Path) -> None:
    backbone = load(vit_directory)
    assert len(backbone.blocks) == 4
    kinds = {type(backbone.model.get_submodule(name)).__name__ for name in backbone.blocks}
    assert kinds == {"ViTLayer"}


def test_blocks_of_a_convolutional_network_are_its_stages(resnet_directory: Path) -> None:
    assert load(resnet_directory).blocks == tuple(f"encoder.stages.{i}" for i in range(3))


# --- what ships with Fedgraft


def test_embedded_manifest_describes_the_files() -> None:
    directory = embedded_directory("glyphs")
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    listed = {entry["path"]: entry for entry in manifest["files"]}
    assert listed.keys() == {"config.json", "model.safetensors"}
    for name, entry in listed.items():
        content = (directory / name).read_bytes()
        assert len(content) == entry["size"]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]


def test_embedded_backbone_is_what_its_manifest_says() -> None:
    backbone = load_backbone(Config(source="embedded:glyphs"))
    manifest = json.loads((backbone.directory / "manifest.json").read_text(encoding="utf-8"))
    assert backbone.blocks == tuple(manifest["blocks"])
    assert sum(p.numel() for p in backbone.model.parameters()) == manifest["parameters"]
    output = backbone.model(*backbone.example(2, torch.Generator().manual_seed(0)))
    assert output.pooler_output.flatten(1).shape == (2, manifest["feature_dim"])
    assert manifest["licence"]


@pytest.mark.parametrize("name", ["nothing", "../embedded/../../..", "glyphs/.."])
def test_unknown_embedded_backbone(name: str) -> None:
    with pytest.raises(BackboneError, match=r"allowed: .*embedded:glyphs"):
        load_backbone(Config(source=f"embedded:{name}"))
