"""Checks of what a site computes with: device, backbone, and one DP step on synthetic records."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import torch

from fedgraft_client.augmentation import check_views
from fedgraft_client.blob_store import BlobStore
from fedgraft_client.cache import MEMORY_LIMIT
from fedgraft_client.device_memory import GIB, memory_fraction
from fedgraft_client.identity import Identity
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.runtime import Runtime, Workbench, choose_device
from fedgraft_client.task_head import start_head
from fedgraft_client.tasks import Task
from fedgraft_client.training import train_round
from fedgraft_common.errors import DeviceError
from fedgraft_common.mechanism import StepNoise
from fedgraft_common.plan import Plan

RECORDS: Final = 64  # synthetic ones in the trial step


def check_device(name: str, gpu_memory: float | None) -> tuple[str, torch.device]:
    """The device exists, and has the memory that the policy grants."""
    device = choose_device(name)
    if device.type != "cuda":
        return f"{device}, {torch.get_num_threads()} threads", device
    free, total = torch.cuda.mem_get_info(device)
    memory_fraction(total, gpu_memory, str(device))
    allowed = f"; the policy allows {gpu_memory:g} GiB" if gpu_memory else ""
    title = torch.cuda.get_device_name(device)
    text = f"{device} ({title}), {free / GIB:.1f} of {total / GIB:.1f} GiB free{allowed}"
    return text, device


def find_backbone(plan: Plan, home: Path, identity: Identity | None) -> tuple[Path | None, bool]:
    """Where a plan's backbone lies (None: where the plan says), and whether it is here."""
    if not plan.backbone.source.startswith("server:") or plan.backbone.sha256 is None:
        return None, True
    if identity is None or not (home / "backbones").is_dir():
        return None, False

    store = BlobStore(home / "backbones", 0)  # only reads
    pinned = plan.backbone.manifest_sha256
    found = store.find(identity.operator_key, plan.backbone.sha256, pinned)
    return found, found is not None


def load_bench(runtime: Runtime, plan: Plan, task: Task) -> tuple[str, Workbench]:
    """The backbone loads, has the plan's hash, takes the plan's adapter and suits the task."""
    bench = runtime.workbench(plan, task.features)
    backbone = bench.adapted.backbone
    values = sum(tensor.numel() for tensor in bench.initial.values())
    pinned = "as the plan says" if plan.backbone.sha256 else "not pinned by the plan"
    return (
        f"{backbone.manifest.name}, SHA-256 {backbone.sha256[:12]} ({pinned}); {values} values "
        f"of {plan.adapter.method}",
        bench,
    )


def cache_bytes(bench: Workbench | None, records: int) -> int:
    """Disk that the cached prefix of so many records needs; 0 if it stays in memory."""
    if bench is None:
        return 0
    example = bench.adapted.backbone.example(1, torch.Generator().manual_seed(0))
    with suppress(torch.OutOfMemoryError):
        kept = bench.prefix.compute(*(tensor.to(bench.device) for tensor in example))
        size = records * sum(tensor.nbytes for tensor in kept)
        return size if size > MEMORY_LIMIT else 0
    return 0


def trial_step(
    bench: Workbench, plan: Plan, task: Task, records: int = RECORDS
) -> tuple[str, None]:
    """One whole DP step on synthetic records, with the engine that the real ones would get."""
    check_views(plan.augmentation, bench.adapted.backbone.modality, task.features, task.spec.kind)
    head = start_head(plan, task, bench.adapted)
    example = bench.adapted.backbone.example(records, torch.Generator().manual_seed(1))
    inputs = (tensor.to(bench.device) for tensor in example)
    cached = tuple(tensor.cpu() for tensor in bench.prefix.compute(*inputs))
    model, _ = bench.trainer(head)
    with torch.no_grad():
        labels = task.example(model(*(tensor.to(bench.device) for tensor in cached))).cpu()
    smaller: list[int] = []
    began = time.perf_counter()
    update = train_round(
        bench,
        plan.replace({"training.local_steps": 1, "training.proximal": 0}),
        1,
        bench.initial,
        head,
        cached,
        labels,
        StepNoise(1.0, 1.0, 1e-3, 1e-3, None),
        NoiseSource.from_operating_system(),
        records,
        torch.arange(records),
        smaller.append,
    )
    if not all(tensor.isfinite().all() for tensor in update.values()):
        raise DeviceError(
            "DP step", "an adapter that is not finite", "finite values",
            "Try another device; if it is the same there, report this with the plan.",
        )  # fmt: skip
    took = time.perf_counter() - began
    verdict = bench.verdicts[-1]
    room = f", {smaller[-1]} at once for lack of memory" if smaller else ""
    return (
        f"{verdict.engine} exact to {verdict.error:.0e}; {records} synthetic records in "
        f"{took:.2f} s on {bench.device}{room}",
        None,
    )
