"""What the frozen backbone makes of a site's records, and how far a head alone gets with it.

The question to ask first of any backbone: are the classes apart in its features? Features are
private like the records they are made of, and stay at the site.

Shapes: N records, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from fedgraft_client.device_check import find_backbone
from fedgraft_client.opening import load_records
from fedgraft_client.refit import refit_head
from fedgraft_client.runtime import Runtime
from fedgraft_client.scores import Score, scores
from fedgraft_client.site_file import load_site_file
from fedgraft_client.task_head import empty_head
from fedgraft_client.tasks import build_task
from fedgraft_client.tasks.alignment import aligned
from fedgraft_common.errors import DataError
from fedgraft_common.files import save_tensors
from fedgraft_common.plan import Plan

FOLDS: Final = 5
STIFFNESS: Final = 0.01  # of a head that stays alone; the refit after a federation is held harder


@dataclass(frozen=True, slots=True)
class Extracted:
    """Features of a site's records.

    Attributes:
        backbone: its name.
        shape: of the features, N records first.
        units: how many units the records are of.
        scores: of heads fitted without noise to four fifths of the units, on the fifth left out.
        file: where features and labels were put, for the operator's eyes only.
    """

    backbone: str
    shape: tuple[int, ...]
    units: int
    scores: tuple[Score, ...]
    file: Path


def extract(site: Path, plan: Plan) -> Extracted:
    """Runs the plan's backbone over the records, with the adapter as a run would begin.

    Nothing leaves and nothing is spent.

    Args:
        site: the site file.
        plan: names the backbone.

    Raises:
        PolicyError: the site file is wrong.
        DataError: the records cannot be used, or are of fewer than `FOLDS` units.
        BackboneError: the backbone cannot be loaded, or was not fetched yet.
    """
    file, base = load_site_file(site), site.parent
    records = load_records(file, base)
    if records.unit_count < FOLDS:
        raise DataError(
            f"{site}: data.source", f"{records.unit_count} of {file.data.unit}",
            f"at least {FOLDS}, to fit a head on some and look at others",
            "Name a source with more records.",
        )  # fmt: skip
    task = build_task(file.spec)
    directory, _ = find_backbone(plan, base / file.home, None)
    runtime = Runtime(file.device, file.physical_batch, lambda _: directory, file.policy.gpu_memory)
    bench = runtime.workbench(plan, task.features)
    features = bench.features(bench.initial, bench.cache(records.inputs))
    labels = aligned(task, records, bench.adapted.backbone)
    units = torch.arange(len(records)) if records.units is None else records.units
    order = torch.randperm(records.unit_count, generator=torch.Generator().manual_seed(0))
    fold = order[units] % FOLDS
    outputs: list[torch.Tensor] = []
    for k in range(FOLDS):
        inside = fold != k
        start = empty_head(task, bench.adapted.feature_dim)
        head = refit_head(features[inside], labels[inside], start, STIFFNESS)
        with torch.no_grad():
            outputs.append(head(features[~inside]))
    back = torch.cat([(fold == k).nonzero().flatten() for k in range(FOLDS)]).argsort()
    found = scores(task, torch.cat(outputs)[back], labels, records.units)
    path = file.store_directory(base) / "look" / "features.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {"features": features, "labels": labels, "units": units}, {})
    name = bench.adapted.backbone.manifest.name
    return Extracted(name, tuple(features.shape), records.unit_count, found, path)
