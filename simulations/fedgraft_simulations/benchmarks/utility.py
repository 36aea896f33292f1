"""What federating is worth: real data, few and many sites, small and large epsilon.

    python -m fedgraft_simulations.benchmarks.utility PNEUMONIA.npz RESNET.safetensors

A cell of the table is one `simulate` row: the production site and server code in one process. Where
heads are fixed it is `pooled` instead, the same steps with all sites' records in one call, which is
the same in distribution and much cheaper. A cell is finished once; its result is kept in
`--results`, and a run that was cut short goes on where it stopped. The step size of a federated row
is the best of three on a fourth seed, whose accuracies are not in the table.

Shapes of the study: two data sets, cut into 4, 16 and 48 sites; the more sites, the fewer records
each has. Accuracy is measured at every site on its own held-out records after the sealed refit,
and averaged over sites.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import typer

from fedgraft_client.head import initial_head
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.site import Site
from fedgraft_client.training import train_round
from fedgraft_common.files import write_atomically
from fedgraft_common.messages import Tensors, clamp
from fedgraft_common.plan import Plan
from fedgraft_server.aggregation import Aggregator
from fedgraft_simulations.benchmarks.cifar_resnet import convert
from fedgraft_simulations.simulate import correct_share, simulate
from fedgraft_simulations.sites import SimulatedSites

SITES = (4, 16, 48)
EPSILONS = (1.0, 2.0, 4.0, 8.0)
SEEDS = (0, 1, 2)
TUNING_SEED = 7
TUNED_AT = {1.0: 1.0, 2.0: 1.0, 4.0: 8.0, 8.0: 8.0}
"""Epsilon at which the step size was chosen, for each epsilon of the table."""
STEP_SIZES = (0.125, 0.5, 2.0)
RATE, ROUNDS, DELTA = 0.5, 30, 1e-5
PHYSICAL_BATCH = 128
ALONE = ("alone-head", "alone-adapter")
FEDERATED = (
    "none-fixed",
    "none-private",
    "local-fixed",
    "distributed-fixed",
    "distributed-private",
)


@dataclass(frozen=True, slots=True)
class Data:
    """One data set: where it is, which backbone suits it, and how many records are trained on."""

    name: str
    source: str
    backbone: str
    test_fraction: float
    train: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One way to train, on one data set, cut into so many sites, on one seed.

    Attributes:
        epsilon: 0 if nothing is promised or nothing leaves.
        step_size: of the adapter and of a private head; 0 for staying alone.
    """

    data: Data
    sites: int
    seed: int
    row: str
    epsilon: float = 0.0
    step_size: float = 0.0

    @property
    def key(self) -> str:
        """Its name among the results."""
        step = f"/{self.step_size:g}" if self.step_size else ""
        return f"{self.data.name}/{self.sites}/{self.seed}/{self.row}/{self.epsilon:g}{step}"

    @property
    def group(self) -> str:
        """Cells with the same sites share their caches."""
        return f"{self.data.name}-{self.sites}-{self.seed}"

    def plan(self) -> Plan:
        """What runs."""
        mechanism, _, head = self.row.partition("-")
        federated = mechanism != "alone"
        batch = max(1.0, RATE * self.data.train / self.sites)
        return Plan().replace(
            {
                "name": self.data.name,
                "seed": self.seed,
                "backbone.source": self.data.backbone,
                "adapter.method": "film",
                "adapter.layers": "last:2",
                "head.training": head if federated else "fixed",
                "head.scale": 16.0,
                "training.sample_rate": RATE,
                "training.expected_batch": batch,
                "training.learning_rate": self.step_size or 1.0,
                "training.head_learning_rate": self.step_size or 1.0,
                "privacy.mechanism": mechanism if federated else "distributed",
                "privacy.secure_aggregation": "summed",  # accuracy does not need the masks
                "privacy.epsilon": self.epsilon or 8.0,
                "privacy.delta": DELTA,
                "aggregation.strategy": "FedAvgM",
                "aggregation.options": {"server_momentum": 0.9},
                "rounds.count": ROUNDS,
                "data.source": self.data.source,
                "data.test_fraction": self.data.test_fraction,
                "sites.count": self.sites,
                "sites.partitioner": "DirichletPartitioner",
                "sites.options": {"alpha": 3.0, "min_partition_size": 8},
            }
        )


