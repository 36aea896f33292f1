"""Mislabelled records as canaries, and an attacker who has only the released model: T3.

Records that no site trained on get a wrong label; a fair coin decides for each whether its site
takes it into its training data. The run is the plan's own, with nothing watched or changed but the
data. The attacker scores each canary by how much the released adapter lowered the loss of its wrong
label, under the head that the federation used at that site; then T1 counts right guesses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft_client.data import Records
from fedgraft_client.runtime import Runtime
from fedgraft_client.site import Site
from fedgraft_client.tasks.alignment import aligned
from fedgraft_common.messages import Tensors
from fedgraft_common.modality import take
from fedgraft_simulations.audit.candidates import together
from fedgraft_simulations.audit.part import AuditContext
from fedgraft_simulations.audit.rehearsal import Rehearsal, site_of
from fedgraft_simulations.partition import Share, partition

MOST = 320
"""Canaries over all sites, about; a site holds no more than it has units of its own."""


@dataclass(frozen=True, slots=True)
class BlackBox:
    """What the attacker had.

    Attributes:
        scores: (m,) how much the wrong label's loss fell.
        included: (m,) the coins.
    """

    scores: NDArray[np.float64]
    included: NDArray[np.bool_]


def run_black_box(
    context: AuditContext,
    directory: Path,
    on_round: Callable[[int], None] = lambda _: None,
    runtime: Runtime | None = None,
) -> BlackBox:
    """Runs the plan with mislabelled canaries and scores them.

    Sums are taken in the open: the released model is the same, but for rounding.

    Args:
        context: plan and the auditor's randomness.
        directory: for the run's files; empty.
        on_round: told the number of each finished round.
        runtime: device and warm models.
    """
    runtime = runtime or Runtime(context.device)
    plan = context.plan.replace({"privacy.secure_aggregation": "summed"})
    shares = partition(plan)
    random = context.random("black box")
    planted = [_plant(share, MOST // len(shares) + 1, random) for share in shares]

    def site(number: int) -> Site:
        return site_of(plan, directory, number, runtime, planted[number][2])

    run = Rehearsal.run(plan, directory, site, on_round=on_round)
    scores = [
        _fall(one, run, canaries) for one, (canaries, _, _) in zip(run.sites, planted, strict=True)
    ]
    return BlackBox(np.concatenate(scores), np.concatenate([coins for _, coins, _ in planted]))


def _plant(
    share: Share, most: int, random: np.random.Generator
) -> tuple[Records, NDArray[np.bool_], Records]:
    """Canaries of one site, their coins, and its training data with the included ones."""
    train, test = share.train, share.test
    count = min(most, len(test), max(2, train.unit_count))
    chosen = torch.from_numpy(random.permutation(len(test))[:count])
    labels = test.labels[chosen]
    if labels.dim() == 1 and labels.dtype == torch.int64 and len(share.classes) > 1:
        shift = torch.from_numpy(random.integers(1, len(share.classes), size=count))
        labels = (labels + shift) % len(share.classes)
    else:  # labels of another kind: each gets its neighbour's
        labels = labels.roll(1, dims=0)
    canaries = Records(take(test.inputs, chosen), labels)
    included = random.random(count) < 0.5
    taken = torch.from_numpy(np.flatnonzero(included))
    units = train.units
    if units is not None:  # each canary is a unit of its own
        first = int(units.max()) + 1
        units = torch.cat([units, torch.arange(first, first + len(taken))])
    mixed = Records(
        together(train.inputs, take(canaries.inputs, taken)),
        torch.cat([train.labels, labels[taken]]),
        units,
    )
    return canaries, included, mixed


def _fall(site: Site, run: Rehearsal, canaries: Records) -> NDArray[np.float64]:
    """How much the loss of each canary's label fell from the initial to the released adapter."""
    bench, task = site.bench(run.plan), site.task(run.plan)
    head = site.trained_head(run.plan).cpu()
    cached = bench.cache(canaries.inputs)
    labels = aligned(task, canaries, bench.adapted.backbone)

    def losses(adapter: Tensors) -> torch.Tensor:
        with torch.no_grad():
            return task.loss(head(bench.features(adapter, cached)), labels)

    return (losses(run.initial) - losses(run.adapter)).double().numpy()
