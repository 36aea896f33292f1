"""A round's steps against plain torch, which knows nothing of engines, prefixes and clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fedgraft_client.head import LinearHead, initial_head
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.runtime import Runtime, Workbench
from fedgraft_client.training import train_round
from fedgraft_common.adapted import AdaptedBackbone, adapted_backbone
from fedgraft_common.errors import PrivacyError
from fedgraft_common.mechanism import StepNoise
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan

CLASSES = ("a", "b", "c")
IMAGES = torch.rand(7, 1, 16, 16, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 2])
EXACT = StepNoise(1.0, math.inf, 0.0, 0.0, None)


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime("cpu")


@pytest.fixture(scope="module", params=["vit", "resnet"])
def base(request: pytest.FixtureRequest) -> Plan:
    return Plan().replace(
        {
            "backbone.source": f"dir:{request.getfixturevalue(f'{request.param}_directory')}",
            "backbone.frozen_dtype": "float32",
            "adapter.method": "film" if request.param == "resnet" else "lora",
            "adapter.layers": "last:2",
            "head.training": "private",
            "training.expected_batch": 5.0,
            "training.local_steps": 3,
            "training.learning_rate": 0.1,
            "training.head_learning_rate": 0.4,
            "rounds.count": 5,
        }
    )


def start(bench: Workbench, seed: int = 0) -> Tensors:
    """An adapter in the middle of a run."""
    generator = torch.Generator().manual_seed(seed)
    noise = {n: torch.randn(t.shape, generator=generator) for n, t in bench.initial.items()}
    return {name: tensor + 0.1 * noise[name] for name, tensor in bench.initial.items()}


def one_round(
    bench: Workbench,
    plan: Plan,
    adapter: Tensors,
    head: LinearHead,
    step: StepNoise = EXACT,
    number: int = 1,
    noise: NoiseSource | None = None,
    units: torch.Tensor | None = None,
    physical_batch: int = 4,
) -> Tensors:
    return train_round(
        bench=bench,
        plan=plan,
        number=number,
        adapter=adapter,
        head=head,
        cached=bench.cache(IMAGES),
        labels=LABELS,
        step=step,
        noise=noise or NoiseSource.for_simulation("test_training"),
        physical_batch=physical_batch,
        units=units,
    )


class Oracle:
    """The whole model, one unit at a time, clipped by hand, stepped by hand."""

    def __init__(
        self,
        plan: Plan,
        adapter: Tensors,
        head: LinearHead,
        units: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.plan = plan
        self.units = [list(unit) for unit in units or [[i] for i in range(len(LABELS))]]
        self.model: AdaptedBackbone = adapted_backbone(plan)
        self.model.load(adapter)
        self.head = LinearHead(head.linear.in_features, head.linear.out_features)
        self.head.load_state_dict(head.state_dict())
        (self.inputs,) = self.model.backbone.prepare(IMAGES)
        fixed = plan.head.training == "fixed"
        self.adapter_parameters = list(self.model.adapter.values())
        self.head_parameters = [] if fixed else list(self.head.parameters())

    def gradient_sum(self, clipping_norm: float) -> list[torch.Tensor]:
        parameters = [*self.adapter_parameters, *self.head_parameters]
        total = [torch.zeros_like(p) for p in parameters]
        for mine in self.units:
            logits = self.head(self.model(self.inputs[mine]))
            loss = functional.cross_entropy(logits, LABELS[mine])  # the mean over the unit
            gradient = torch.autograd.grad(loss, parameters)
            norm = torch.cat([g.flatten() for g in gradient]).norm()
            factor = min(1.0, clipping_norm / float(norm))
            total = [t + factor * g for t, g in zip(total, gradient, strict=True)]
        return total

    def step(self, number: int, clipping_norm: float, adapter: bool = True) -> list[torch.Tensor]:
        total = self.gradient_sum(clipping_norm)
        training = self.plan.training
        scale = self.plan.step_scale(number) / training.expected_batch
        split = len(self.adapter_parameters)
        with torch.no_grad():
            for parameter, gradient in zip(self.adapter_parameters, total[:split], strict=True):
                if adapter:
                    parameter.sub_(training.learning_rate * scale * gradient)
            for parameter, gradient in zip(self.head_parameters, total[split:], strict=True):
                parameter.sub_(training.head_learning_rate * scale * gradient)
        return total[:split]


def close(found: Tensors, expected: Tensors) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=2e-6), name


@pytest.mark.parametrize("head_training", ["private", "fixed"])
@pytest.mark.parametrize("clipping_norm", [math.inf, 0.02])
def test_noise_free_rounds_are_plain_sgd(
    runtime: Runtime, base: Plan, head_training: str, clipping_norm: float
) -> None:
    """Two rounds: whatever stacks up from one to the next would show in the second."""
    plan = base.replace({"head.training": head_training})
    bench = runtime.workbench(plan)
    head = initial_head(plan, CLASSES, bench.adapted.feature_dim)
    frozen = head.linear.weight.detach().clone()
    adapter = start(bench)
    oracle = Oracle(plan, adapter, head)
    hooks = []
    for number in (1, 2):
        step = StepNoise(1.0, clipping_norm, 0.0, 0.0, None)
        adapter = one_round(bench, plan, adapter, head, step, number)
        for _ in range(3):
            oracle.step(number, clipping_norm)
        close(adapter, oracle.model.state())
        close(dict(head.state_dict()), dict(oracle.head.state_dict()))
        model, _ = bench.trainer(head)
        hooks.append(sum(len(m._forward_hooks) for m in model.modules()))
    assert hooks[0] == hooks[1]
    moved = not torch.equal(head.linear.weight, frozen)
    assert moved is (head_training == "private")


@pytest.mark.parametrize("clipping_norm", [math.inf, 0.02])
def test_distributed_returns_gradient_sums_and_steps_only_the_head(
    runtime: Runtime, base: Plan, clipping_norm: float
) -> None:
    plan = base.replace(
        {
            "privacy.mechanism": "distributed",
            "training.local_steps": 1,
            "training.sample_rate": 1.0,
        }
    )
    bench = runtime.workbench(plan)
    head = initial_head(plan, CLASSES, bench.adapted.feature_dim)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(1))
    adapter = start(bench)
    oracle = Oracle(plan, adapter, head)
    found = one_round(bench, plan, adapter, head, StepNoise(1.0, clipping_norm, 0.0, 0.0, None))
    total = oracle.step(1, clipping_norm, adapter=False)
    close(found, dict(zip(oracle.model.adapter, total, strict=True)))
    close(bench.adapted.state(), adapter)
    close(dict(head.state_dict()), dict(oracle.head.state_dict()))


def test_the_denominator_is_the_plans_and_not_the_batchs(runtime: Runtime, base: Plan) -> None:
    changes = []
    for expected_batch in (5.0, 50.0):
        plan = base.replace({"training.expected_batch": expected_batch, "training.local_steps": 1})
        bench = runtime.workbench(plan)
        adapter = start(bench)
        head = initial_head(plan, CLASSES, bench.adapted.feature_dim)
        torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(1))
        after = one_round(bench, plan, adapter, head)
        changes.append(torch.cat([(after[n] - adapter[n]).flatten() for n in adapter]))
    assert float(changes[0].norm()) > 1e-3
    assert torch.allclose(changes[0], 10 * changes[1], rtol=1e-3, atol=1e-5)


class Counting(NoiseSource):
    """Remembers what was drawn."""

    def __init__(self) -> None:
        super().__init__(simulation_key=1)
        self.samples: list[tuple[int, float]] = []
        self.draws: list[tuple[int, float]] = []
        self.caps: list[int] = []

    def poisson_sample(self, size: int, rate: float) -> NDArray[np.int64]:
        self.samples.append((size, rate))
        return super().poisson_sample(size, rate)

    def choose(self, groups: NDArray[np.int64], most: int) -> NDArray[np.int64]:
        self.caps.append(most)
        return super().choose(groups, most)

    def gaussian(self, shape: Sequence[int], std: float) -> torch.Tensor:
        (size,) = shape
        self.draws.append((size, std))
        return super().gaussian((size,), std)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("rate", [1e-9, 0.5])
def test_every_step_samples_and_noises_even_an_empty_batch(
    runtime: Runtime, base: Plan, steps: int, rate: float
) -> None:
    plan = base.replace({"training.local_steps": steps})
    bench = runtime.workbench(plan)
    head = initial_head(plan, CLASSES, bench.adapted.feature_dim)
    noise, adapter = Counting(), start(bench)
    after = one_round(bench, plan, adapter, head, StepNoise(rate, 1.0, 0.5, 0.25, None), 1, noise)
    size = sum(t.numel() for t in adapter.values())
    head_size = sum(p.numel() for p in head.parameters())
    assert noise.samples == [(len(LABELS), rate)] * steps
    assert noise.draws == [(size, 0.5), (head_size, 0.25)] * steps
    if rate < 0.1:  # nothing but noise
        change = torch.cat([(after[n] - adapter[n]).flatten() for n in sorted(adapter)])
        std = 0.5 * math.sqrt(steps) * plan.training.learning_rate / 5.0
        assert float(change.std()) == pytest.approx(std, rel=0.15)


# --- units


UNITS = torch.tensor([1, 0, 2, 1, 0, 1, 1])
BY_PATIENT = {"privacy.unit": "patient_id"}


@pytest.mark.parametrize("physical_batch", [1, 4, 256])
@pytest.mark.parametrize("clipping_norm", [math.inf, 0.02])
def test_a_unit_is_one_average_gradient(
    runtime: Runtime, base: Plan, clipping_norm: float, physical_batch: int
) -> None:
    """From the prefix cache, with hooks (ViT) and vmap (ResNet), the unit split nowhere."""
    plan = base.replace(BY_PATIENT)
    bench = runtime.workbench(plan)
    head = initial_head(plan, CLASSES, bench.adapted.feature_dim)
    adapter = start(bench)
    oracle = Oracle(plan, adapter, head, [[1, 4], [0, 3, 5, 6], [2]])
    step = StepNoise(1.0, clipping_norm, 0.0, 0.0, None)
    found = one_round(bench, plan, adapter, head, step, units=UNITS, physical_batch=physical_batch)
    for _ in range(3):
        oracle.step(1, clipping_norm)
    close(found, oracle.model.state())
    close(dict(head.state_dict()), dict(oracle.head.state_dict()))


def test_units_are_sampled_and_capped(runtime: Runtime, base: Plan) -> None:
    """Three units, whatever the seven records; two of unit 1's four records at a time."""
    plan = base.replace(BY_PATIENT | {"privacy.records_per_unit": 2, "training.local_steps": 6})
    bench = runtime.workbench(plan)
    head = initial_head(plan, CLASSES, bench.adapted.feature_dim)
    noise = Counting()
    one_round(bench, plan, start(bench), head, StepNoise(0.7, 1.0, 1.0, 1.0, None), 1, noise, UNITS)
    assert noise.samples == [(3, 0.7)] * 6
    assert noise.caps == [2] * 6
    assert len(noise.draws) == 12


