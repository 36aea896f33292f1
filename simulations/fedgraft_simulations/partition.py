"""Which records a simulated site holds: a real data source, spread by a flwr-datasets partitioner.

A unit's records at one site are either all in training or all held out. If the partitioner puts
some at another site too, that site protects its own part of the unit by itself.

Shapes: N records, C channels, H x W pixels.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgraft_client.data import Records, load_arrays, number_units, to_images
from fedgraft_client.loaders import load
from fedgraft_client.tasks import build_task
from fedgraft_common.errors import DataError, PlanError
from fedgraft_common.modality import take
from fedgraft_common.plan import Plan
from fedgraft_common.reading import Reading, split_source
from fedgraft_common.task_spec import TaskSpec


@dataclass(frozen=True, slots=True)
class Share:
    """One simulated site's records.

    Attributes:
        name: of the site.
        classes: names of its classes.
        train: records it trains on.
        test: records held out to compare methods; they take no part in training.
        spec: its task; None: to tell the classes apart.
    """

    name: str
    classes: tuple[str, ...]
    train: Records
    test: Records
    spec: TaskSpec | None = None


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


@dataclass(frozen=True, slots=True)
class Pool:
    """All records of a simulation under one task, before they are spread.

    Attributes:
        records: of every site.
        names: of the classes of the source, by label number; empty for other tasks.
        spec: the task, if it is another than telling these classes apart.
        column: what the partitioner looks at, one value for each record.
        held_out: which records are for testing, if the source says so.
    """

    records: Records
    names: tuple[str, ...] = ()
    spec: TaskSpec | None = None
    column: list[Any] = field(default_factory=list)
    held_out: torch.Tensor | None = None


def partition(plan: Plan) -> list[Share]:
    """Spreads the plan's data over its sites.

    Raises:
        PlanError: no such partitioner, or options it does not take.
        DataError: the data source cannot be read, or a site is left without records.
    """
    tasks = plan.sites.tasks or ("",)
    pools = {task: load_pool(plan, task) for task in tasks}
    tests = {task: load_pool(plan, task, plan.data.test) for task in tasks if plan.data.test}
    first = pools[tasks[0]]
    if any(len(pool.records) != len(first.records) for pool in pools.values()):
        raise DataError(
            "data.tasks", "different records with labels", "labels of every task in every record",
            "Leave out what lacks one.",
        )  # fmt: skip
    kept: dict[str, Records] = {}  # one test set for like sites
    shares = []
    for site, (name, indices) in enumerate(_indices(plan, first.column)):
        task = tasks[site % len(tasks)]
        sets = plan.sites.label_sets
        label_set = sets[site % len(sets)] if sets else None
        pool, test = pools[task], tests.get(task)
        if pool.spec is None:
            names, groups = pool.names, _groups(plan, pool, label_set)
            pool = _regrouped(pool, names, groups)
            test = test and _regrouped(test, names, groups)
        share = _share(plan, name, pool, indices)
        if test is not None:
            key = f"{task} {label_set}"
            if key not in kept:
                kept[key] = _chosen(test.records, _known(test.records))
            share = replace(share, test=kept[key])
        shares.append(share)
    return shares


def load_pool(plan: Plan, task: str = "", source: str | None = None) -> Pool:
    """The records of a plan's data source.

    Args:
        plan: says what is in it.
        task: a name in `data.tasks`, or nothing to tell the source's classes apart.
        source: another source of the same form, such as `data.test`.

    Raises:
        DataError: it cannot be read.
    """
    data, unit = plan.data, plan.privacy.unit
    by = plan.sites.partition_by
    extra = tuple(name for name in (by if by != "label" else None, data.split) if name)
    spec = data.tasks[task].spec if task else TaskSpec(classes=data.classes)
    reading: Reading = data
    if task:
        own = data.tasks[task]
        changes = {"label": own.label or data.label, "label_map": own.label_map or data.label_map}
        reading = data.model_copy(update=changes)
    if not task and not data.classes:
        if split_source(source or data.source)[0] != "npz":
            raise DataError(
                "data.classes", "nothing", "names of the source's classes, in order",
                "List them in the plan.",
            )  # fmt: skip
        found = load_source(source or data.source, unit)
        names = tuple(str(n) for n in range(int(found.labels.max()) + 1))
        more = load_arrays(Path(split_source(source or data.source)[1]), extra) if extra else {}
        values = {name: array.tolist() for name, array in more.items()}
    else:
        loaded = load(source or data.source, reading, build_task(spec), unit, extra=extra)
        found, names, values = loaded.records, spec.classes if not task else (), loaded.extra
        build_task(spec).check(found.labels, loaded.origin)
    labels = found.labels.tolist() if found.labels.dim() == 1 else [0] * len(found)
    held_out = None
    if data.split and source is None:
        held_out = torch.tensor([_is_test(value, data.split) for value in values[data.split]])
    return Pool(found, names, spec if task else None, values.get(by, labels), held_out)


def _is_test(value: Any, column: str) -> bool:
    if str(value) not in ("train", "test"):
        raise DataError(
            f"data.split: {column}", value, "train or test", "Correct the column, or name another."
        )
    return str(value) == "test"


def _groups(plan: Plan, pool: Pool, label_set: str | None) -> tuple[tuple[int, ...], ...]:
    """The source's labels that make up each class of the sites with this label set."""
    present = sorted(int(k) for k in pool.records.labels.unique())
    allowed = present if not plan.data.classes else list(range(len(pool.names)))
    if label_set is None:
        return tuple((k,) for k in allowed)
    groups = tuple(
        tuple(_number(pool, label) for label in group) for group in plan.data.label_sets[label_set]
    )
    listed = [label for group in groups for label in group]
    for label in listed:
        if label not in allowed or listed.count(label) > 1:
            raise PlanError(
                "data.label_sets", label, "labels of the source, each in one class: "
                + ", ".join(pool.names[k] for k in allowed), "Correct the label set.",
            )  # fmt: skip
    return groups


