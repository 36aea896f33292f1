from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedgraft_common.adapted import AdaptedBackbone, adapted_backbone
from fedgraft_common.adapters import AdapterMethod, find_method, register
from fedgraft_common.backbone import load_backbone
from fedgraft_common.errors import AdapterError
from fedgraft_common.features import pool
from fedgraft_common.plan import Adapter, Plan
from fedgraft_common.plan import Backbone as Config

METHODS = ["ffa-lora", "lora", "film"]


@pytest.fixture(params=["vit", "resnet"])
def config(request: pytest.FixtureRequest) -> Config:
    """Where a backbone is; the ViT's features are the mean over its tokens."""
    directory: Path = request.getfixturevalue(f"{request.param}_directory")
    return Config(source=f"dir:{directory}", pooling="mean" if request.param == "vit" else "auto")


def build(config: Config, seed: int = 0, **adapter: object) -> AdaptedBackbone:
    chosen = Adapter.model_validate({"rank": 2} | adapter)
    return AdaptedBackbone(load_backbone(config), chosen, seed)


def example(model: AdaptedBackbone) -> torch.Tensor:
    (images,) = model.backbone.example(3, torch.Generator().manual_seed(5))
    return images


def whole_adapter(model: AdaptedBackbone) -> dict[str, torch.Tensor]:
    """The trained values, and those that LoRA draws and FFA-LoRA freezes."""
    return {
        name: p.detach()
        for name, p in model.peft.named_parameters()
        if ".lora_" in name or ".ln_tuning_layers." in name
    }


# --- the start


@pytest.mark.parametrize("method", METHODS)
def test_initial_adapter_is_a_function_of_the_seed_only(config: Config, method: str) -> None:
    torch.manual_seed(1)
    one = build(config, seed=7, method=method)
    torch.manual_seed(2)
    same, other = build(config, seed=7, method=method), build(config, seed=8, method=method)
    assert whole_adapter(one)
    assert whole_adapter(one).keys() == whole_adapter(same).keys()
    for name, value in whole_adapter(one).items():
        assert torch.equal(value, whole_adapter(same)[name]), name
    drawn = [
        n for n, v in whole_adapter(one).items() if not torch.equal(v, whole_adapter(other)[n])
    ]
    assert bool(drawn) == (method != "film")
    assert all(".lora_A." in name for name in drawn)


@pytest.mark.parametrize("method", [*METHODS, "none"])
def test_at_the_start_the_features_are_the_backbone_s(config: Config, method: str) -> None:
    plain = load_backbone(config)
    model = build(config, method=method)
    inputs = example(model)
    with torch.no_grad():
        expected = pool(plain.model(inputs), plain.pooling)
        torch.testing.assert_close(model(inputs), expected, rtol=0, atol=1e-6)
    assert expected.shape == (3, model.feature_dim)


# --- what is trained and sent


@pytest.mark.parametrize("method", METHODS)
def test_schema_lists_exactly_what_is_trained(config: Config, method: str) -> None:
    model = build(config, method=method)
    trained = {n: p for n, p in model.peft.named_parameters() if p.requires_grad}
    assert [s.name for s in model.schema] == sorted(n.replace(".default.", ".") for n in trained)
    assert {s.shape for s in model.schema} == {tuple(p.shape) for p in trained.values()}
    assert {s.dtype for s in model.schema} == {"float32"}


def test_ffa_lora_sends_b_only(config: Config) -> None:
    names = [s.name for s in build(config, method="ffa-lora").schema]
    assert names
    assert all(".lora_B." in name for name in names)
    both = [s.name for s in build(config, method="lora").schema]
    assert len(both) == 2 * len(names)


def test_lora_adapts_every_linear_and_convolution_layer(config: Config) -> None:
    plain = load_backbone(config)
    suitable = [
        name
        for name, module in plain.model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and any(name.startswith(block + ".") for block in plain.blocks)
    ]
    model = build(config, method="ffa-lora")
    assert len(model.schema) == len(suitable) > 0


def test_head_only_plan_trains_nothing(config: Config) -> None:
    model = build(config, method="none")
    assert model.schema == ()
    assert model.state() == {}
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_state_and_load(config: Config, method: str) -> None:
    model, other = build(config, method=method), build(config, method=method)
    parameters = {name: id(p) for name, p in model.adapter.items()}
    start = model.state()
    changed = {name: torch.randn_like(value) for name, value in start.items()}
    model.load(changed)
    assert {name: id(p) for name, p in model.adapter.items()} == parameters  # in place
    assert all(torch.equal(model.state()[name], value) for name, value in changed.items())
    assert all(not torch.equal(changed[name], value) for name, value in start.items())  # a copy
    inputs = example(model)
    with torch.no_grad():
        assert not torch.allclose(model(inputs), other(inputs), atol=1e-3)
        other.load(model.state())
        assert torch.equal(model(inputs), other(inputs))


# --- modes


@pytest.mark.parametrize("method", METHODS)
def test_modes(config: Config, method: str) -> None:
    """Opacus' hooks need trained layers in train mode; dropout and BatchNorm stay off."""
    model = build(config, method=method)
    model.train()  # what a careless caller does
    model.set_modes()
    for name, module in model.peft.named_modules():
        if isinstance(module, nn.Dropout | nn.modules.batchnorm._BatchNorm):
            assert not module.training, name
        elif any(p.requires_grad for p in module.parameters(recurse=False)):
            assert module.training, name
        else:
            assert not module.training, name


