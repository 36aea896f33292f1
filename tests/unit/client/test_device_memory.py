"""A device that is full: the same sum from smaller parts, noise once, no unit twice."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedgraft_client import runtime as runtime_module
from fedgraft_client.device_memory import (
    GIB,
    in_chunks,
    limit_memory,
    memory_fraction,
    return_freed,
    smaller,
)
from fedgraft_client.dp import JointOptimizer
from fedgraft_client.head import initial_head
from fedgraft_client.prefix import Cached
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.runtime import Runtime, Workbench
from fedgraft_client.training import train_round
from fedgraft_common.errors import DeviceError, PolicyError
from fedgraft_common.mechanism import StepNoise
from fedgraft_common.messages import Status, status_of
from fedgraft_common.plan import Plan

VALUES = 6
SIZES = torch.tensor([3, 1, 7, 2, 4])  # 17 records of 5 units


class Model(nn.Module):
    """Two parameters, so that a sum can be interrupted between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(VALUES))
        self.second = nn.Parameter(torch.zeros(VALUES))


class Full:
    """Gradients are the cached rows; a device with room for `room` records."""

    name = "full"

    def __init__(self, model: Model, room: int) -> None:
        self.model, self.room = model, room
        self.calls: list[int] = []

    def __call__(self, cached: Cached, labels: torch.Tensor) -> None:
        rows = cached[0]
        self.calls.append(len(rows))
        self.model.first.grad_sample = rows.clone()  # type: ignore[attr-defined]
        if len(rows) > self.room:  # in the middle: the other parameter has none yet
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.model.second.grad_sample = 2 * rows  # type: ignore[attr-defined]

    def close(self) -> None:
        pass


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, VALUES, generator=torch.Generator().manual_seed(1)) * 2


def step(
    room: int, physical_batch: int = 16, sizes: torch.Tensor | None = None, std: float = 0.0
) -> tuple[torch.Tensor, int, list[int]]:
    model = Model()
    groups = [{"params": [model.first, model.second], "lr": 1.0, "noise_std": std}]
    noise = NoiseSource.for_simulation("test_device_memory")
    optimizer = JointOptimizer(torch.optim.SGD(groups), 1.0, noise)
    engine = Full(model, room)
    fitted = optimizer.noisy_sum(
        engine, (rows(17),), torch.zeros(17, dtype=torch.int64), physical_batch, sizes
    )
    assert model.first.grad is not None and model.second.grad is not None
    return torch.cat([model.first.grad, model.second.grad]), fitted, engine.calls


@pytest.mark.parametrize("sizes", [None, SIZES], ids=["records", "units"])
@pytest.mark.parametrize("std", [0.0, 3.0])
@pytest.mark.parametrize("room", [1, 2, 3, 5, 8, 12])
def test_the_sum_and_the_noise_are_those_of_the_undisturbed_run(
    room: int, std: float, sizes: torch.Tensor | None
) -> None:
    expected, all_at_once, _ = step(17, 17, sizes, std)
    found, fitted, calls = step(room, 16, sizes, std)
    assert all_at_once == 17
    assert fitted <= room
    assert max(calls) > room, "it never ran out of memory"
    assert torch.allclose(found, expected, atol=1e-5)
    assert float(expected.norm()) > 1


@pytest.mark.parametrize("sizes", [None, SIZES], ids=["records", "units"])
def test_what_was_added_before_memory_ran_out_is_not_added_again(
    sizes: torch.Tensor | None,
) -> None:
    """The device fills up in the second part, then in the sum itself, between two parameters."""
    expected, _, _ = step(17, 17, sizes)
    model = Model()
    groups = [{"params": [model.first, model.second], "lr": 1.0, "noise_std": 0.0}]

    class Interrupted(JointOptimizer):
        count = 0

        def clip_and_accumulate(self) -> None:
            super().clip_and_accumulate()
            self.count += 1
            if self.count == 2:
                model.second.summed_grad = None  # type: ignore[attr-defined]
                raise torch.OutOfMemoryError("CUDA out of memory")

    noise = NoiseSource.for_simulation("test_device_memory")
    optimizer = Interrupted(torch.optim.SGD(groups), 1.0, noise)
    labels = torch.zeros(17, dtype=torch.int64)
    fitted = optimizer.noisy_sum(Full(model, 99), (rows(17),), labels, 8, sizes)
    assert fitted < 8
    assert model.first.grad is not None and model.second.grad is not None
    assert torch.allclose(torch.cat([model.first.grad, model.second.grad]), expected, atol=1e-5)


def test_copies_that_fill_up_a_small_batch_are_not_what_fails_it() -> None:
    model = Model()
    groups = [{"params": [model.first, model.second], "lr": 1.0, "noise_std": 0.0}]
    noise = NoiseSource.for_simulation("test_device_memory")
    optimizer = JointOptimizer(torch.optim.SGD(groups), 99.0, noise)
    labels = torch.zeros(1, dtype=torch.int64)
    fitted = optimizer.noisy_sum(Full(model, 4), (rows(1),), labels, 16)
    assert fitted == 4
    assert model.first.grad is not None
    assert torch.allclose(model.first.grad, rows(1)[0])


def test_no_room_for_one_record_is_said_and_is_a_failure() -> None:
    with pytest.raises(DeviceError, match=r"one record.*raise policy.gpu_memory") as raised:
        step(0)
    assert status_of(raised.value) is Status.FAILED