def _regrouped(pool: Pool, names: tuple[str, ...], groups: tuple[tuple[int, ...], ...]) -> Pool:
    """A pool with these classes; records outside them get label -1."""
    most = max(int(pool.records.labels.max()), *(k for group in groups for k in group))
    new_label = torch.full((most + 1,), -1)
    for number, group in enumerate(groups):
        new_label[list(group)] = number
    classes = tuple("/".join(names[label] for label in group) for group in groups)
    labels = new_label[pool.records.labels]
    return replace(pool, records=replace(pool.records, labels=labels), names=classes)


def _number(pool: Pool, label: int | str) -> int:
    """A label of a set: a class's name, or its number."""
    if isinstance(label, str):
        if label not in pool.names:
            raise PlanError(
                "data.label_sets", label, ", ".join(pool.names), "Correct the label set."
            )
        return pool.names.index(label)
    return label


def _known(records: Records) -> torch.Tensor:
    """Which records a site with these classes has, as indices."""
    labels = records.labels
    if labels.dim() > 1 or labels.is_floating_point():
        return torch.arange(len(records))
    return (labels >= 0).nonzero().flatten()


def _chosen(records: Records, indices: torch.Tensor) -> Records:
    numbers = None if records.units is None else _numbered(records.units[indices])
    return Records(take(records.inputs, indices), records.labels[indices], numbers)


def _share(plan: Plan, name: str, pool: Pool, indices: torch.Tensor) -> Share:
    records = pool.records
    known = torch.zeros(len(records), dtype=torch.bool)
    known[_known(records)] = True
    mine = indices[known[indices]]
    units = torch.arange(len(mine)) if records.units is None else _numbered(records.units[mine])
    count = int(units.max()) + 1 if len(units) else 0
    if count < 2:
        what = "records" if records.units is None else f"values of {plan.privacy.unit}"
        raise DataError(
            f"site {name}: {what}", count, "at least two, one to train and one to test",
            "Use fewer sites, or partitioner options that give every site records.",
        )  # fmt: skip
    if pool.held_out is not None:
        train, test = mine[~pool.held_out[mine]], mine[pool.held_out[mine]]
        if len(train) == 0 or len(test) == 0:
            raise DataError(
                f"site {name}: {plan.data.split}", f"{len(train)} train, {len(test)} test",
                "at least one of each", "Correct the column, or spread the records otherwise.",
            )  # fmt: skip
    elif plan.data.test is not None:
        train, test = mine, mine[:0]
    else:
        generator = torch.Generator().manual_seed(plan.seed)
        place = torch.randperm(count, generator=generator).argsort()[units]  # one for a unit
        held_out = min(max(1, round(count * plan.data.test_fraction)), count - 1)
        mine, place = mine[place.argsort(stable=True)], place.sort().values
        test, train = mine[place < held_out], mine[place >= held_out]
    return Share(name, pool.names, _chosen(records, train), _chosen(records, test), pool.spec)


def _numbered(units: torch.Tensor) -> torch.Tensor:
    """The numbers of some records' units, made gapless again: (N,) from 0."""
    numbers: torch.Tensor = units.unique(return_inverse=True)[1]
    return numbers


def _indices(plan: Plan, column: list[Any]) -> list[tuple[str, torch.Tensor]]:
    """Name and records of each site."""
    from datasets import Dataset
    from flwr_datasets import partitioner

    name, count = plan.sites.partitioner, plan.sites.count
    by = plan.sites.partition_by
    known = sorted(n for n in partitioner.__all__ if n.endswith("Partitioner") and len(n) > 11)
    if name not in known:
        raise PlanError("sites.partitioner", name, ", ".join(known), "Choose one of these.")
    kind: Any = getattr(partitioner, name)
    takes = inspect.signature(kind).parameters
    given = {"num_partitions": count, "partition_by": by, "seed": plan.seed}
    settings = {k: v for k, v in given.items() if k in takes} | plan.sites.options
    table = Dataset.from_dict({by: column, "index": list(range(len(column)))})
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            warnings.simplefilter("ignore")
            spread = kind(**settings)
            spread.dataset = table
            if name == "NaturalIdPartitioner" and spread.num_partitions != count:
                raise PlanError(
                    "sites.count", count, f"{spread.num_partitions}, the values of {by}: "
                    + ", ".join(sorted(map(str, set(column)))), "Correct sites.count: a "
                    "NaturalIdPartitioner makes a site of each value.",
                )  # fmt: skip
            parts = [torch.tensor(spread.load_partition(i)["index"]) for i in range(count)]
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise PlanError(
            "sites.options", dict(plan.sites.options), f"what {name} takes ({error})",
            "Correct the options, or choose another number of sites.",
        ) from None  # fmt: skip
    if name != "NaturalIdPartitioner":
        return [(f"branch-{i:02d}", part) for i, part in enumerate(parts)]
    return [(re.sub(r"[^\w.-]+", "-", str(column[int(part[0])])), part) for part in parts]
