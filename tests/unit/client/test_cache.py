"""Large caches move to disk without changing, and leave nothing there."""

from __future__ import annotations

import math
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fedgraft_client.cache import keep
from fedgraft_client.head import initial_head
from fedgraft_client.prefix import Cached
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.runtime import Runtime
from fedgraft_client.training import train_round
from fedgraft_common.mechanism import StepNoise
from fedgraft_common.plan import Plan

CACHED: Cached = (
    torch.randn(9, 4, 5, generator=torch.Generator().manual_seed(0)),
    torch.randn(9, 3).to(torch.bfloat16),
    torch.arange(9),
)


def test_small_caches_stay_in_memory(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    assert keep(CACHED, folder) is CACHED
    size = sum(tensor.nbytes for tensor in CACHED)
    assert keep(CACHED, folder, limit=size) is CACHED
    assert not folder.exists()


def mapped_files(folder: Path) -> list[str]:
    """What this process has mapped from a folder, as Linux tells it."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if str(folder) in line]


def test_large_caches_keep_their_values_in_a_file_without_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    kept = keep(CACHED, folder, limit=10)
    for before, after in zip(CACHED, kept, strict=True):
        assert after is not before
        assert after.dtype == before.dtype
        assert torch.equal(after, before)
        assert torch.equal(after[torch.tensor([3, 1])], before[torch.tensor([3, 1])])
    lines = mapped_files(folder)
    assert len(lines) == len(CACHED)
    assert all(line.endswith("(deleted)") for line in lines)
    assert list(folder.iterdir()) == []


def test_the_file_is_never_readable_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    make: Any = tempfile.NamedTemporaryFile

    def watched(**options: Any) -> Any:
        file = make(**options)
        modes.append(stat.S_IMODE(Path(file.name).stat().st_mode))
        return file

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", watched)
    umask = os.umask(0)
    try:
        keep(CACHED, tmp_path, limit=10)
    finally:
        os.umask(umask)
    assert modes == [0o600] * len(CACHED)


def test_training_from_disk_is_training_from_memory(tmp_path: Path, vit_directory: Path) -> None:
    plan = Plan().replace(
        {
            "backbone.source": f"dir:{vit_directory}",
            "adapter.layers": "last:1",
            "head.training": "private",
            "training.local_steps": 2,
        }
    )
    bench = Runtime("cpu").workbench(plan)
    images = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    in_memory = bench.cache(images)
    on_disk = keep(in_memory, tmp_path, limit=0)
    updates = []
    for cached in (in_memory, on_disk):
        head = initial_head(plan, ("a", "b"), bench.adapted.feature_dim)
        update = train_round(
            bench=bench,
            plan=plan,
            number=1,
            adapter=bench.initial,
            head=head,
            cached=cached,
            labels=torch.arange(6) % 2,
            step=StepNoise(0.8, 1.0, 0.1, 0.1, None),
            noise=NoiseSource.for_simulation("test_cache"),
            physical_batch=4,
        )
        updates.append(update)
    assert all(torch.equal(updates[0][name], updates[1][name]) for name in updates[0])
    assert not math.isnan(sum(float(t.sum()) for t in updates[0].values()))
