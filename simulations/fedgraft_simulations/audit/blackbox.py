"""Mislabelled records as canaries, and an attacker who has only the released model: T3.

Units that no site trained on, records or patients, get wrong labels; a fair coin decides for each
whether its site takes it, with all its records, into its training data. The run is the plan's own,
with nothing watched or changed but the data. The attacker scores each canary by how much the
released adapter lowered the loss of its wrong labels, under the head that the federation used at
that site; then T1 counts right guesses.

Shapes: m canaries, which are units, with N records together.
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
        scores: (m,) how much the wrong labels' loss fell, mean over a unit's records.
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
    units = (torch.arange(len(test)) if test.units is None else test.units).numpy()
    count = min(most, test.unit_count, max(2, train.unit_count))
    place = np.full(test.unit_count, -1)
    place[random.permutation(test.unit_count)[:count]] = np.arange(count)
    rows = np.flatnonzero(place[units] >= 0)
    owner = place[units[rows]]
    labels = test.labels[torch.from_numpy(rows)]
    if labels.dim() == 1 and labels.dtype == torch.int64 and len(share.classes) > 1:
        shift = torch.from_numpy(random.integers(1, len(share.classes), size=count)[owner])
        labels = (labels + shift) % len(share.classes)
    else:  # labels of another kind: each gets its neighbour's
        labels = labels.roll(1, dims=0)
    inputs = take(test.inputs, torch.from_numpy(rows))
    canaries = Records(inputs, labels, torch.from_numpy(owner))
    included = random.random(count) < 0.5
    taken = torch.from_numpy(np.flatnonzero(included[owner]))
    numbers = train.units
    if numbers is not None:
        own = np.unique(owner[taken], return_inverse=True)[1]
        numbers = torch.cat([numbers, int(numbers.max()) + 1 + torch.from_numpy(own)])
    mixed = Records(
        together(train.inputs, take(inputs, taken)),
        torch.cat([train.labels, labels[taken]]),
        numbers,
    )
    return canaries, included, mixed


def _fall(site: Site, run: Rehearsal, canaries: Records) -> NDArray[np.float64]:
    """(m,) how much the loss of a canary's labels fell from the initial to the released adapter."""
    assert canaries.units is not None  # noqa: S101 - see `_plant`
    bench, task = site.bench(run.plan), site.task(run.plan)
    head = site.trained_head(run.plan).cpu()
    cached = bench.cache(canaries.inputs)
    labels = aligned(task, canaries, bench.adapted.backbone)

    def losses(adapter: Tensors) -> torch.Tensor:
        with torch.no_grad():
            return task.loss(head(bench.features(adapter, cached)), labels)

    fell = losses(run.initial) - losses(run.adapter)
    return (torch.bincount(canaries.units, fell.double()) / torch.bincount(canaries.units)).numpy()
