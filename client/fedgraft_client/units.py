"""Which records a step uses when the unit of privacy is a column: sample units, then records.

Formal guarantee, add or remove one unit: each unit is in a step with probability q, independently
of all others and of how many records it has; the records that stand for it are chosen among its
own alone. So a step on the chosen records is a Poisson-subsampled mechanism over units if what is
released changes by a bounded amount with all chosen records of one unit (`dp.py` sees to that).

Shapes: N records, U units of a site; B units in a step's batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft_client.randomness import NoiseSource
from fedgraft_common.errors import PrivacyError
from fedgraft_common.plan import Plan


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's records, those of a unit next to each other.

    Attributes:
        records: (n,) int64 indices of the site's records.
        sizes: (B,) int64, how many of them belong to each sampled unit, at least 1; None if every
            record is a unit.
    """

    records: torch.Tensor
    sizes: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class UnitIndex:
    """Where each unit's records are.

    Attributes:
        order: (N,) the records sorted by unit.
        starts: (U,) where a unit's records begin in `order`.
        counts: (U,) how many records a unit has.
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, units: torch.Tensor) -> UnitIndex:
        """The index of `Records.units`: (N,) int64, numbered 0 to U-1, every number in use."""
        numbers = units.numpy()
        counts = np.bincount(numbers)
        return cls(np.argsort(numbers, kind="stable"), np.cumsum(counts) - counts, counts)

    def sample(self, noise: NoiseSource, rate: float, most: int) -> Batch:
        """A Poisson sample of units, each with at most `most` records chosen afresh.

        Args:
            noise: randomness of both choices.
            rate: q, the probability that a unit is in.
            most: K, the cap on the records of one unit.

        Raises:
            PrivacyError: rate is no probability, or most is below 1.
        """
        sampled = noise.poisson_sample(len(self.counts), rate)
        counts = self.counts[sampled]
        groups = np.repeat(np.arange(len(sampled)), counts)
        begins = np.cumsum(counts) - counts
        inside = np.arange(len(groups)) - begins[groups]
        candidates = self.order[self.starts[sampled][groups] + inside]
        chosen = noise.choose(groups, most)
        return Batch(
            torch.from_numpy(candidates[chosen]), torch.from_numpy(np.minimum(counts, most))
        )


def unit_index(plan: Plan, units: torch.Tensor | None, site: str) -> UnitIndex | None:
    """The index of what a plan protects at a site; None if that is a record.

    Args:
        plan: names the unit.
        units: (N,) number of each record's unit, if the site's records have such a column.
        site: its name, for the error.

    Raises:
        PrivacyError: the plan protects a column that the site's records do not have.
    """
    if plan.privacy.unit == "record":
        return None
    if units is None:
        raise PrivacyError(
            "privacy.unit", plan.privacy.unit,
            f"record, for the records of site {site} do not say which unit they belong to",
            "Give the data source this column, or ask for a plan that protects single records.",
        )  # fmt: skip
    return UnitIndex.of(units)


def pack(sizes: torch.Tensor, physical_batch: int) -> list[int]:
    """How many units go into each physical batch, so that no unit is split over two.

    Args:
        sizes: (B,) records of each unit.
        physical_batch: records of a physical batch; exceeded only by a unit that alone has more.

    Returns:
        Counts of consecutive units that add up to B.
    """
    parts: list[int] = []
    held = 0
    for size in sizes.tolist():
        if parts and held + size <= physical_batch:
            parts[-1] += 1
            held += size
        else:
            parts.append(1)
            held = size
    return parts
