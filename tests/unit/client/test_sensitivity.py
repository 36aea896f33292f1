"""Sensitivity of the real thing: models, engines, averaging and clipping together, no noise.

Add or remove one unit, and the joint sum of adapter and head moves by at most C. Rounding moves
the other units' gradients too, because a matrix product depends in its last bits on what else is
in the batch; models in float64 keep that out of the way, and one test says how large it is in
float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fedgraft_client.dp import JointOptimizer
from fedgraft_client.gradients import Engine, Hooks, Loop, Vmap
from fedgraft_client.head import initial_head
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.runtime import Workbench
from fedgraft_common.messages import RANGE, check_range
from fedgraft_common.plan import Plan

ENGINES: dict[str, Callable[[nn.Module], Engine]] = {"hooks": Hooks, "vmap": Vmap, "loop": Loop}
WIDTH, CLASSES = 4, 3
WORST = (math.nan, math.inf, -math.inf, 1e38, 1e300)


class Small(nn.Module):
    """A frozen layer, an adapter of one of three kinds, and a head: logits (N, CLASSES)."""

    def __init__(self, kind: str, depth: int, hidden: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.frozen = nn.Linear(WIDTH, hidden).requires_grad_(False)
            self.adapter = nn.Sequential(*(adapter(kind, hidden) for _ in range(depth)))
            self.head = nn.Linear(hidden, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.adapter(self.frozen(inputs)))
        return logits


def adapter(kind: str, hidden: int) -> nn.Module:
    if kind == "norm":
        return nn.Sequential(nn.LayerNorm(hidden), nn.Tanh())
    if kind == "low-rank":
        down = nn.Linear(hidden, 1, bias=False).requires_grad_(False)
        return nn.Sequential(down, nn.Linear(1, hidden, bias=False), nn.ReLU())
    return nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh())


class Case:
    """Units of records, and a model that a noise-free step is taken with."""

    def __init__(
        self, sizes: list[int], seed: int, scale: float, model: Small, engine: str
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        dtype = model.head.weight.dtype
        self.inputs = [scale * torch.randn(n, WIDTH, generator=generator).to(dtype) for n in sizes]
        self.labels = [torch.randint(CLASSES, (n,), generator=generator) for n in sizes]
        self.model = model
        self.engine: Engine = ENGINES[engine](model)

    def released(
        self, present: list[int], clipping_norm: float, physical_batch: int, by_unit: bool = True
    ) -> dict[str, torch.Tensor]:
        """The clipped sum over the units that are present, as adapter and head vectors."""
        parts = {"adapter": self.model.adapter, "head": self.model.head}
        groups = [
            {"params": [p for p in part.parameters() if p.requires_grad], "noise_std": 0.0}
            for part in parts.values()
        ]
        source = NoiseSource.for_simulation("test_sensitivity")
        joint = JointOptimizer(torch.optim.SGD(groups, lr=1.0), clipping_norm, source)
        sizes = torch.tensor([len(self.labels[i]) for i in present], dtype=torch.int64)
        dtype = self.model.head.weight.dtype
        inputs = torch.cat([torch.zeros(0, WIDTH, dtype=dtype), *(self.inputs[i] for i in present)])
        labels = torch.cat([torch.zeros(0, dtype=torch.int64), *(self.labels[i] for i in present)])
        joint.noisy_sum(self.engine, (inputs,), labels, physical_batch, sizes if by_unit else None)
        return {
            name: torch.cat([p.grad.flatten() for p in group["params"]])  # type: ignore[attr-defined]
            for name, group in zip(parts, groups, strict=True)
        }

    def distance(
        self, present: list[int], other: list[int], clipping_norm: float, physical_batch: int
    ) -> tuple[float, dict[str, torch.Tensor]]:
        one = self.released(present, clipping_norm, physical_batch)
        two = self.released(other, clipping_norm, physical_batch)
        assert all(tensor.isfinite().all() for tensor in (*one.values(), *two.values()))
        gap = {name: (one[name] - two[name]).double() for name in one}
        return float(torch.cat(list(gap.values())).norm()), gap


models = st.builds(
    Small,
    st.sampled_from(["dense", "norm", "low-rank"]),
    st.integers(1, 2),
    st.integers(2, 6),
    st.integers(0, 1000),
)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    model=models,
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    place=st.integers(0, 4),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    exponent=st.floats(-4, 6),
    physical_batch=st.sampled_from([1, 3, 8, 256]),
    broken=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 11), st.sampled_from(WORST))),
)
def test_one_unit_moves_the_joint_sum_by_at_most_c(
    engine: str,
    model: Small,
    sizes: list[int],
    place: int,
    seed: int,
    scale: float,
    exponent: float,
    physical_batch: int,
    broken: list[tuple[int, int, float]],
) -> None:
    """Also when it is the only one (its neighbour is the empty batch) or cannot be computed."""
    place %= len(sizes)
    clipping_norm = 10.0**exponent
    case = Case(sizes, seed, scale, model.double(), engine)
    for unit, record, value in broken:
        rows = case.inputs[unit % len(sizes)]
        rows[record % len(rows), 0] = value
    everyone = list(range(len(sizes)))
    without = [i for i in everyone if i != place]
    gap, parts = case.distance(everyone, without, clipping_norm, physical_batch)
    assert gap <= clipping_norm * (1 + 1e-5)
    assert float(parts["head"].norm()) <= clipping_norm * (1 + 1e-5)
    case.engine.close()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("records", [1, 2, 8, 100])
def test_the_bound_is_reached_and_not_passed(engine: str, records: int) -> None:
    """Equal steep records: their average is as long as one, so clipping decides. C is tight."""
    model = Small("dense", 1, 5, 1).double()
    inputs = torch.ones(records, WIDTH, dtype=torch.float64)
    wrong = model(inputs[:1]).argmin()
    case = Case([records, 3], 5, 1.0, model, engine)
    case.inputs[0], case.labels[0] = inputs, wrong.expand(records).clone()
    gap, parts = case.distance([0, 1], [1], 0.5, 64)
    assert gap == pytest.approx(0.5, rel=1e-5)
    assert 0 < float(parts["head"].norm()) < gap > float(parts["adapter"].norm()) > 0
    record_level = case.released([0], 0.5, 64, by_unit=False)
    total = torch.cat(list(record_level.values())).norm()
    assert float(total) == pytest.approx(0.5 * records, rel=1e-4)  # what averaging prevents
    case.engine.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_empty_batches_and_single_records(engine: str) -> None:
    case = Case([1, 4], 0, 5.0, Small("norm", 1, 4, 2).double(), engine)
    nothing = case.released([], 1.0, 4)
    assert all(not tensor.any() for tensor in nothing.values())
    alone = case.released([0], 1.0, 4)
    as_record = case.released([0], 1.0, 4, by_unit=False)
    assert all(torch.equal(alone[name], as_record[name]) for name in alone)
    case.engine.close()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("physical_batch", [1, 4, 5, 7, 256])
def test_against_averages_by_hand(engine: str, physical_batch: int) -> None:
    """One record at a time with plain autograd, averaged and clipped with a calculator."""
    sizes, clipping_norm = [3, 1, 5, 2], 0.3
    case = Case(sizes, 3, 1.0, Small("dense", 2, 5, 4).double(), engine)
    found = torch.cat(list(case.released([0, 1, 2, 3], clipping_norm, physical_batch).values()))
    case.engine.close()
    parameters = [*case.model.adapter.parameters(), *case.model.head.parameters()]
    expected = torch.zeros_like(found)
    shortened = 0
    for inputs, labels in zip(case.inputs, case.labels, strict=True):
        rows = []
        for i in range(len(labels)):
            loss = nn.functional.cross_entropy(case.model(inputs[i : i + 1]), labels[i : i + 1])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        average = torch.stack(rows).mean(dim=0)
        shortened += float(average.norm()) > clipping_norm
        expected += average * min(1.0, clipping_norm / float(average.norm()))
    assert shortened > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_broken_record_counts_as_one_of_its_unit() -> None:
    """Its gradient is zero and its unit's average is over all of them: no other unit is changed."""
    case = Case([2, 1], 1, 0.1, Small("dense", 1, 4, 3).double(), "loop")
    whole = case.released([0], 1e3, 8)
    case.inputs[0][1, 0] = math.nan
    rest = case.released([0], 1e3, 8)
    case.inputs[0], case.labels[0] = case.inputs[0][:1], case.labels[0][:1]
    first = case.released([0], 1e3, 8)
    for name in whole:
        assert not torch.allclose(rest[name], whole[name])
        torch.testing.assert_close(rest[name], first[name] / 2, rtol=1e-5, atol=1e-8)


