"""The cached path against the whole model, under an adapter that changed after the caching."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fedgraft_client.head import LinearHead
from fedgraft_client.prefix import Prefix
from fedgraft_client.runtime import SiteModel
from fedgraft_common.adapted import AdaptedBackbone, adapted_backbone
from fedgraft_common.backbone import Backbone, Manifest, load_backbone
from fedgraft_common.plan import Adapter, Plan
from fedgraft_common.preparations import ImagePreparation
from fedgraft_simulations.families import FAMILIES

LAYERS = {
    "vit": ["all", "last:1", "last:3", ["layers.1", "layers.3"]],
    "resnet": ["all", "last:1", ["encoder.stages.0", "encoder.stages.2"]],
    "glyphs": ["all", "last:2", ["encoder.stages.1"]],
    "swin": ["all", "last:1", ["encoder.layers.1"]],
    "convnext": ["all", "last:1", ["encoder.stages.0"]],
}
CASES = [
    (name, method, layers)
    for name, choices in LAYERS.items()
    for method in ("ffa-lora", "lora", "film")
    for layers in choices
]


@pytest.fixture(scope="module")
def sources(
    vit_directory: Path, resnet_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    torch.manual_seed(0)
    swin = transformers.SwinModel(
        transformers.SwinConfig(
            image_size=16, patch_size=2, num_channels=1, embed_dim=8, depths=[2, 2],
            num_heads=[2, 2], window_size=2,
        )
    )  # fmt: skip
    convnext = transformers.ConvNextModel(
        transformers.ConvNextConfig(
            num_channels=1, patch_size=2, hidden_sizes=[8, 12], depths=[1, 2], image_size=16,
            num_stages=2, layer_scale_init_value=0.5,
        )
    )  # fmt: skip
    folders = {name: tmp_path_factory.mktemp(name) for name in ("swin", "convnext")}
    swin.save_pretrained(folders["swin"])
    convnext.save_pretrained(folders["convnext"])
    return {
        "vit": f"dir:{vit_directory}",
        "resnet": f"dir:{resnet_directory}",
        "glyphs": "embedded:glyphs",
        "swin": f"dir:{folders['swin']}",
        "convnext": f"dir:{folders['convnext']}",
    }


def change(model: AdaptedBackbone, seed: int = 1) -> None:
    """An adapter as it is after training: not the start, where LoRA does nothing at all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapter.values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def gap(prefix: Prefix, inputs: torch.Tensor) -> float:
    """How far the parts are from the whole, relative to the features, for a later adapter."""
    model = prefix.model
    with torch.no_grad():
        cached = prefix.compute(inputs)
        before = model(inputs)
        change(model)
        whole, parts = model(inputs), prefix(*cached)
    scale = float(whole.abs().max())
    assert float((whole - before).abs().max()) > 1e-4 * scale, "the adapter does nothing"
    assert whole.shape == parts.shape
    return float((whole - parts).abs().max()) / scale


@pytest.mark.parametrize(("name", "method", "layers"), CASES)
@pytest.mark.parametrize("records", [1, 2, 5])
def test_cached_equals_uncached(
    sources: dict[str, str], name: str, method: str, layers: str | list[str], records: int
) -> None:
    changes: dict[str, object] = {
        "backbone.source": sources[name], "adapter.method": method, "adapter.layers": layers
    }  # fmt: skip
    if name == "convnext" and method != "film":  # PEFT refuses rank 8 on depthwise convolutions
        changes["adapter.targets"] = ["pwconv1", "pwconv2"]
    prefix = Prefix(adapted_backbone(Plan().replace(changes)))
    assert prefix.reason is None
    assert prefix.door == prefix.model.adapted_blocks[0]
    (inputs,) = prefix.model.backbone.example(records, torch.Generator().manual_seed(4))
    assert all(len(tensor) == records for tensor in prefix.compute(inputs))
    assert gap(prefix, inputs) < 1e-5


