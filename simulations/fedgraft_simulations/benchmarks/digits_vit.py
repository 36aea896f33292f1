"""A whole digits job with a 12-block ViT: Fedgraft against stock Flower + Opacus + PEFT.

Four sites, five rounds, LoRA on the query and value projections, DP-SGD with the same epsilon,
delta, clipping norm, sample rate, steps and learning rates, from the same weights. Each side runs
in a fresh Python process and is timed from its start to its end, imports included; `peer` says
what the other side does. Fedgraft's head is refitted at the site at the end, as it always is; the
refit is inside its time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import numpy as np
import torch

from fedgraft_common.backbone import load_backbone
from fedgraft_common.plan import Plan
from fedgraft_simulations.benchmarks.glyph_vit import CACHE, LAYERS, glyph_vit
from fedgraft_simulations.benchmarks.measure import Ratio, Report, Way, alternate
from fedgraft_simulations.benchmarks.peer import Task
from fedgraft_simulations.partition import partition

SITES, ROUNDS, BATCH = 4, 5, 64
EPSILON, DELTA, CLIPPING_NORM = 8.0, 1e-5, 1.0
LEARNING_RATE, HEAD_LEARNING_RATE = 0.1, 4.0
RANK, ALPHA, TARGETS = 8, 16.0, ("q_proj", "v_proj")
SEED = 0
PACKAGE = "fedgraft_simulations.benchmarks"


def measure(repetitions: int = 1, cache: Path = CACHE, dtypes: tuple[str, ...] = ()) -> Report:
    """Runs all jobs in turn.

    Args:
        repetitions: of every job.
        cache: where the pre-trained ViT is kept.
        dtypes: number formats of Fedgraft's frozen part; by default float32, and bfloat16 where
            the processor multiplies it.
    """
    dtypes = dtypes or (("float32", "bfloat16") if multiplies_bfloat16() else ("float32",))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        backbone = glyph_vit(cache)
        plan = common_plan(backbone)
        write_data(plan, directory)
        jobs: dict[str, _Job] = {}
        for layers in ("all", "last:4"):
            jobs[f"peer {layers}"] = _peer(plan, layers, directory)
            for dtype in dtypes:
                jobs[f"{dtype} {layers}"] = _fedgraft(plan, layers, dtype, directory)
        alternate([job.run for job in jobs.values()], repetitions)
    ratios = []
    for layers, target in (("all", 1.5), ("last:4", None)):
        for dtype in dtypes:
            ratios.append(
                Ratio(
                    f"adapters on {layers}, {dtype}",
                    jobs[f"peer {layers}"].way("Flower + Opacus + PEFT"),
                    jobs[f"{dtype} {layers}"].way("Fedgraft"),
                    target if dtype == "float32" else None,
                )
            )
    for dtype in dtypes:
        ratios.append(
            Ratio(
                f"adapters on last:4 against all, {dtype}",
                jobs["peer all"].way("Flower + Opacus + PEFT, all"),
                jobs[f"{dtype} last:4"].way("Fedgraft, last:4"),
                10.0,
            )
        )
    return Report(
        "digits_vit",
        f"Digits, {SITES} sites x {ROUNDS} rounds, ViT of {LAYERS} blocks, LoRA r={RANK}, "
        f"epsilon {EPSILON:g}",
        ratios=tuple(ratios),
        notes=(
            f"{plan.training.local_steps} DP steps a round at sample rate "
            f"{plan.training.sample_rate:.3f}. Accuracy is the mean over sites on held-out "
            "records.",
            "bfloat16 (before the first adapted block only): " + _bfloat16_units(),
        ),
    )


def multiplies_bfloat16() -> bool:
    """Whether this processor has bfloat16 matrix or vector units."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _bfloat16_units() -> str:
    if torch.cpu._is_amx_tile_supported():
        return "this processor has matrix units (AMX)."
    if torch.cpu._is_avx512_bf16_supported():
        return "this processor has vector instructions (AVX512-BF16), no matrix units (AMX)."
    return "not measured, this processor has no instructions for it."


