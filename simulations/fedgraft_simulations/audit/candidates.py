"""Everyone an attacker asks about: the units of all sites, those that took part and those held out.

What an audit knows and an attacker does not is only `members`. Units of one site stay together,
for a site's head is its own.

Shapes: N records of a site, U units of a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft_client.data import Records
from fedgraft_client.head import LinearHead
from fedgraft_client.prefix import Cached
from fedgraft_client.runtime import Workbench
from fedgraft_client.tasks import build_task
from fedgraft_client.tasks.alignment import aligned
from fedgraft_common.messages import Tensors
from fedgraft_common.modality import Raw, is_pair, take
from fedgraft_common.task_spec import TaskSpec
from fedgraft_simulations.partition import Share


@dataclass(frozen=True)
class Candidates:
    """The candidates of one site.

    Attributes:
        share: what the site holds.
        bench: the plan's model, with the features of the site's task.
        records: its training records, then those held out; `units` always numbered.
        labels: (N, ...) as the task's loss takes them.
        cached: what the frozen prefix keeps of them.
        members: (U,) whether a unit was trained on.
    """

    share: Share
    bench: Workbench
    records: Records
    labels: torch.Tensor
    cached: Cached
    members: NDArray[np.bool_]

    @classmethod
    def of(cls, share: Share, bench: Workbench) -> Candidates:
        """The candidates of a share, under a plan's model."""
        train, test = share.train, share.test
        first, second = _units(train), _units(test)
        records = Records(
            together(train.inputs, test.inputs),
            torch.cat([train.labels, test.labels]),
            torch.cat([first, second + train.unit_count]),
        )
        members = np.arange(records.unit_count) < train.unit_count
        task = build_task(share.spec or TaskSpec(classes=share.classes))
        labels = aligned(task, records, bench.adapted.backbone)
        return cls(share, bench, records, labels, bench.cache(records.inputs), members)

    @cached_property
    def units(self) -> NDArray[np.int64]:
        """(N,) the unit of each record."""
        assert self.records.units is not None  # noqa: S101 - see `of`
        return self.records.units.numpy()

    def choose(self, random: np.random.Generator) -> NDArray[np.bool_]:
        """(U,) as many units as the site trained on, chosen at random among all."""
        chosen = np.zeros(len(self.members), dtype=bool)
        chosen[random.permutation(len(chosen))[: self.members.sum()]] = True
        return chosen

    def taken(self, chosen: NDArray[np.bool_]) -> Records:
        """The records of the chosen units, as a site holds them."""
        rows = torch.from_numpy(np.flatnonzero(chosen[self.units]))
        units = None
        if self.share.train.units is not None:
            _, units = torch.from_numpy(self.units)[rows].unique(return_inverse=True)
        return Records(take(self.records.inputs, rows), self.records.labels[rows], units)

    def per_unit(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The mean over each unit's records: (N,) to (U,)."""
        total = np.bincount(self.units, weights=values)
        return total / np.bincount(self.units)

    def confidence(self, adapter: Tensors, head: LinearHead) -> NDArray[np.float64]:
        """(U,) how sure a model is of the label, mean over records: see `log_probability`."""
        return self.per_unit(log_probability(head, self.features(adapter), self.labels))

    def features(self, adapter: Tensors) -> torch.Tensor:
        """(N, ...) under an adapter."""
        return self.bench.features(adapter, self.cached)


def log_probability(
    head: LinearHead, features: torch.Tensor, labels: torch.Tensor
) -> NDArray[np.float64]:
    """(N,) log-probability of each record's own label: minus the loss of the head's task.

    A task whose loss is no probability gives a number that serves as one: at most 0, larger for
    records that the model fits better.
    """
    with torch.no_grad():
        loss = head.task.loss(head.cpu()(features).double(), labels)
    return -loss.clamp(min=0).numpy()


def together(first: Raw, second: Raw) -> Raw:
    """Records of one modality, one after the other."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.cat([first, second])
    if is_pair(first) and is_pair(second):
        return torch.cat([first[0], second[0]]), [*first[1], *second[1]]
    return [*first, *second]


def _units(records: Records) -> torch.Tensor:
    return torch.arange(len(records)) if records.units is None else records.units