@pytest.mark.parametrize("name", list(LAYERS))
def test_what_is_cached_holds_no_adapter(sources: dict[str, str], name: str) -> None:
    """The cache outlives rounds, so it must not depend on what a round changes."""
    plan = Plan().replace(
        {
            "backbone.source": sources[name],
            "adapter.method": "film",
            "adapter.layers": "last:1",
        }
    )
    prefix = Prefix(adapted_backbone(plan))
    (inputs,) = prefix.model.backbone.example(3, torch.Generator().manual_seed(4))
    first = prefix.compute(inputs)
    change(prefix.model)
    for before, after in zip(first, prefix.compute(inputs), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", list(LAYERS))
def test_early_blocks_are_not_run_again(sources: dict[str, str], name: str) -> None:
    plan = Plan().replace(
        {"backbone.source": sources[name], "adapter.method": "film", "adapter.layers": "last:1"}
    )
    prefix = Prefix(adapted_backbone(plan))
    (inputs,) = prefix.model.backbone.example(2, torch.Generator().manual_seed(4))
    cached = prefix.compute(inputs)
    early = prefix._root().get_submodule(prefix.model.blocks[0])
    runs: list[nn.Module] = []
    for module in early.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, _, __: runs.append(m))
    prefix(*cached)
    assert runs == []
    prefix.model(inputs)
    assert runs


def test_a_head_only_plan_caches_features(vit_directory: Path) -> None:
    plan = Plan().replace(
        {
            "backbone.source": f"dir:{vit_directory}",
            "adapter.method": "none",
            "head.training": "private",
        }
    )
    prefix = Prefix(adapted_backbone(plan))
    (inputs,) = prefix.model.backbone.example(3, torch.Generator().manual_seed(4))
    (features,) = prefix.compute(inputs)
    assert prefix.door == "features"
    assert features.shape == (3, prefix.model.feature_dim)
    assert torch.equal(prefix(features), features)
    assert torch.equal(prefix(features), prefix.model(inputs))


@pytest.mark.parametrize("method", ["ffa-lora", "lora", "film", "none"])
def test_nothing_is_registered_twice(sources: dict[str, str], method: str) -> None:
    for source in sources.values():
        changes = {
            "backbone.source": source, "adapter.method": method, "head.training": "private"
        }  # fmt: skip
        if "convnext" in source and "lora" in method:
            continue
        adapted = adapted_backbone(Plan().replace(changes))
        model = SiteModel(Prefix(adapted), LinearHead(adapted.feature_dim, 2), torch.device("cpu"))
        everything = list(model.named_parameters(remove_duplicate=False))
        assert len(everything) == len({id(p) for _, p in everything})


class Toy(nn.Module):
    """A stem and three blocks; how they are wired is up to the test."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.stem = nn.Linear(8, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.wired(pixel_values[:, 0]))

    def wired(self, rows: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = torch.tanh(self.stem(rows))
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        return hidden


class Skip(Toy):
    """The stem's output flows past every block."""

    def wired(self, rows: torch.Tensor) -> torch.Tensor:
        early = torch.tanh(self.stem(rows))
        hidden = early
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        return hidden + early