def common_plan(backbone: Path) -> Plan:
    """What both sides run, but for layers and number format."""
    plan = Plan().replace(
        {
            "name": "digits-vit",
            "seed": SEED,
            "backbone.source": f"dir:{backbone}",
            "adapter.method": "lora",
            "adapter.rank": RANK,
            "adapter.alpha": ALPHA,
            "adapter.targets": TARGETS,
            "head.training": "private",
            "privacy.mechanism": "local",
            "privacy.epsilon": EPSILON,
            "privacy.delta": DELTA,
            "privacy.clipping_norm": CLIPPING_NORM,
            "training.schedule": "constant",
            "training.learning_rate": LEARNING_RATE,
            "training.head_learning_rate": HEAD_LEARNING_RATE,
            "aggregation.sites": SITES,
            "rounds.count": ROUNDS,
            "sites.count": SITES,
            "sites.partitioner": "IidPartitioner",
        }
    )
    records = max(len(share.train) for share in partition(plan))
    steps = -(-records // BATCH)  # an epoch of the peer's Poisson loader
    return plan.replace(
        {
            "training.sample_rate": 1 / steps,
            "training.expected_batch": records / steps,
            "training.local_steps": steps,
        }
    )


def write_data(plan: Plan, directory: Path) -> None:
    """The sites' records, prepared, for the peer."""
    prepare = load_backbone(plan.backbone).prepare
    for number, share in enumerate(partition(plan)):
        np.savez(
            directory / f"site-{number}.npz",
            train_x=prepare(share.train.inputs)[0].numpy(),
            train_y=share.train.labels.numpy(),
            test_x=prepare(share.test.inputs)[0].numpy(),
            test_y=share.test.labels.numpy(),
        )


class _Job:
    """A command that prints its result, timed."""

    def __init__(self, command: Callable[[Path], list[str]], directory: Path) -> None:
        self._command = command
        self._directory = directory
        self.seconds: list[float] = []
        self.results: list[dict[str, float]] = []

    def run(self) -> float:
        """One run in a fresh process."""
        with tempfile.TemporaryDirectory(dir=self._directory) as name:
            quiet = {
                "FLWR_TELEMETRY_ENABLED": "0",
                "FLWR_HOME": name,
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            }
            command = [sys.executable, "-W", "ignore", "-m", *self._command(Path(name))]
            started = time.perf_counter()
            done = subprocess.run(
                command, env=os.environ | quiet, check=False, capture_output=True, text=True
            )
            self.seconds.append(time.perf_counter() - started)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        self.results.append(json.loads(done.stdout.splitlines()[-1]))
        return self.seconds[-1]

    def way(self, name: str) -> Way:
        """For the report."""
        facts = {key: median(r[key] for r in self.results) for key in self.results[0]}
        return Way(name, tuple(self.seconds), facts)


def peer_task(plan: Plan, layers: str, directory: Path) -> Task:
    """The plan, in the peer's words."""
    last = LAYERS if layers == "all" else int(layers.removeprefix("last:"))
    return Task(
        backbone=plan.backbone.source.removeprefix("dir:"),
        data=str(directory),
        sites=plan.sites.count,
        classes=10,
        rounds=plan.rounds.count,
        batch=BATCH,
        epsilon=plan.privacy.epsilon,
        delta=plan.privacy.delta,
        clipping_norm=plan.privacy.clipping_norm,
        learning_rate=plan.training.learning_rate,
        head_learning_rate=plan.training.head_learning_rate,
        rank=plan.adapter.rank,
        alpha=plan.adapter.alpha,
        layers=list(range(LAYERS - last, LAYERS)),
        targets=list(plan.adapter.targets),
        seed=plan.seed,
    )


def _peer(plan: Plan, layers: str, directory: Path) -> _Job:
    path = directory / f"task-{layers.replace(':', '-')}.json"
    path.write_text(json.dumps(asdict(peer_task(plan, layers, directory))), encoding="utf-8")
    return _Job(lambda _: [f"{PACKAGE}.peer", str(path)], directory)


def _fedgraft(plan: Plan, layers: str, dtype: str, directory: Path) -> _Job:
    own = plan.replace({"adapter.layers": layers, "backbone.frozen_dtype": dtype})
    path = directory / f"plan-{layers.replace(':', '-')}-{dtype}.json"
    path.write_text(own.model_dump_json(), encoding="utf-8")
    return _Job(lambda run: [f"{PACKAGE}.fedgraft_job", str(path), str(run)], directory)
