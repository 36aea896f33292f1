"""Every engine against the definition, and models that fool Opacus' hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from fedgraft_client.gradients import (
    ENGINES,
    Engine,
    Hooks,
    Loop,
    Vmap,
    choose_engine,
    trained,
)
from fedgraft_client.head import initial_head
from fedgraft_client.prefix import Cached, Prefix
from fedgraft_client.runtime import SiteModel
from fedgraft_common.adapted import AdaptedBackbone, adapted_backbone
from fedgraft_common.errors import GradientError
from fedgraft_common.plan import Plan

CLASSES = ("a", "b", "c")
LABELS = torch.tensor([0, 1, 2, 0])
TRAINABLE = [
    (method, head)
    for method in ("ffa-lora", "lora", "film", "none")
    for head in ("private", "fixed")
    if (method, head) != ("none", "fixed")  # nothing to train
]


@pytest.fixture(scope="module", params=["vit", "resnet", "glyphs"])
def source(request: pytest.FixtureRequest) -> str:
    """`backbone.source` of each shipped kind of model."""
    if request.param == "glyphs":
        return "embedded:glyphs"
    return f"dir:{request.getfixturevalue(f'{request.param}_directory')}"


def site_model(plan: Plan) -> tuple[SiteModel, Cached]:
    """A plan's model and what its prefix keeps of four synthetic records."""
    adapted = adapted_backbone(plan)
    head = initial_head(plan, CLASSES, adapted.feature_dim)
    model = SiteModel(Prefix(adapted), head, torch.device("cpu"))
    example = adapted.backbone.example(len(LABELS), torch.Generator().manual_seed(5))
    return model, model.prefix.compute(*example)


def randomise(model: nn.Module, seed: int = 7) -> None:
    """Away from the start, where most gradients vanish."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def by_hand(model: nn.Module, cached: Cached, labels: torch.Tensor) -> torch.Tensor:
    """(N, values): plain autograd, one record after the other, none of Fedgraft's engines."""
    rows = []
    for i, label in enumerate(labels):
        logits = model(*(tensor[i : i + 1] for tensor in cached))
        loss = functional.cross_entropy(logits, label[None])
        gradients = torch.autograd.grad(loss, list(trained(model).values()), allow_unused=True)
        values = zip(trained(model).values(), gradients, strict=True)
        rows.append(torch.cat([(p * 0 if g is None else g).flatten() for p, g in values]))
    return torch.stack(rows).detach()


def measured(
    engine: Engine, model: nn.Module, cached: Cached, labels: torch.Tensor
) -> torch.Tensor:
    engine(cached, labels)
    samples: list[Any] = [p.grad_sample for p in trained(model).values()]  # type: ignore[attr-defined]
    return torch.cat([sample.reshape(len(labels), -1) for sample in samples], dim=1)


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest error of a record, relative to its gradient."""
    assert float(truth.norm(dim=1).min()) > 1e-4, "a check on vanishing gradients shows nothing"
    return float(((found - truth).norm(dim=1) / truth.norm(dim=1)).max())


def hook_count(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks)
        for m in model.modules()
    )


@pytest.mark.parametrize(("method", "head"), TRAINABLE)
def test_engines_agree_with_single_records(source: str, method: str, head: str) -> None:
    plan = Plan().replace(
        {"backbone.source": source, "adapter.method": method, "head.training": head}
    )
    model, cached = site_model(plan)
    randomise(model)
    truth = by_hand(model, cached, LABELS)
    silent = method == "film" and "vit" not in source  # frozen BatchNorm: no hook fires
    exact: dict[str, float] = {}
    for make in (Hooks, Vmap, Loop):
        try:
            engine: Engine = make(model)
        except NotImplementedError:  # Opacus refuses layers with statistics
            assert silent
            assert make is Hooks
            continue
        exact[engine.name] = error(measured(engine, model, cached, LABELS), truth)
        engine.close()
    assert set(exact) == ({"vmap", "loop"} if silent else {"hooks", "vmap", "loop"})
    assert max(exact.values()) < 1e-5, exact


@pytest.mark.parametrize(("method", "head"), TRAINABLE)
def test_the_chosen_engine_is_the_first_exact_one(source: str, method: str, head: str) -> None:
    plan = Plan().replace(
        {"backbone.source": source, "adapter.method": method, "head.training": head}
    )
    model, cached = site_model(plan)
    hooks, modes = hook_count(model), [m.training for m in model.modules()]
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine, verdicts = choose_engine(model, cached, LABELS)
    expected = "vmap" if method == "film" and "vit" not in source else "hooks"
    assert engine.name == expected
    assert verdicts[-1].engine == expected
    assert verdicts[-1].exact
    assert not any(v.exact for v in verdicts[:-1])
    for name, parameter in model.named_parameters():  # the check leaves no trace
        assert torch.equal(parameter, own[name]), name
        assert parameter.grad is None, name
    assert [m.training for m in model.modules()] == modes
    engine.close()
    assert hook_count(model) == hooks


class SequenceFirst(nn.Module):
    """A layer that sees (time, batch, width): what Opacus takes for the batch is time."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, len(CLASSES))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.mix(inputs.transpose(0, 1))).cumsum(0).transpose(0, 1)
        logits: torch.Tensor = self.head(hidden[:, -1])
        return logits