def test_statistics_of_batch_norm_do_not_move(resnet_directory: Path) -> None:
    model = build(Config(source=f"dir:{resnet_directory}"), method="film")
    before = {name: b.clone() for name, b in model.named_buffers() if "running" in name}
    inputs = example(model)
    together = model(inputs)
    assert before
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers() if n in before)
    alone = torch.cat([model(inputs[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)  # records do not mix


def test_dropout_is_off(vit_directory: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(vit_directory, tmp_path / "vit"))
    settings = json.loads((directory / "config.json").read_text())
    settings |= {"hidden_dropout_prob": 0.9, "attention_probs_dropout_prob": 0.9}
    (directory / "config.json").write_text(json.dumps(settings))
    model = build(Config(source=f"dir:{directory}", pooling="mean"), method="lora")
    inputs = example(model)
    assert torch.equal(model(inputs), model(inputs))


# --- blocks and targets


@pytest.mark.parametrize(
    ("layers", "adapted"), [("all", 3), ("last:1", 1), ("last:3", 3), (["encoder.stages.1"], 1)]
)
def test_layers(resnet_directory: Path, layers: object, adapted: int) -> None:
    model = build(Config(source=f"dir:{resnet_directory}"), method="film", layers=layers)
    assert len(model.adapted_blocks) == adapted
    assert all(any(b in s.name for b in model.adapted_blocks) for s in model.schema)
    if layers == "last:1":
        assert model.adapted_blocks == ("encoder.stages.2",)


@pytest.mark.parametrize(
    "layers", ["last:9", "last:0", "last:-1", "last:", "first:1", ["encoder.stages.7"]]
)
def test_layers_that_do_not_exist(resnet_directory: Path, layers: object) -> None:
    with pytest.raises(AdapterError) as caught:
        build(Config(source=f"dir:{resnet_directory}"), method="film", layers=layers)
    assert caught.value.field == "adapter.layers"
    assert caught.value.value == (layers if isinstance(layers, str) else "encoder.stages.7")
    assert "last:1 to last:3, or names from: encoder.stages.0" in caught.value.allowed


def test_targets(vit_directory: Path) -> None:
    config = Config(source=f"dir:{vit_directory}", pooling="mean")
    plain = load_backbone(config)
    endings = {
        n.rpartition(".")[2] for n, m in plain.model.named_modules() if isinstance(m, nn.Linear)
    }
    ending = sorted(endings - {"dense"})[0]
    model = build(config, method="ffa-lora", targets=[ending], layers="last:2")
    assert model.schema
    assert all(f".{ending}.lora_B." in s.name for s in model.schema)


def test_targets_that_match_nothing(config: Config) -> None:
    with pytest.raises(AdapterError) as caught:
        build(config, method="ffa-lora", targets=["nowhere"])
    assert caught.value.field == "adapter.targets"
    assert caught.value.value == ("nowhere",)
    assert "endings of ffa-lora modules" in caught.value.allowed
    kinds = nn.Linear | nn.Conv2d
    model = load_backbone(config).model
    assert any(
        name.rpartition(".")[2] in caught.value.allowed.split(": ", 1)[1].split(", ")
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    )


def test_unknown_method(config: Config) -> None:
    with pytest.raises(AdapterError, match=r"found 'nothing'; allowed: dora, ffa-lora, .*none"):
        build(config, method="nothing")


@pytest.mark.parametrize("name", ["lora", "none"])
def test_a_method_cannot_take_another_s_name(name: str) -> None:
    lora = find_method("lora")
    taken = AdapterMethod(name, lora.suits, lora.config, lora.trains, lora.random)
    with pytest.raises(AdapterError, match="a new name"):
        register(taken)
    assert find_method("lora") is lora


# --- features


def test_pooling_of_tokens() -> None:
    hidden = torch.randn(2, 5, 4)
    output = SimpleNamespace(last_hidden_state=hidden, pooler_output=None)
    assert torch.equal(pool(output, "cls"), hidden[:, 0])
    torch.testing.assert_close(pool(output, "mean"), hidden.mean(dim=1))
    torch.testing.assert_close(pool(output, None), hidden.mean(dim=1))
    with pytest.raises(AdapterError, match="this model has no pooler"):
        pool(output, "pooler")


def test_pooling_of_maps() -> None:
    hidden, pooled = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 1, 1)
    output = SimpleNamespace(last_hidden_state=hidden, pooler_output=pooled)
    assert torch.equal(pool(output, None), pooled.flatten(1))
    assert torch.equal(pool(output, "pooler"), pooled.flatten(1))
    torch.testing.assert_close(pool(output, "mean"), hidden.mean(dim=(2, 3)))


def test_pooling_gives_float32() -> None:
    output = SimpleNamespace(last_hidden_state=torch.randn(2, 5, 4).bfloat16())
    assert pool(output, "mean").dtype is torch.float32


def test_from_a_plan(resnet_directory: Path) -> None:
    changes = {"backbone.source": f"dir:{resnet_directory}", "adapter.method": "lora", "seed": 4}
    model = adapted_backbone(Plan().replace(changes))
    expected = build(Config(source=f"dir:{resnet_directory}"), seed=4, method="lora", rank=8)
    assert all(torch.equal(value, expected.state()[n]) for n, value in model.state().items())
