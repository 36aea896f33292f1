"""All records in one place: what a federation would like to come near to.

The pool is trained by the production site under the local mechanism (or none), with the plan's
sample rate and epsilon, so its noise weighs as many times less as it has more records. Afterwards
each site refits its head to its own records, as in every other row: the rows differ in how the
adapter was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Context

from fedgraft_client.data import Records
from fedgraft_client.runtime import Runtime
from fedgraft_client.site import Site, SiteConfig
from fedgraft_client.store import SiteStore
from fedgraft_common.errors import PlanError
from fedgraft_common.modality import Raw, is_pair
from fedgraft_common.plan import Plan
from fedgraft_simulations.partition import Share


@dataclass(frozen=True, slots=True)
class Centre:
    """The one place.

    Attributes:
        plan: what it trains under.
        site: holds all records.
    """

    plan: Plan
    site: Site

    def __call__(self, context: Context) -> Site:
        """The site that every message is for."""
        return self.site


def pooled(plan: Plan, key: str, shares: list[Share], directory: Path, device: str) -> Centre:
    """Pools the training records of all sites.

    Args:
        plan: of the federation.
        key: `central` for DP, `central-none` for none.
        shares: of the sites, all with the same task.
        directory: where the place keeps its ledger and its head.
        device: where it trains.

    Raises:
        PlanError: the sites predict different things.
    """
    first = shares[0]
    if any((share.classes, share.spec) != (first.classes, first.spec) for share in shares):
        raise PlanError(
            "--rows", key, "rows without a pool: these sites have different tasks",
            "Leave out central and central-none.",
        )  # fmt: skip
    mechanism = "local" if key == "central" else "none"
    changes = {
        **getattr(plan.comparison, mechanism),
        "privacy.mechanism": mechanism,
        "aggregation.sites": 1,
        "aggregation.minimum_sites": 1,
        "training.expected_batch": plan.training.expected_batch * len(shares),
    }
    own = plan.replace(changes)
    records = _together([share.train for share in shares])
    name = f"pool-{mechanism}"
    config = SiteConfig(name, first.classes, records.unit_count, simulated=True, task=first.spec)
    store = SiteStore(directory / "sites" / name, durable=False, unit=plan.privacy.unit)
    return Centre(own, Site(config, records, Runtime(device), store))


def _together(parts: list[Records]) -> Records:
    labels = torch.cat([part.labels for part in parts])
    units: list[torch.Tensor] = []
    start = 0
    for part in parts:
        if part.units is not None:
            units.append(part.units + start)
            start += part.unit_count
    inputs = [part.inputs for part in parts]
    return Records(_inputs(inputs), labels, torch.cat(units) if units else None)


def _inputs(parts: list[Raw]) -> Raw:
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)  # type: ignore[arg-type]
    if is_pair(parts[0]):
        images = torch.cat([part[0] for part in parts])  # type: ignore[misc]
        return images, [text for part in parts for text in part[1]]
    return [text for part in parts for text in part]  # type: ignore[misc]
