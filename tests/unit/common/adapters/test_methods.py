"""Every adapter method on a family that it suits: what it trains, that it acts and is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from fedgraft_common.adapted import AdaptedBackbone, quiet_peft
from fedgraft_common.backbone import Backbone, Manifest, load_backbone
from fedgraft_common.errors import AdapterError
from fedgraft_common.plan import Adapter
from fedgraft_common.plan import Backbone as Config
from fedgraft_common.preparations import TablePreparation
from fedgraft_common.sources.source import Output
from fedgraft_simulations.families import FAMILIES

MAKE: dict[str, Callable[[Path], Config]] = {family.name: family.make for family in FAMILIES}
CASES = [
    ("dora", "BERT", "lora_magnitude_vector"),
    ("dora", "ResNet (transformers)", "lora_magnitude_vector"),
    ("ia3", "GPT-2", "ia3_l"),
    ("ia3", "ResNet (timm)", "ia3_l"),
    ("ln-tuning", "LLaMA", "ln_tuning_layers"),
    ("film", "EfficientNet (timm)", "ln_tuning_layers"),
    ("lora", "GPT-2", "lora_A"),
    ("prompt", "DistilBERT", "prompt_encoder"),
    ("prefix", "LLaMA", "prompt_encoder"),
    ("full", "BERT", "modules_to_save"),
    ("full", "ConvNeXt (timm)", "modules_to_save"),
]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    return {name: MAKE[name](tmp_path_factory.mktemp("model")) for name in {c[1] for c in CASES}}


def build(config: Config, method: str, seed: int = 0) -> AdaptedBackbone:
    adapter = Adapter(method=method, rank=2, tokens=3, layers="last:1")
    return AdaptedBackbone(load_backbone(config), adapter, seed)


def changed(model: AdaptedBackbone) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: value + 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in model.state().items()
    }


@pytest.mark.parametrize(("method", "family", "part"), CASES)
def test_a_method(
    configs: dict[str, Config], tmp_path: Path, method: str, family: str, part: str
) -> None:
    torch.manual_seed(1)
    model = build(configs[family], method)
    torch.manual_seed(2)
    other = build(configs[family], method)
    assert any(part in name for name in model.adapter)
    for name, value in model.state().items():  # the start is a function of the plan alone
        assert torch.equal(value, other.state()[name]), name
    inputs = model.backbone.example(2, torch.Generator().manual_seed(5))
    with torch.no_grad():
        before = model(*inputs)
        if method not in ("prompt", "prefix"):
            plain = load_backbone(configs[family])
            torch.testing.assert_close(
                before, plain.features(plain.model, inputs), rtol=1e-4, atol=1e-4
            )
        model.load(changed(model))
        after = model(*inputs)
        assert float((after - before).abs().max()) > 1e-4
        model.save(tmp_path)
        fresh = load_backbone(configs[family])
        with quiet_peft():
            loaded = PeftModel.from_pretrained(fresh.model, str(tmp_path)).eval()
        torch.testing.assert_close(fresh.features(loaded, inputs), after, rtol=1e-4, atol=1e-5)
    found = other.read(tmp_path)
    assert found.keys() == model.state().keys()
    assert all(torch.equal(value, found[name]) for name, value in model.state().items())


def test_feature_extraction_is_none(configs: dict[str, Config]) -> None:
    assert Adapter(method="feature-extraction") == Adapter(method="none")
    assert build(configs["BERT"], "feature-extraction").schema == ()


def test_full_trains_every_weight_of_the_blocks_and_nothing_else(
    configs: dict[str, Config],
) -> None:
    plain = load_backbone(configs["BERT"])
    model = build(configs["BERT"], "full")
    (block,) = model.adapted_blocks
    inside = dict(plain.model.get_submodule(block).named_parameters())
    assert sorted(name.split("modules_to_save.")[1] for name in model.adapter) == sorted(inside)


def test_statistics_stay_public(configs: dict[str, Config]) -> None:
    """A BatchNorm inside a fully trained block must not follow the private batch."""
    model = build(configs["ResNet (timm)"], "full")
    before = {name: b.clone() for name, b in model.named_buffers() if "running" in name}
    inputs = model.backbone.example(3, torch.Generator().manual_seed(0))
    together = model(*inputs)
    assert before
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers() if n in before)
    alone = torch.cat([model(inputs[0][i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["full", "prompt"])
def test_single_modules_cannot_be_named(configs: dict[str, Config], method: str) -> None:
    adapter = Adapter(method=method, targets=("query",), layers="last:1")
    with pytest.raises(AdapterError, match="not attached to single modules"):
        AdaptedBackbone(load_backbone(configs["BERT"]), adapter, 0)


def test_a_prompt_for_a_model_without_tokens(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="a method that"):
        build(MAKE["ResNet (timm)"](tmp_path), "prompt")


def test_a_prefix_that_the_model_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot run with it"):
        build(MAKE["T5 encoder"](tmp_path), "prefix")


def test_attention_that_never_calls_its_output_layer_is_left_alone(tmp_path: Path) -> None:
    """torch's own attention takes the weight of that layer; an adapter on it would do nothing."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)
            self.linear = nn.Linear(4, 4)

    from fedgraft_common.adapters import find_method

    for method in ("lora", "ffa-lora", "ia3", "dora"):
        suits = find_method(method).suits
        assert [n for n, m in Layer().named_modules() if suits(m)] == ["linear"]


def test_a_convolution_with_gaps_is_no_place_for_lora(tmp_path: Path) -> None:
    """PEFT's own convolution beside it would have none, and another size."""
    config = MAKE["DeepLab v3 (torchvision)"](tmp_path)
    adapter = Adapter(method="lora", rank=2, layers="last:1")
    model = AdaptedBackbone(load_backbone(config), adapter, 0, "map")
    names = {
        name.partition(".lora_")[0].removeprefix("base_model.model.") for name in model.adapter
    }
    found = [model.backbone.model.get_submodule(f"{name}.base_layer") for name in sorted(names)]
    assert found
    assert all(isinstance(m, nn.Conv2d) and m.dilation == (1, 1) for m in found)


class Breaks(nn.Module):
    """Runs alone, and not with another layer in place of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, values: torch.Tensor) -> Output:
        if type(self.blocks[0]) is not nn.Linear:
            raise RuntimeError("an unknown layer\nand more")
        return Output(self.blocks[0](values)[:, None])


def test_a_network_that_does_not_run_with_the_adapter() -> None:
    backbone = Backbone(
        Breaks().requires_grad_(False), Manifest(name="breaks"), "", None, ("blocks.0",), Path(),
        TablePreparation(columns=4), lambda model, named: model(**named),
    )  # fmt: skip
    AdaptedBackbone(backbone, Adapter(method="none"), 0)
    with pytest.raises(AdapterError, match=r"every chosen block; an unknown layer\. Choose"):
        AdaptedBackbone(backbone, Adapter(method="lora", rank=2), 0)


class Twin(nn.Module):
    """Two lists of blocks; the name of one ends like that of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.other = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)])})


@pytest.mark.parametrize("method", ["lora", "full"])
def test_names_that_end_alike(method: str) -> None:
    """PEFT matches the end of a name; what it would train besides must be noticed."""
    table = TablePreparation(columns=4)
    backbone = Backbone(
        Twin().requires_grad_(False), Manifest(name="twin"), "", None, ("blocks.0",), Path(), table,
        lambda _, named: named,
    )  # fmt: skip
    with pytest.raises(AdapterError, match=r"found 'other\.blocks\.0.*two names end alike"):
        AdaptedBackbone(backbone, Adapter(method=method, rank=2), 0)