def test_units_of_one_record_train_like_records(runtime: Runtime, base: Plan) -> None:
    found = []
    for plan, units in ((base, None), (base.replace(BY_PATIENT), torch.arange(len(LABELS)))):
        bench = runtime.workbench(plan)
        head = initial_head(plan, CLASSES, bench.adapted.feature_dim)
        step = StepNoise(1.0, 0.1, 0.0, 0.0, None)
        found.append(one_round(bench, plan, start(bench), head, step, units=units))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_plan_that_protects_records_ignores_units(runtime: Runtime, base: Plan) -> None:
    bench = runtime.workbench(base)
    head = initial_head(base, CLASSES, bench.adapted.feature_dim)
    noise = Counting()
    one_round(bench, base, start(bench), head, noise=noise, units=UNITS)
    assert noise.samples == [(len(LABELS), 1.0)] * 3
    assert noise.caps == []


def test_a_plan_that_protects_a_column_needs_it(runtime: Runtime, base: Plan) -> None:
    plan = base.replace(BY_PATIENT)
    bench = runtime.workbench(plan)
    head = initial_head(plan, CLASSES, bench.adapted.feature_dim)
    noise = Counting()
    with pytest.raises(PrivacyError, match=r"privacy\.unit: found 'patient_id'; allowed: record"):
        one_round(bench, plan, start(bench), head, noise=noise)
    assert noise.samples == noise.draws == []


def test_gradients_are_not_left_behind(runtime: Runtime, base: Plan) -> None:
    bench = runtime.workbench(base)
    head = initial_head(base, CLASSES, bench.adapted.feature_dim)
    one_round(bench, base, start(bench), head)
    model, _ = bench.trainer(head)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, name
        for attribute in ("grad_sample", "summed_grad"):
            assert getattr(parameter, attribute, None) is None, name


def test_the_reply_is_a_copy(runtime: Runtime, base: Plan, vit_directory: Path) -> None:
    """A later round must not write into a reply that was stored."""
    bench = runtime.workbench(base)
    head = initial_head(base, CLASSES, bench.adapted.feature_dim)
    first = one_round(bench, base, start(bench), head)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    one_round(bench, base, start(bench, 1), head)
    assert all(torch.equal(first[name], kept[name]) for name in kept)
