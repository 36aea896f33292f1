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
from torch.nn import functional

from fedgraft_client.data import Records
from fedgraft_client.head import LinearHead
from fedgraft_client.runtime import Runtime
from fedgraft_client.site import Site, SiteConfig
from fedgraft_client.store import SiteStore
from fedgraft_common.messages import Tensors
from fedgraft_common.modality import take
from fedgraft_common.plan import Plan
from fedgraft_simulations.audit.candidates import together
from fedgraft_simulations.audit.part import AuditContext
from fedgraft_simulations.audit.rehearsal import Rehearsal
from fedgraft_simulations.partition import Share, partition

MOST = 320
"""Canaries over all sites."""
SHARE_OF_SITE = 1.0
"""Canaries of a site, as a share of its own training units; about half of them are included."""


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

    Args:
        context: plan and the auditor's randomness.
        directory: for the run's files; empty.
        on_round: told the number of each finished round.
        runtime: device and warm models.
    """
    runtime = runtime or Runtime(context.device)
    shares = partition(context.plan)
    random = context.random("black box")
    planted = [_plant(share, MOST // len(shares) + 1, random) for share in shares]

    def site(number: int) -> Site:
        share = shares[number]
        store = SiteStore(
            directory / "sites" / share.name, durable=False, unit=context.plan.privacy.unit
        )
        config = SiteConfig(share.name, share.classes, share.train.unit_count, simulated=True)
        return Site(config, planted[number][2], runtime, store, held_out=share.test)

    run = Rehearsal.run(context.plan, directory, site, on_round=on_round)
    scores, coins = [], []
    for one, (canaries, included, _) in zip(run.sites, planted, strict=True):
        scores.append(_fall(one, run.plan, run.initial, run.adapter, canaries))
        coins.append(included)
    return BlackBox(np.concatenate(scores), np.concatenate(coins))


def _plant(
    share: Share, most: int, random: np.random.Generator
) -> tuple[Records, NDArray[np.bool_], Records]:
    """Canaries of one site, their coins, and its training data with the included ones."""
    count = min(most, len(share.test), max(2, int(SHARE_OF_SITE * share.train.unit_count)))
    chosen = torch.from_numpy(random.permutation(len(share.test))[:count])
    classes = len(share.classes)
    shift = torch.from_numpy(random.integers(1, classes, size=count))
    labels = (share.test.labels[chosen] + shift) % classes
    canaries = Records(take(share.test.inputs, chosen), labels)
    included = random.random(count) < 0.5
    taken = torch.from_numpy(included)
    units = share.train.units
    if units is not None:  # each canary is a unit of its own
        first = int(units.max()) + 1
        units = torch.cat([units, torch.arange(first, first + int(taken.sum()))])
    mixed = Records(
        together(share.train.inputs, take(canaries.inputs, taken)),
        torch.cat([share.train.labels, labels[taken]]),
        units,
    )
    return canaries, included, mixed


def _fall(
    site: Site, plan: Plan, initial: Tensors, adapter: Tensors, canaries: Records
) -> NDArray[np.float64]:
    """How much the loss of each canary's label fell from the initial to the released adapter."""
    bench = site.bench(plan)
    head = site.trained_head(plan)
    cached = bench.cache(canaries.inputs)
    before = _losses(head, bench.features(initial, cached), canaries.labels)
    after = _losses(head, bench.features(adapter, cached), canaries.labels)
    return (before - after).double().numpy()


def _losses(head: LinearHead, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return functional.cross_entropy(head.cpu()(features), labels, reduction="none")