class Results:
    """Accuracies by cell, in a file that is written after each of them."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._found: dict[str, dict[str, Any]] = (
            json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        )

    def __contains__(self, cell: Cell) -> bool:
        return cell.key in self._found

    def accuracy(self, cell: Cell) -> float:
        """Mean over sites, after the refit."""
        return float(self._found[cell.key]["accuracy"])

    def add(self, cell: Cell, **facts: float) -> None:
        """Keeps what a cell found."""
        self._found[cell.key] = facts
        text = json.dumps(self._found, indent=1, sort_keys=True) + "\n"
        write_atomically(self.file, text.encode(), durable=False)


def run(cells: list[Cell], results: Results, work: Path) -> None:
    """Runs what is missing, group by group.

    Args:
        cells: in any order.
        results: filled.
        work: for stores and checkpoints; emptied again.
    """
    for group in dict.fromkeys(cell.group for cell in cells):
        missing = [c for c in cells if c.group == group and c not in results]
        for number, cell in enumerate(missing):
            if number == 0:  # sites that were cut off in a round would refuse a server that begins
                shutil.rmtree(work, ignore_errors=True)
            started = time.perf_counter()
            facts = measure(cell, work / group, work / str(number))
            facts["seconds"] = time.perf_counter() - started
            results.add(cell, **facts)
            print(cell.key, f"{facts['accuracy']:.4f}", f"{facts['seconds']:.1f} s", flush=True)
    shutil.rmtree(work, ignore_errors=True)


def measure(cell: Cell, stores: Path, work: Path) -> dict[str, float]:
    """One cell's accuracy, mean over sites."""
    plan = cell.plan()
    if cell.row.endswith("-fixed"):
        return {"accuracy": fmean(refitted(plan, SimulatedSites(plan, stores)))}
    rows = (cell.row if cell.row in ALONE else cell.row.partition("-")[0],)
    (row,) = simulate(plan, work, rows, site_directory=stores, curve_points=0).rows
    before = {"before_refit": fmean(row.trained)} if row.trained else {}
    return {"accuracy": fmean(row.refit), **before}


def refitted(plan: Plan, sites: SimulatedSites) -> list[float]:
    """Accuracy of each site's refitted head under the adapter that `pooled` trains."""
    everyone = sites.all()
    bench = everyone[0].runtime.workbench(plan)
    adapter = pooled(plan, everyone)
    heads = [site.refit(plan, adapter) for site in everyone]
    kept = [site.held_out for site in everyone if site.held_out is not None]
    tests = [site.cached_held_out(bench) for site in everyone]
    together = tuple(torch.cat(parts) for parts in zip(*tests, strict=True))
    features = bench.features(adapter, together).split([len(records) for records in kept])
    return [
        correct_share(head, part, records.labels)
        for head, part, records in zip(heads, features, kept, strict=True)
    ]


def pooled(plan: Plan, sites: list[Site]) -> Tensors:
    """The adapter of a federation with fixed heads, computed as if all records were at one site.

    The same in distribution as running every site by itself: with one step in a round, one q and
    one head, all sites' Poisson samples are one sample of all records, the server adds up their
    clipped gradients, and their noise is one Gaussian of n times the variance. For the local
    mechanism, too, because the mean of adapters one step away is a step along the sum.
    """
    bench, count = sites[0].runtime.workbench(plan), len(sites)
    step = sites[0].step(plan.replace({"aggregation.sites": count}))
    whole = replace(step, adapter_std=math.sqrt(count) * step.adapter_std)
    summed = plan.replace(
        {
            "privacy.mechanism": "distributed",
            "privacy.secure_aggregation": "summed",
            "aggregation.sites": count,
        }
    )
    cached = tuple(
        torch.cat(parts) for parts in zip(*(site.cached(bench) for site in sites), strict=True)
    )
    labels = torch.cat([site.records.labels for site in sites])
    head = initial_head(plan, sites[0].config.classes, bench.adapted.feature_dim)
    aggregator = Aggregator(summed, bench.adapted.schema)
    adapter = bench.initial
    for number in range(1, plan.rounds.count + 1):
        noise = NoiseSource.for_simulation("pooled", plan.hash, number)
        update = train_round(
            bench, summed, number, adapter, head, cached, labels, whole, noise, PHYSICAL_BATCH
        )
        adapter = clamp(aggregator.next_adapter(number, adapter, [update]), bench.initial)
    return adapter


