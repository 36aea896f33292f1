"""What stays warm in a site's process: device, number format, workbenches, trainers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from fedgraft_client.gradients import trained
from fedgraft_client.head import LinearHead, initial_head
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.runtime import (
    CHUNK,
    KERNELS,
    Runtime,
    Workbench,
    bound_kernels,
    choose_device,
    frozen_dtype,
    lower_precision,
)
from fedgraft_client.training import train_round
from fedgraft_common.errors import PlanError
from fedgraft_common.mechanism import StepNoise
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan

IMAGES = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(6) % 2
CPU = torch.device("cpu")


@pytest.fixture
def plan(vit_directory: Path) -> Plan:
    return Plan().replace(
        {
            "backbone.source": f"dir:{vit_directory}",
            "backbone.frozen_dtype": "float32",
            "adapter.method": "lora",
            "adapter.layers": "last:2",
            "head.training": "private",
            "training.local_steps": 2,
        }
    )


SIZES = """
import torch
from fedgraft_client.runtime import Runtime
Runtime("cpu")
layer = torch.nn.Conv2d(3, 4, 3).requires_grad_(False)
for size in (*range(20, 220), 20):
    layer(torch.zeros(size, 3, 8, 8))
"""


def test_kernels_of_old_batch_sizes_are_forgotten() -> None:
    """In a new process: the first convolution fixes how many are kept."""
    rest = {name: value for name, value in os.environ.items() if name not in KERNELS}
    done = subprocess.run(
        [sys.executable, "-c", SIZES], env=rest | {"ONEDNN_VERBOSE": "2"},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    made = [x for x in done.stdout.splitlines() if ",mb20_" in x and "create:" in x]
    if not made:
        pytest.skip("PyTorch does not convolve with oneDNN on this processor")
    assert ["cache_miss" in line for line in made] == [True, True]


def test_an_operators_own_bounds_of_kernels_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = KERNELS
    monkeypatch.delenv(ours, raising=False)
    monkeypatch.setenv(theirs, "7")
    bound_kernels()
    assert (os.environ[ours], os.environ[theirs]) == (KERNELS[ours], "7")


def test_devices_by_name() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda", "cuda:99", "mps", "", "CPU"])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match=r"auto, cpu.* Choose a device of this machine"):
        choose_device(name)


def test_number_format_is_the_plans_or_the_hardwares(monkeypatch: pytest.MonkeyPatch) -> None:
    assert frozen_dtype("float32", CPU) is torch.float32
    assert frozen_dtype("bfloat16", CPU) is torch.bfloat16
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda fast=fast: fast)
        assert frozen_dtype("auto", CPU) is (torch.bfloat16 if fast else torch.float32)


def test_lower_precision_only_where_asked() -> None:
    a = torch.ones(2, 2)
    with lower_precision(torch.float32, "cpu"):
        assert (a @ a).dtype is torch.float32
    with lower_precision(torch.bfloat16, "cpu"):
        assert (a @ a).dtype is torch.bfloat16


def test_plans_that_differ_in_privacy_only_share_a_workbench(plan: Plan) -> None:
    runtime = Runtime("cpu")
    bench = runtime.workbench(plan)
    same = {"privacy.epsilon": 2.0, "privacy.mechanism": "none", "head.training": "fixed"}
    assert runtime.workbench(plan.replace(same)) is bench
    assert runtime.workbench(plan.replace({"rounds.count": 2, "name": "other"})) is bench
    for other in (
        {"seed": 1},
        {"adapter.rank": 4},
        {"adapter.layers": "last:1"},
        {"backbone.frozen_dtype": "bfloat16"},
        {"backbone.pooling": "mean"},
    ):
        assert runtime.workbench(plan.replace(other)) is not bench


def test_two_workbenches_of_a_plan_are_the_same_model(plan: Plan) -> None:
    """Server, sites and a later prediction each load the model for themselves."""
    first, second = Runtime("cpu").workbench(plan), Runtime("cpu").workbench(plan)
    assert set(first.initial) == set(second.initial)
    assert all(torch.equal(first.initial[n], second.initial[n]) for n in first.initial)
    cached = first.cache(IMAGES)
    assert all(torch.equal(a, b) for a, b in zip(cached, second.cache(IMAGES), strict=True))
    features = first.features(first.initial, cached)
    assert torch.equal(features, second.features(second.initial, cached))


def test_caching_in_chunks_is_caching_at_once(plan: Plan) -> None:
    bench = Runtime("cpu").workbench(plan)
    many = torch.rand(CHUNK + 3, 1, 16, 16)
    cached = bench.cache(many)
    assert all(len(tensor) == len(many) for tensor in cached)
    tail = bench.cache(many[-3:])
    for whole, part in zip(cached, tail, strict=True):
        assert torch.allclose(whole[-3:], part, atol=1e-5)
    features = bench.features(bench.initial, cached)
    assert features.shape == (len(many), bench.adapted.feature_dim)
    prepared = bench.adapted.backbone.prepare(many)
    with torch.no_grad():
        assert torch.allclose(features, bench.adapted(*prepared), atol=1e-5)


def gradients_by_hand(bench: Workbench, head: LinearHead) -> torch.Tensor:
    """(N, values) of the whole, uncached model; records one at a time."""
    own = LinearHead(head.linear.in_features, head.linear.out_features)
    own.load_state_dict(head.state_dict())
    parameters = list(bench.adapted.adapter.values())
    if head.linear.weight.requires_grad:
        parameters += list(own.parameters())
    (inputs,) = bench.adapted.backbone.prepare(IMAGES)
    rows = []
    for i, label in enumerate(LABELS):
        features = bench.adapted(inputs[i : i + 1])
        loss = functional.cross_entropy(own(features), label[None])
        gradient = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([g.flatten() for g in gradient]))
    return torch.stack(rows)


def random_head(bench: Workbench, plan: Plan, classes: int, kind: str, seed: int) -> LinearHead:
    names = tuple(str(i) for i in range(classes))
    head = initial_head(plan.replace({"head.training": kind}), names, bench.adapted.feature_dim)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.linear.weight.add_(torch.randn(head.linear.weight.shape, generator=generator))
    return head


@pytest.mark.filterwarnings("ignore:.*[Ff]ull backward hook.*")
def test_heads_of_any_kind_in_any_order_get_right_gradients(plan: Plan) -> None:
    """A simulation's sites differ in their classes and share one workbench."""
    bench = Runtime("cpu").workbench(plan)
    cached = bench.cache(IMAGES)
    adapter = {name: tensor + 0.05 for name, tensor in bench.initial.items()}
    kinds = [(2, "private"), (5, "private"), (2, "fixed"), (2, "private"), (2, "private")]
    for seed, (classes, kind) in enumerate(kinds):
        head = random_head(bench, plan, classes, kind, seed)
        model, engine = bench.trainer(head)
        bench.adapted.load(adapter)
        assert torch.equal(model.head.linear.weight, head.linear.weight)
        assert (model.head.linear.weight.requires_grad) is (kind == "private")
        truth = gradients_by_hand(bench, head)
        engine(cached, LABELS)
        samples = [p.grad_sample for p in trained(model).values()]  # type: ignore[attr-defined]
        found = torch.cat([s.reshape(len(LABELS), -1) for s in samples], dim=1)
        error = ((found - truth).norm(dim=1) / truth.norm(dim=1)).max()
        assert float(error) < 1e-4, (classes, kind)
        assert bench.verdicts[-1].exact