@pytest.mark.parametrize("steps", [2, 3, 5])  # 3 is the number of records: shapes then agree
def test_a_batch_in_the_second_dimension_is_caught(steps: int) -> None:
    torch.manual_seed(1)
    model = SequenceFirst()
    inputs = torch.randn(3, steps, 4)
    engine, verdicts = choose_engine(model, (inputs,), LABELS[:3])
    assert verdicts[0].engine == "hooks"
    assert verdicts[0].error > 0.1
    assert engine.name in ("vmap", "loop")
    labels = torch.tensor([2, 0, 1])
    truth = by_hand(model, (inputs,), labels)
    assert error(measured(engine, model, (inputs,), labels), truth) < 1e-5


class XLNet(nn.Module):
    """XLNet with LoRA in its feed-forward layers, which run sequence first."""

    def __init__(self) -> None:
        from peft import LoraConfig, get_peft_model

        super().__init__()
        config = transformers.XLNetConfig(
            vocab_size=11, d_model=16, n_layer=2, n_head=2, d_inner=24, dropout=0.0
        )
        base = transformers.XLNetModel(config).eval().requires_grad_(False)
        targets = ["layer_1", "layer_2"]
        self.model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=targets))
        self.head = nn.Linear(16, len(CLASSES))
        for module in self.modules():
            own = module.parameters(recurse=False)
            module.training = any(p.requires_grad for p in own)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.model(inputs_embeds=tokens).last_hidden_state
        logits: torch.Tensor = self.head(hidden.mean(dim=1))
        return logits


def test_xlnet_is_caught() -> None:
    torch.manual_seed(2)
    model = XLNet()
    inputs = torch.randn(3, 3, 16)
    engine, verdicts = choose_engine(model, (inputs,), LABELS[:3])
    assert verdicts[0].engine == "hooks"
    assert not verdicts[0].exact
    assert engine.name in ("vmap", "loop")
    randomise(model)
    labels = torch.tensor([0, 2, 1])
    truth = by_hand(model, (inputs,), labels)
    assert error(measured(engine, model, (inputs,), labels), truth) < 1e-5


def test_swin_windows_folded_into_the_batch_are_caught(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, num_channels=1, embed_dim=8, depths=[2, 2],
        num_heads=[2, 2], window_size=2,
    )  # fmt: skip
    transformers.SwinModel(config).save_pretrained(tmp_path)
    plan = Plan().replace(
        {
            "backbone.source": f"dir:{tmp_path}",
            "adapter.method": "lora",
            "adapter.targets": ["q_proj", "k_proj", "v_proj"],
            "head.training": "private",
        }
    )
    model, cached = site_model(plan)
    assert all("attention" in name for name in trained(model) if not name.startswith("head"))
    engine, verdicts = choose_engine(model, cached, LABELS)
    assert verdicts[0].engine == "hooks"
    assert not verdicts[0].exact
    assert engine.name in ("vmap", "loop")
    randomise(model)
    truth = by_hand(model, cached, LABELS)
    assert error(measured(engine, model, cached, LABELS), truth) < 1e-5