def test_sizes_halve_from_what_was_tried() -> None:
    assert [smaller(256, 1000), smaller(256, 90), smaller(3, 3), smaller(2, 2)] == [128, 45, 1, 1]


def test_chunks_are_computed_in_order_whatever_fits() -> None:
    tried: list[int] = []

    def work(part: slice) -> list[int]:
        tried.append(part.stop - part.start)
        if tried[-1] > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(100))[part]

    parts, size = in_chunks(work, 23, 20)
    assert [number for part in parts for number in part] == list(range(23))
    assert (size, tried) == (5, [20, 10, 5, 5, 5, 5, 3])
    with pytest.raises(DeviceError):
        in_chunks(lambda _: step(0), 3, 2)
    assert in_chunks(work, 0, 4) == ([], 4)


def test_the_policys_limit_as_a_part_of_the_device() -> None:
    assert memory_fraction(16 * GIB, 4.0, "cuda:0") == 0.25
    assert memory_fraction(16 * GIB, None, "cuda:0") == 1.0
    with pytest.raises(PolicyError, match=r"gpu_memory: found 24.0; allowed: at most 16.0 GiB"):
        memory_fraction(16 * GIB, 24.0, "cuda:0")
    assert limit_memory(torch.device("cpu"), 2.0) == 1.0


@pytest.mark.parametrize("unit", ["record", "patient"])
def test_a_round_on_a_full_device_ends_at_the_same_adapter(
    vit_directory: Path, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan().replace(
        {
            "backbone.source": f"dir:{vit_directory}",
            "backbone.frozen_dtype": "float32",
            "adapter.method": "film",
            "adapter.layers": "last:1",
            "head.training": "private",
            "training.local_steps": 3,
            "privacy.unit": unit,
            "privacy.records_per_unit": 4,
        }
    )
    runtime = Runtime("cpu", 8)
    bench = runtime.workbench(plan)
    images = torch.rand(12, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    cached = bench.cache(images)

    def train() -> dict[str, torch.Tensor]:
        head = initial_head(plan, ("a", "b"), bench.adapted.feature_dim)
        return train_round(
            bench, plan, 1, bench.initial, head, cached, torch.arange(12) % 2,
            StepNoise(0.9, 1.0, 0.1, 0.1, None), NoiseSource.for_simulation("full"),
            runtime.physical_batch, torch.arange(12) // 4, runtime.remember,
        )  # fmt: skip

    expected = train()
    assert runtime.physical_batch == 8
    real = Workbench.trainer

    def trainer(self: Workbench, *args: Any) -> object:
        model, engine = real(self, *args)

        def full(part: Cached, labels: torch.Tensor) -> None:
            if len(labels) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            engine(part, labels)

        return model, full

    monkeypatch.setattr(Workbench, "trainer", trainer)
    found = train()
    assert runtime.physical_batch in (1, 2, 3)
    assert all(torch.allclose(found[n], expected[n], atol=1e-5) for n in expected)
    assert any(not torch.equal(expected[n], bench.initial[n]) for n in expected)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    """Every second piece is kept: the C library alone gives back the end of its heap only."""
    libc = ctypes.CDLL(None)
    if getattr(libc, "malloc_trim", None) is None:
        pytest.skip("the C library has no malloc_trim")
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    pieces = [libc.malloc(100_000) for _ in range(1000)]
    for piece in pieces:
        ctypes.memset(piece, 1, 100_000)
    for piece in pieces[::2]:
        libc.free(piece)
    before = resident()
    return_freed()
    assert before - resident() > 30e6
    for piece in pieces[1::2]:
        libc.free(piece)


@pytest.mark.parametrize(
    ("large", "rest", "times"), [(True, 60.0, 1), (False, 60.0, 0), (False, 0.0, 1)]
)
def test_a_large_model_gives_memory_back_after_a_round_and_others_at_times(
    vit_directory: Path, large: bool, rest: float, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(runtime_module, "REST", rest)
    monkeypatch.setattr(runtime_module, "SMALL", 0 if large else 10**9)
    monkeypatch.setattr(runtime_module, "return_freed", lambda: asked.append(1))
    changes = {"backbone.source": f"dir:{vit_directory}", "adapter.layers": "last:1"}
    plan = Plan().replace(changes)
    bench = Runtime("cpu").workbench(plan)
    cached = bench.cache(torch.rand(4, 1, 16, 16))
    train_round(
        bench, plan, 1, bench.initial, initial_head(plan, ("a", "b"), bench.adapted.feature_dim),
        cached, torch.arange(4) % 2, StepNoise(0.9, 1.0, 0.1, 0.1, None),
        NoiseSource.for_simulation("rest"), 8,
    )  # fmt: skip
    assert len(asked) == times


@pytest.mark.gpu
def test_a_limit_on_a_gpu_leads_to_smaller_parts() -> None:
    device = torch.device("cuda:0")
    limit_memory(device, 0.5)
    try:

        def work(part: slice) -> int:
            torch.empty((part.stop - part.start) * 2**20, 32, device=device)  # 128 MiB a record
            return int(part.stop - part.start)

        parts, size = in_chunks(work, 16, 16)
        assert sum(parts) == 16
        assert 1 <= size <= 3
    finally:
        limit_memory(device, None)