def test_a_unit_whose_average_overflows_is_contained() -> None:
    """Near the end of float32 the average of finite gradients may be infinite by rounding."""
    model = nn.Linear(1, 2, bias=False)

    class Largest:
        name = "largest"

        def __call__(self, cached: tuple[torch.Tensor, ...], labels: torch.Tensor) -> None:
            most = torch.finfo(torch.float32).max
            model.weight.grad_sample = torch.full((len(labels), 2, 1), most)  # type: ignore[attr-defined]

        def close(self) -> None:
            pass

    groups = [{"params": [model.weight], "noise_std": 0.0}]
    source = NoiseSource.for_simulation("test_sensitivity")
    joint = JointOptimizer(torch.optim.SGD(groups, lr=1.0), 1.0, source)
    for records in range(1, 40):
        labels = torch.zeros(records, dtype=torch.int64)
        joint.noisy_sum(Largest(), (labels,), labels, 64, torch.tensor([records]))
        assert model.weight.grad is not None and model.weight.grad.isfinite().all()
        assert float(model.weight.grad.norm()) <= 1 + 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=25, deadline=None)
@given(
    model=models,
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    seed=st.integers(0, 10_000),
    clipping_norm=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_in_float32_rounding_adds_next_to_nothing(
    engine: str, model: Small, sizes: list[int], seed: int, clipping_norm: float
) -> None:
    case = Case(sizes, seed, 2.0, model.float(), engine)
    everyone = list(range(len(sizes)))
    gap, _ = case.distance(everyone, everyone[1:], clipping_norm, 256)
    assert gap <= clipping_norm * (1 + 1e-4)
    case.engine.close()


@pytest.mark.parametrize("records", [2, 4, 8, 9])
def test_a_cancelling_adapter_gains_nothing_from_rounding(records: int) -> None:
    """A dishonest server's best inside the allowed range: huge rank-one parts that cancel.

    Their float32 remainder decides the gradients of all records, and it depends on the kernel, so
    on how many records there are. At values of 1e6 the distance reached 1.9 C; `check_range` does
    not let those in, and tiny batches are filled up.
    """
    plan = Plan().replace(
        {"adapter.method": "lora", "adapter.layers": "last:1", "head.scale": 14.0}
    )
    bench = Workbench(plan, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    crafted = {}
    for name, start in bench.initial.items():
        values = torch.randn(start.shape, generator=generator)
        if "lora_A" in name:
            values[1::2] = values[0::2] * 3
        else:
            values[:, 1::2] = -values[:, 0::2] / 3
        crafted[name] = start + values * (RANGE / values.abs().max())
    check_range(crafted, bench.initial)
    bench.adapted.load(crafted)
    head = initial_head(plan, ("a", "b"), bench.adapted.feature_dim)
    model, engine = bench.trainer(head)
    images = torch.rand(records, 1, 8, 8, generator=generator)
    labels = torch.randint(2, (records,), generator=generator)
    cached = bench.cache(images)

    def total(kept: slice) -> torch.Tensor:
        parameters = [p for p in model.parameters() if p.requires_grad]
        sgd = torch.optim.SGD([{"params": parameters, "noise_std": 0.0}], lr=1.0)
        joint = JointOptimizer(sgd, 1.0, NoiseSource.for_simulation("none"))
        joint.noisy_sum(engine, tuple(t[kept] for t in cached), labels[kept], 256)
        found = torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])
        joint.zero_grad(set_to_none=True)
        return found

    whole = total(slice(0, records))
    for kept in (slice(0, records - 1), slice(1, records)):
        assert float((whole - total(kept)).norm()) <= 1.0 + 1e-4