def test_the_trainer_is_checked_once_for_a_kind_of_head(plan: Plan) -> None:
    bench = Runtime("cpu").workbench(plan)
    first = bench.trainer(random_head(bench, plan, 2, "private", 0))
    assert bench.trainer(random_head(bench, plan, 2, "private", 1))[1] is first[1]
    assert bench.trainer(random_head(bench, plan, 3, "private", 1))[1] is not first[1]


def disturbed(adapter: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(4)
    return {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in adapter.items()}


def one_round(device: str, plan: Plan, std: float = 0.0) -> tuple[Tensors, Tensors]:
    runtime = Runtime(device)
    bench = runtime.workbench(plan)
    head = initial_head(plan, ("a", "b"), bench.adapted.feature_dim)
    update = train_round(
        bench=bench,
        plan=plan,
        number=1,
        adapter=disturbed(bench.initial),
        head=head,
        cached=bench.cache(IMAGES),
        labels=LABELS,
        step=StepNoise(0.8, 1.0, std, std, None),
        noise=NoiseSource.for_simulation("test_runtime"),
        physical_batch=4,
    )
    return update, dict(head.state_dict())


def distance(first: Tensors, second: Tensors) -> float:
    return max(float((first[n].cpu() - second[n].cpu()).abs().max()) for n in first)


@pytest.mark.parametrize("source", ["vit", "embedded:glyphs"])
@pytest.mark.parametrize("method", ["lora", "film"])
def test_bfloat16_stays_near_float32(plan: Plan, source: str, method: str) -> None:
    if source != "vit":
        plan = plan.replace({"backbone.source": source})
    plan = plan.replace({"adapter.method": method, "backbone.pooling": "mean"})
    exact, exact_head = one_round("cpu", plan)
    half = plan.replace({"backbone.frozen_dtype": "bfloat16"})
    rough, rough_head = one_round("cpu", half)
    assert all(tensor.dtype is torch.float32 for tensor in rough.values())
    assert 0 < distance(exact, rough) < 2e-2
    assert distance(exact_head, rough_head) < 2e-2
    bench = Runtime("cpu").workbench(half)
    assert bench.features(bench.initial, bench.cache(IMAGES)).dtype is torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("source", ["vit", "embedded:glyphs"])
def test_a_round_on_a_gpu_is_a_round_on_the_cpu(plan: Plan, source: str) -> None:
    if source != "vit":
        plan = plan.replace({"backbone.source": source})
    plan = plan.replace({"backbone.pooling": "mean"})
    cpu, cpu_head = one_round("cpu", plan, std=0.1)
    gpu, gpu_head = one_round("cuda:0", plan, std=0.1)
    assert distance(cpu, gpu) < 1e-4
    assert distance(cpu_head, gpu_head) < 1e-4


@pytest.mark.gpu
def test_a_gpu_chooses_bfloat16(plan: Plan) -> None:
    bench = Runtime("cuda:0").workbench(plan.replace({"backbone.frozen_dtype": "auto"}))
    assert bench.dtype is torch.bfloat16
    assert frozen_dtype("auto", torch.device("cuda:0")) is torch.bfloat16
