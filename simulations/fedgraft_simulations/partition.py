"""Which records a simulated site holds: a real data source, spread by a flwr-datasets partitioner.

A unit's records at one site are either all in training or all held out. If the partitioner puts
some at another site too, that site protects its own part of the unit by itself.

Shapes: N records, C channels, H x W pixels.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgraft_client.data import Records, load_arrays, number_units, to_images
from fedgraft_common.errors import DataError, PlanError
from fedgraft_common.modality import take
from fedgraft_common.plan import Plan


@dataclass(frozen=True, slots=True)
class Share:
    """One simulated site's records.

    Attributes:
        name: of the site.
        classes: names of its classes.
        train: records it trains on.
        test: records held out to compare methods; they take no part in training.
    """

    name: str
    classes: tuple[str, ...]
    train: Records
    test: Records


def load_source(source: str, unit: str = "record") -> Records:
    """All records of a plan's data source.

    Args:
        source: `sklearn:digits` or `npz:PATH`.
        unit: `record`, or the array of the file that names the unit of each record.

    Raises:
        DataError: no such file, not an npz file, or arrays that are missing or misshapen.
    """
    if source == "sklearn:digits":
        if unit != "record":
            raise DataError(
                "privacy.unit", unit, "record, for the digits of sklearn have no columns",
                'Set privacy.unit = "record", or take a data source with this column.',
            )  # fmt: skip
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        return Records(images, torch.tensor(digits.target, dtype=torch.int64))
    path = Path(source.removeprefix("npz:"))
    arrays = load_arrays(path, ("images", "labels"))
    images, labels = to_images(arrays["images"], path), arrays["labels"]
    if labels.ndim != 1 or len(labels) != len(images) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: labels", f"{labels.dtype}{labels.shape}",
            f"{len(images)} integers, one for each image", "Write one label for each image.",
        )  # fmt: skip
    if len(labels) == 0 or labels.min() < 0:
        raise DataError(
            f"{path}: labels", "none" if len(labels) == 0 else int(labels.min()),
            "at least one record, labels from 0", "Number the classes from 0.",
        )  # fmt: skip
    units = None if unit == "record" else _load_units(path, unit, len(images))
    return Records(images, torch.tensor(labels.astype(np.int64)), units)


def _load_units(path: Path, unit: str, count: int) -> torch.Tensor:
    try:
        column = load_arrays(path, (unit,))[unit]
    except DataError:
        raise DataError(
            f"{path}: {unit}", "no such array",
            f"{count} strings or integers, for privacy.unit names this column",
            'Write it with numpy.savez(path, images=..., ...), or set privacy.unit = "record".',
        ) from None  # fmt: skip
    units = number_units(column, f"{path}: {unit}")
    if len(units) != count:
        raise DataError(
            f"{path}: {unit}", f"{len(units)} identifiers", f"{count}, one for each image",
            "Write one identifier for each image.",
        )  # fmt: skip
    return units


def partition(plan: Plan) -> list[Share]:
    """Spreads the plan's data over its sites.

    Raises:
        PlanError: no such partitioner, or options it does not take.
        DataError: the data source cannot be read, or a site is left without records.
    """
    records = load_source(plan.data.source, plan.privacy.unit)
    names = tuple(str(value) for value in records.labels.unique().tolist())
    shares = []
    for site, indices in enumerate(_indices(plan, records.labels)):
        label_set = (
            plan.sites.label_sets[site % len(plan.sites.label_sets)]
            if (plan.sites.label_sets)
            else None
        )
        groups = plan.data.label_sets[label_set] if label_set else tuple(
            (int(name),) for name in names
        )  # fmt: skip
        classes = tuple("/".join(str(label) for label in group) for group in groups)
        name = f"branch-{site:02d}"
        shares.append(_share(plan, name, classes, groups, records, indices))
    return shares


def _share(
    plan: Plan,
    name: str,
    classes: tuple[str, ...],
    groups: tuple[tuple[int, ...], ...],
    records: Records,
    indices: torch.Tensor,
) -> Share:
    listed = [label for group in groups for label in group]
    known = set(records.labels.unique().tolist())
    for label in listed:
        if label not in known or listed.count(label) > 1:
            raise PlanError(
                "data.label_sets", label, "labels of the source, each in one class: "
                + ", ".join(map(str, sorted(known))), "Correct the label set.",
            )  # fmt: skip
    new_label = torch.full((int(records.labels.max()) + 1,), -1)
    for number, group in enumerate(groups):
        new_label[list(group)] = number
    mine = indices[new_label[records.labels[indices]] >= 0]
    units = torch.arange(len(mine)) if records.units is None else _numbered(records.units[mine])
    count = int(units.max()) + 1 if len(units) else 0
    if count < 2:
        what = "records" if records.units is None else f"values of {plan.privacy.unit}"
        raise DataError(
            f"site {name}: {what}", count, "at least two, one to train and one to test",
            "Use fewer sites, or partitioner options that give every site records.",
        )  # fmt: skip
    generator = torch.Generator().manual_seed(plan.seed)
    place = torch.randperm(count, generator=generator).argsort()[units]  # one place for a unit
    held_out = min(max(1, round(count * plan.data.test_fraction)), count - 1)
    mine, place = mine[place.argsort(stable=True)], place.sort().values
    test, train = mine[place < held_out], mine[place >= held_out]

    def held(indices: torch.Tensor) -> Records:
        numbers = None if records.units is None else _numbered(records.units[indices])
        return Records(take(records.inputs, indices), new_label[records.labels[indices]], numbers)

    return Share(name, classes, held(train), held(test))


def _numbered(units: torch.Tensor) -> torch.Tensor:
    """The numbers of some records' units, made gapless again: (N,) from 0."""
    numbers: torch.Tensor = units.unique(return_inverse=True)[1]
    return numbers


def _indices(plan: Plan, labels: torch.Tensor) -> list[torch.Tensor]:
    from datasets import Dataset
    from flwr_datasets import partitioner

    name, count = plan.sites.partitioner, plan.sites.count
    known = sorted(n for n in partitioner.__all__ if n.endswith("Partitioner") and len(n) > 11)
    if name not in known:
        raise PlanError("sites.partitioner", name, ", ".join(known), "Choose one of these.")
    kind: Any = getattr(partitioner, name)
    takes = inspect.signature(kind).parameters
    given = {"num_partitions": count, "partition_by": "label", "seed": plan.seed}
    settings = {k: v for k, v in given.items() if k in takes} | plan.sites.options
    table = Dataset.from_dict({"label": labels.tolist(), "index": list(range(len(labels)))})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spread = kind(**settings)
            spread.dataset = table
            return [torch.tensor(spread.load_partition(i)["index"]) for i in range(count)]
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise PlanError(
            "sites.options", dict(plan.sites.options), f"what {name} takes ({error})",
            "Correct the options, or choose another number of sites.",
        ) from None  # fmt: skip