def tuning_cells(data: Data) -> list[Cell]:
    """What the step sizes are chosen from.

    The noise of the distributed sum and the sum itself do not depend on the number of sites, so 16
    stand for all; the local mechanism's noise does.
    """
    return [
        Cell(data, sites, TUNING_SEED, row, epsilon, size)
        for row in FEDERATED
        for sites in (SITES if row.startswith("local") else (16,))
        for epsilon in ((0.0,) if row.startswith("none") else sorted(set(TUNED_AT.values())))
        for size in STEP_SIZES
    ]


def tuned(cell: Cell, results: Results) -> Cell:
    """The cell with the step size that did best on the tuning seed."""
    sites = cell.sites if cell.row.startswith("local") else 16
    epsilon = TUNED_AT.get(cell.epsilon, 0.0)
    tried = [Cell(cell.data, sites, TUNING_SEED, cell.row, epsilon, s) for s in STEP_SIZES]
    best = max(tried, key=results.accuracy)
    return Cell(cell.data, cell.sites, cell.seed, cell.row, cell.epsilon, best.step_size)


def table_cells(data: Data, sites: int, seed: int) -> Iterator[Cell]:
    """The cells of one cut of one data set, without their step sizes."""
    for row in ALONE:
        yield Cell(data, sites, seed, row)
    for row in FEDERATED:
        for epsilon in (0.0,) if row.startswith("none") else EPSILONS:
            yield Cell(data, sites, seed, row, epsilon)


def data_sets(pneumonia: Path, weights: Path, cache: Path) -> tuple[Data, Data]:
    """The digits with the embedded backbone, and chest X-rays with ResNet-20 from CIFAR-10.

    PneumoniaMNIST's training and validation images are put together: its test images come from
    another population, and what is asked here is not how a model travels. Every second image is
    taken, for time.
    """
    directory = convert(weights, cache / weights.stem)
    file = cache / "pneumonia.npz"
    if not file.exists():
        with np.load(pneumonia, allow_pickle=False) as found:
            images = np.concatenate([found["train_images"], found["val_images"]])
            labels = np.concatenate([found["train_labels"], found["val_labels"]]).ravel()
        np.savez(file, images=images[::2], labels=labels[::2])
    return (
        Data("digits", "sklearn:digits", "embedded:glyphs", 0.65, 628),
        Data("pneumonia", f"npz:{file}", f"dir:{directory}", 0.75, 654),
    )


def main(
    pneumonia: Annotated[Path, typer.Argument(help="PneumoniaMNIST as npz.")],
    weights: Annotated[Path, typer.Argument(help="ResNet-20 for CIFAR-10 as safetensors.")],
    results: Annotated[Path, typer.Option(help="JSON file; a run goes on from it.")] = Path(
        "runs/utility/results.json"
    ),
) -> None:
    """Measure every cell that is missing."""
    torch.set_num_threads(1)
    cache = results.parent / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    data = data_sets(pneumonia.resolve(), weights.resolve(), cache.resolve())
    found = Results(results)
    work = results.parent / "work"
    for one in data:
        run(tuning_cells(one), found, work)
    for seed in SEEDS:
        for one in data:
            for sites in SITES:
                cells = table_cells(one, sites, seed)
                run([c if c.row in ALONE else tuned(c, found) for c in cells], found, work)


if __name__ == "__main__":
    typer.run(main)