class Backwards(Toy):
    """The blocks run from last to first."""

    def wired(self, rows: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = torch.tanh(self.stem(rows))
        for block in reversed(self.blocks):
            hidden = torch.tanh(block(hidden))
        return hidden


class Reused(Toy):
    """A module from before the door runs again behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()

    def wired(self, rows: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.act(self.stem(rows))
        for block in self.blocks:
            hidden = self.act(block(hidden))
        return hidden


class Twice(Toy):
    """The adapted block runs twice."""

    def wired(self, rows: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = super().wired(rows)
        return torch.tanh(self.blocks[2](hidden))


class Gated(nn.Module):
    """A block that is also given a constant with as many rows as the traced example has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, hidden: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(hidden) * gate.sum(dim=0)
        return out


class Constant(Toy):
    """Each block gets a bias of shape (2, 6): two heads, not two records."""

    bias: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Gated() for _ in range(3))
        self.register_buffer("bias", torch.randn(2, 6))

    def wired(self, rows: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = torch.tanh(self.stem(rows))
        for block in self.blocks:
            hidden = torch.tanh(block(hidden, self.bias * 1.0))
        return hidden


def read(model: nn.Module, named: dict[str, torch.Tensor]) -> Any:
    return model(**named)


def toy(model: Toy, layers: str = "last:1") -> Prefix:
    model.requires_grad_(False).eval()
    constants = ImagePreparation(channels=1, size=8, mean=(0.0,), std=(1.0,))
    manifest = Manifest(name="toy")
    blocks = ("blocks.0", "blocks.1", "blocks.2")
    backbone = Backbone(model, manifest, "", "mean", blocks, Path("toy"), constants, read)
    return Prefix(AdaptedBackbone(backbone, Adapter(method="lora", rank=2, layers=layers), 0))


TOY_INPUTS = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("layers", ["all", "last:1", "last:2"])
def test_a_plain_model_is_cut(layers: str) -> None:
    prefix = toy(Toy(), layers)
    assert prefix.reason is None
    assert prefix.compute(TOY_INPUTS)[0].shape == (5, 8, 6)
    assert gap(prefix, TOY_INPUTS) < 1e-5


@pytest.mark.parametrize("kind", [Skip, Reused, Twice])
def test_what_flows_past_the_door_is_found(kind: type[Toy]) -> None:
    prefix = toy(kind())
    assert prefix.reason is not None
    assert "cannot be cut before blocks.2" in prefix.reason
    (kept,) = prefix.compute(TOY_INPUTS)
    assert torch.equal(kept, TOY_INPUTS)
    assert gap(prefix, TOY_INPUTS) < 1e-5


def test_blocks_that_run_in_another_order_give_right_results() -> None:
    """At the start LoRA does nothing, so an adapter caught in the cache does not show then."""
    prefix = toy(Backwards(), "all")
    assert gap(prefix, TOY_INPUTS) < 1e-5


def test_a_constant_with_as_many_rows_as_the_example_is_not_a_record() -> None:
    prefix = toy(Constant())
    assert all(len(tensor) == 5 for tensor in prefix.compute(TOY_INPUTS))
    assert gap(prefix, TOY_INPUTS) < 1e-5
    whole = prefix.model(TOY_INPUTS)
    some = torch.tensor([4, 2])
    with torch.no_grad():
        part = prefix(*(tensor[some] for tensor in prefix.compute(TOY_INPUTS)))
    assert torch.allclose(part, whole[some], atol=1e-6)


def test_gradients_flow_through_the_cut() -> None:
    prefix = toy(Toy())
    change(prefix.model)
    parameters = list(prefix.model.adapter.values())
    whole = torch.autograd.grad(prefix.model(TOY_INPUTS).square().sum(), parameters)
    cached = prefix.compute(TOY_INPUTS)
    parts = torch.autograd.grad(prefix(*cached).square().sum(), parameters)
    assert not any(tensor.requires_grad for tensor in cached)
    for expected, found in zip(whole, parts, strict=True):
        assert torch.allclose(expected, found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["BERT", "XLNet", "T5 encoder", "GPT-2", "wav2vec2", "PatchTST"])
def test_models_of_other_modalities_are_cut(tmp_path: Path, name: str) -> None:
    """XLNet runs sequence first, T5 has one dropout at both ends, a text's mask is needed later."""
    (family,) = (family for family in FAMILIES if family.name == name)
    backbone = load_backbone(family.make(tmp_path))
    adapter = Adapter(method="lora", rank=2, layers="last:1")
    prefix = Prefix(AdaptedBackbone(backbone, adapter, 0))
    assert prefix.reason is None
    inputs = backbone.example(5, torch.Generator().manual_seed(4))
    with torch.no_grad():
        cached = prefix.compute(*inputs)
        assert all(len(tensor) == 5 for tensor in cached)
        change(prefix.model)
        whole = prefix.model(*inputs)
        some = torch.tensor([4, 0, 2])
        parts = prefix(*(tensor[some] for tensor in cached))
    torch.testing.assert_close(parts, whole[some], rtol=1e-4, atol=1e-5)


def test_a_prompt_leaves_nothing_to_cache(tmp_path: Path) -> None:
    (family,) = (family for family in FAMILIES if family.name == "GPT-2")
    backbone = load_backbone(family.make(tmp_path))
    prefix = Prefix(AdaptedBackbone(backbone, Adapter(method="prompt", tokens=2), 0))
    assert prefix.reason == "the adapter stands before the first block"
    inputs = backbone.example(2, torch.Generator().manual_seed(4))
    assert all(
        torch.equal(kept, given)
        for kept, given in zip(prefix.compute(*inputs), inputs, strict=True)
    )