class Forgetful(nn.Module):
    """Dropout that eval mode does not turn off."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, len(CLASSES))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(functional.dropout(inputs, 0.5, training=True))
        return logits


def test_a_model_that_is_not_deterministic_is_refused() -> None:
    torch.manual_seed(4)
    model = Forgetful()
    own = model.head.weight.detach().clone()
    with pytest.raises(GradientError) as refusal:
        choose_engine(model, (torch.randn(3, 16),), LABELS[:3])
    text = str(refusal.value)
    for part in ("per-example gradients", "hooks", "vmap", "loop", "cannot be trained under DP"):
        assert part in text
    assert torch.equal(model.head.weight, own)
    assert hook_count(model) == 0


class Coupled(nn.Module):
    """Records that see each other: no per-example gradient exists, so none may be clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, len(CLASSES))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(inputs - inputs.mean(dim=0, keepdim=True) / 2)
        return logits


def test_records_that_see_each_other_are_computed_one_by_one() -> None:
    torch.manual_seed(5)
    engine, verdicts = choose_engine(Coupled(), (torch.randn(3, 4),), LABELS[:3])
    assert not verdicts[0].exact
    assert engine.name in ("vmap", "loop")


def test_hooks_recover_from_a_step_that_failed(
    vit_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in a forward pass, say: the next step must not be silently wrong."""
    plan = Plan().replace({"backbone.source": f"dir:{vit_directory}", "head.training": "private"})
    model, cached = site_model(plan)
    randomise(model)
    truth = by_hand(model, cached, LABELS)
    engine = Hooks(model)

    def out_of_memory(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(functional, "cross_entropy", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine(cached, LABELS)
    assert error(measured(engine, model, cached, LABELS), truth) < 1e-5
    engine.close()


def test_a_batch_of_another_size_each_time(vit_directory: Path) -> None:
    """Nothing of one batch may be left in the next: Poisson batches vary."""
    plan = Plan().replace({"backbone.source": f"dir:{vit_directory}", "head.training": "private"})
    model, cached = site_model(plan)
    randomise(model)
    truth = by_hand(model, cached, LABELS)
    engine = Hooks(model)
    for rows in (slice(0, 4), slice(1, 2), slice(0, 3), slice(2, 4)):
        part = tuple(tensor[rows] for tensor in cached)
        assert error(measured(engine, model, part, LABELS[rows]), truth[rows]) < 1e-5
    engine.close()


def test_engines_are_tried_from_fast_to_slow() -> None:
    assert [getattr(make, "name", "") for make in ENGINES] == ["hooks", "vmap", "loop"]


def test_only_adapter_and_head_are_trained(source: str) -> None:
    model, _ = site_model(Plan().replace({"backbone.source": source, "head.training": "private"}))
    adapted: AdaptedBackbone = model.prefix.model
    expected = {id(p) for p in [*adapted.adapter.values(), *model.head.parameters()]}
    assert {id(p) for p in trained(model).values()} == expected


def test_hooks_that_cannot_be_attached_leave_nothing_behind(resnet_directory: Path) -> None:
    """Opacus refuses a BatchNorm after it has attached itself to the layers before it."""
    changes = {
        "backbone.source": f"dir:{resnet_directory}",
        "adapter.method": "full",
        "adapter.layers": "last:1",
        "head.training": "private",
    }
    model, cached = site_model(Plan().replace(changes))
    engine, verdicts = choose_engine(model, cached, LABELS)
    assert verdicts[0].note == "(NotImplementedError)"
    assert engine.name == "vmap"
    assert hook_count(model) == 1  # the prefix' own
    randomise(model)
    truth = by_hand(model, cached, LABELS)
    assert error(measured(engine, model, cached, LABELS), truth) < 1e-5
