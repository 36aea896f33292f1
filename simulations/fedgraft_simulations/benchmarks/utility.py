"""What federating is worth: real data, few and many sites, small and large epsilon.

    python -m fedgraft_simulations.benchmarks.utility PNEUMONIA.npz RESNET.safetensors

Sites, models, DP-SGD, aggregation and refit are the production ones; all sites' steps are made in
one call (`pooled`, the same in distribution). A cell is finished once; its result is kept in
`--results`, and a run that was cut short goes on where it stopped. The step size of a federated row
is the best of four on a fourth seed, whose accuracies are not in the table.

Shapes of the study: two data sets, cut into 4, 16 and 48 sites; the more sites, the fewer records
each has. Accuracy is measured at every site on its own held-out records after the sealed refit,
and averaged over sites.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import typer
from sklearn.datasets import load_sample_images
from sklearn.metrics import accuracy_score
from torch.nn import functional

from fedgraft_client.head import LinearHead
from fedgraft_client.prefix import Cached
from fedgraft_client.refit import refit_head
from fedgraft_client.runtime import Workbench
from fedgraft_client.site import Site
from fedgraft_common.backbone import load_backbone
from fedgraft_common.files import write_atomically
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Backbone, Plan
from fedgraft_simulations.alone import fit_alone, train_alone
from fedgraft_simulations.benchmarks.pooled import pooled
from fedgraft_simulations.sites import SimulatedSites

SITES = (4, 16, 48)
EPSILONS = (1.0, 2.0, 4.0, 8.0)
SEEDS = (0, 1, 2)
TUNING_SEED = 7
TUNED_AT = {1.0: 1.0, 2.0: 1.0, 4.0: 8.0, 8.0: 8.0}
"""Epsilon at which the step size was chosen, for each epsilon of the table."""
STEP_SIZES = (0.125, 0.5, 2.0, 8.0)
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


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """One data set: where it is, which backbone suits it, and how many records are trained on."""

    name: str
    backbone: dict[str, str]
    source: str
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
                **{f"backbone.{key}": value for key, value in self.data.backbone.items()},
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
                "privacy.tolerated_colluders": 1,  # a curious site knows its own share of the noise
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
    """Runs what is missing, group by group; `work` is emptied again."""
    for group in dict.fromkeys(cell.group for cell in cells):
        for cell in cells:
            if cell.group != group or cell in results:
                continue
            started = time.perf_counter()
            facts = measure(cell, work / group)
            facts["seconds"] = time.perf_counter() - started
            results.add(cell, **facts)
            print(cell.key, f"{facts['accuracy']:.4f}", f"{facts['seconds']:.1f} s", flush=True)
        cached_test.cache_clear()
    shutil.rmtree(work, ignore_errors=True)


def measure(cell: Cell, stores: Path) -> dict[str, float]:
    """One cell's accuracy after the refit and, of a federation, before it; means over sites."""
    plan = cell.plan()
    sites = SimulatedSites(plan, stores).all()
    bench = sites[0].bench(plan)
    before: dict[str, float] = {}
    if cell.row in ALONE:
        adapters = [bench.initial if cell.row == "alone-head" else None for _ in sites]
        trained = [
            train_alone(site, plan) if adapter is None else adapter
            for site, adapter in zip(sites, adapters, strict=True)
        ]
        heads = [fit_alone(s, plan, adapter) for s, adapter in zip(sites, trained, strict=True)]
    else:
        adapter, left = pooled(plan, sites)
        trained = [adapter] * len(sites)
        before["before_refit"] = fmean(scores(bench, sites, trained, left))
        heads = [
            refit_head(bench.features(adapter, site.cached(bench)), site.labels(bench), head)
            for site, head in zip(sites, left, strict=True)
        ]
    return {"accuracy": fmean(scores(bench, sites, trained, heads)), **before}


def scores(
    bench: Workbench, sites: list[Site], adapters: list[Tensors], heads: list[LinearHead]
) -> list[float]:
    """Each site's accuracy on its held-out records."""
    found = []
    for site, adapter, head in zip(sites, adapters, heads, strict=True):
        assert site.held_out is not None  # noqa: S101 - simulated sites have some
        features = bench.features(adapter, cached_test(bench, site))
        with torch.no_grad():
            guesses = head(features).argmax(dim=1)
        found.append(float(accuracy_score(site.held_out.labels.numpy(), guesses.numpy())))
    return found


@lru_cache(maxsize=64)
def cached_test(bench: Workbench, site: Site) -> Cached:
    """What the frozen prefix makes of a site's held-out records."""
    assert site.held_out is not None  # noqa: S101 - as above
    return bench.cache(site.held_out.inputs)


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
    file = cache / "pneumonia.npz"
    if not file.exists():
        with np.load(pneumonia, allow_pickle=False) as found:
            images = np.concatenate([found["train_images"], found["val_images"]])
            labels = np.concatenate([found["train_labels"], found["val_labels"]]).ravel()
        np.savez(file, images=images[::2], labels=labels[::2])
    return (
        Data("digits", {"source": "embedded:glyphs"}, "sklearn:digits", 0.65, 628),
        Data("pneumonia", centred(weights, cache / "resnet20"), f"npz:{file}", 0.75, 654),
    )


def centred(weights: Path, directory: Path) -> dict[str, str]:
    """A CIFAR ResNet-20 with a manifest that gives its features a mean and a spread.

    Features behind a ReLU all point one way, and a fixed head wants them centred. CIFAR-10 itself
    is not at hand; random crops of scikit-learn's two sample photographs are public, too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    copy = directory / "resnet20.safetensors"
    pinned = hashlib.sha256(weights.read_bytes()).hexdigest()
    keys = {"source": "cifar-resnet:20", "weights": str(copy), "sha256": pinned}
    if (directory / "manifest.json").exists():
        return keys
    shutil.copy(weights, copy)
    backbone = load_backbone(Backbone.model_validate(keys))
    with torch.no_grad():
        inputs = backbone.prepare(photographs(2048))
        parts = zip(*(tensor.split(256) for tensor in inputs), strict=True)
        features = torch.cat([backbone.features(backbone.model, part) for part in parts])
    manifest = {
        "name": "cifar-resnet:20",
        "licence": "BSD-2-Clause",
        "feature_mean": features.mean(dim=0).tolist(),
        "feature_std": features.std(dim=0).clamp(min=1e-3).tolist(),
    }
    (directory / "manifest.json").write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    return keys


def photographs(count: int, size: int = 32) -> torch.Tensor:
    """Random square crops of scikit-learn's two photographs: (count, 3, size, size) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    crops = []
    for number in range(count):
        picture = pictures[number % len(pictures)]
        side = int(torch.randint(48, 385, (1,), generator=generator))
        top, left = (
            int(torch.randint(0, length - side + 1, (1,), generator=generator))
            for length in picture.shape[1:]
        )
        crop = picture[None, :, top : top + side, left : left + side]
        crops.append(functional.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    return torch.cat(crops)


def main(
    pneumonia: Annotated[Path, typer.Argument(help="PneumoniaMNIST as npz.")],
    weights: Annotated[Path, typer.Argument(help="ResNet-20 for CIFAR-10 as safetensors.")],
    results: Annotated[Path, typer.Option(help="JSON file; a run goes on from it.")] = Path(
        "runs/utility/results.json"
    ),
) -> None:
    """Measure every cell that is missing."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
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
