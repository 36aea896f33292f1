"""Canaries in the real trainer: what T2 of PRIVACY.md sees.

A canary is one more unit of a site. It is sampled by the trainer's own Poisson sampling, together
with the site's records. Where it is in a batch, it adds a gradient of its own direction to the
clipped sum of the others, and the trainer's own code noises, steps and sends. Three kinds:

    summed    C * e_j is added to the summed clipped gradient, before noise
    clipped   1000 * C * e_j is the gradient of each of the canary's records, which go through the
              trainer's own averaging over units and its clipping
    head      like `summed`, in the head's part of the joint vector, which stays at the site

Where the plan protects all records of a patient, a `clipped` canary is one: it has as many records
as the largest unit of its site (`records_per_unit` at most), so that clipping of single records
would show.

e_j is one coordinate of the adapter or of the head; every canary has its own, so one run holds as
many independent experiments as it has canaries. The probe also notes what an attacker who knows
everyone but the canary knows: the clipped sum of all others, and who was in which batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft_client import site as site_module
from fedgraft_client import training as training_module
from fedgraft_client.dp import JointOptimizer
from fedgraft_client.gradients import Engine
from fedgraft_client.head import LinearHead
from fedgraft_client.prefix import Cached
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.runtime import Workbench
from fedgraft_client.site import Site
from fedgraft_common.fixed_point import FixedPoint, IntegerNoise, Vector
from fedgraft_common.mechanism import StepNoise
from fedgraft_common.messages import Counts, Tensors
from fedgraft_common.plan import Plan
from fedgraft_simulations.audit.replaced import replaced

SUMMED, CLIPPED, HEAD = 0, 1, 2
EXCESS = 1000.0
"""Norm of a `clipped` canary before clipping, in units of C."""


@dataclass(frozen=True, slots=True)
class Canaries:
    """m canaries.

    Attributes:
        coordinate: (m,) int64, in the joint vector of adapter, then head; each occurs once.
        kind: (m,) SUMMED, CLIPPED or HEAD.
        site: (m,) number of the site that holds it.
        included: (m,) the coins.
    """

    coordinate: NDArray[np.int64]
    kind: NDArray[np.int64]
    site: NDArray[np.int64]
    included: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.coordinate)


@dataclass(frozen=True, slots=True)
class Drawn:
    """One batch.

    Attributes:
        site: number of the site.
        round: number of the round.
        units: (b,) which of the site's units were in it: its own from 0, then canaries.
        of: units that could have been in it, canaries included.
    """

    site: int
    round: int
    units: NDArray[np.int64]
    of: int


@dataclass
class Probe:
    """What is put into a run, and what is noted there.

    Attributes:
        canaries: all of them.
        length: C, in whose unit canaries are measured.
        rounds: of the run.
        sites: of the run.
        others: (rounds, sites, m) what all others added to each canary's coordinate.
        head: (rounds, sites, m) the noisy joint gradient at HEAD canaries' coordinates.
        encoded: (rounds, sites, m) what was made into integers under secure aggregation, noise
            share included, at the adapter's canaries.
        opened: (rounds, m) what the server read of their sums.
        drawn: every batch.
        exact: (round, site) to the two counts of a released evaluation before noise.
        where: (m,) each adapter canary's place in a message; 0 for HEAD canaries.
    """

    canaries: Canaries
    length: float
    rounds: int
    sites: int
    where: NDArray[np.int64]
    encoded: NDArray[np.float32] = field(init=False)
    others: NDArray[np.float32] = field(init=False)
    head: NDArray[np.float32] = field(init=False)
    opened: list[NDArray[np.float64]] = field(init=False, default_factory=list)
    drawn: list[Drawn] = field(init=False, default_factory=list)
    exact: dict[tuple[int, int], Counts] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        shape = (self.rounds, self.sites, len(self.canaries))
        self.others, self.head, self.encoded = (np.zeros(shape, np.float32) for _ in range(3))

    def held_by(self, site: int) -> NDArray[np.int64]:
        """The included canaries of a site."""
        return np.flatnonzero(self.canaries.included & (self.canaries.site == site))

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Notes what the server reads of each sum meanwhile."""
        decode = FixedPoint.decode

        def noted(field: FixedPoint, total: Vector) -> NDArray[np.float64]:
            values = decode(field, total)
            self.opened.append(values[self.where])
            return values

        with replaced(FixedPoint, "decode", noted):
            yield

    @contextmanager
    def counting(self, site: int, number: int) -> Iterator[None]:
        """Notes what an evaluation counts meanwhile, before noise."""
        count: Callable[..., Counts] = vars(site_module)["exact_counts"]

        def noted(*args: Any) -> Counts:
            self.exact[number, site] = found = count(*args)
            return found

        with replaced(site_module, "exact_counts", noted):
            yield

    @contextmanager
    def watching(self, site: int) -> Iterator[None]:
        """Puts the site's canaries into whatever it trains on meanwhile."""
        train_round: Callable[..., Tensors] = vars(site_module)["train_round"]

        def probed(
            bench: Workbench, plan: Plan, number: int, adapter: Tensors, head: LinearHead,
            cached: Cached, labels: torch.Tensor, step: StepNoise, noise: NoiseSource,
            physical_batch: int, units: torch.Tensor | None = None,
            remember: Callable[[int], None] = lambda _: None, views: int = 1,
        ) -> Tensors:  # fmt: skip
            current[0] = number
            most = plan.privacy.records_per_unit
            place = Place(self, site, number, self.held_by(site), len(labels), units, most)
            with replaced(training_module, "JointOptimizer", partial(ProbedOptimizer, place)):
                return train_round(
                    bench, plan, number, adapter, head, place.mark(cached, views),
                    place.extend(labels), step, noise, physical_batch,
                    None if units is None else place.units, remember, views,
                )  # fmt: skip

        encode = FixedPoint.encode
        current = [0]

        def noted(field: FixedPoint, total: NDArray[Any], noise: IntegerNoise) -> Vector:
            vector = encode(field, total, noise)
            values = vector.view(f"int{field.bits}").astype(np.float64) / field.scale
            self.encoded[current[0] - 1, site] = values[self.where]
            return vector

        with (
            replaced(site_module, "train_round", probed),
            replaced(FixedPoint, "encode", noted),
        ):
            yield


class Place:
    """One site in one round.

    Args:
        probe: what is put in and where notes go.
        site: number of the site.
        number: of the round.
        mine: the canaries it holds.
        records: how many records of its own.
        units: (records,) the unit of each; None if every record is one.
        most: records of a canary that goes through clipping, at most.

    Attributes:
        owner: (canary records,) which of `mine` each one belongs to.
    """

    def __init__(
        self, probe: Probe, site: int, number: int, mine: NDArray[np.int64], records: int,
        units: torch.Tensor | None, most: int = 1,
    ) -> None:  # fmt: skip
        self.probe = probe
        self.site = site
        self.round = number
        self.mine = mine
        self.records = records
        own = torch.arange(records) if units is None else units
        largest = min(int(own.bincount().max()), most)
        sizes = np.where(probe.canaries.kind[mine] == CLIPPED, largest, 1)
        self.owner = np.repeat(np.arange(len(mine)), sizes)
        first = int(own.max()) + 1
        self.units = torch.cat([own, first + torch.from_numpy(self.owner)])
        self.unit_count = first + len(mine)

    def extend(self, tensor: torch.Tensor, views: int = 1) -> torch.Tensor:
        """Room for the records of every canary, or all their views."""
        return torch.cat([tensor, tensor.new_zeros(len(self.owner) * views, *tensor.shape[1:])])

    def mark(self, cached: Cached, views: int = 1) -> Cached:
        """The same, with a column that says which record each one is."""
        marks = torch.arange(self.records + len(self.owner)).repeat_interleave(views)
        return (*(self.extend(tensor, views) for tensor in cached), marks)

    def note_batch(self, marks: torch.Tensor) -> None:
        """Writes down who is in a batch."""
        drawn = self.units[marks].unique().numpy()
        self.probe.drawn.append(Drawn(self.site, self.round, drawn, self.unit_count))


class HugeGradients:
    """An `Engine`: each record's gradient is `EXCESS` times C at a coordinate of its own.

    Args:
        parameters: of the joint vector, in its order.
        size: of the one value that is not zero.
    """

    name = "canaries"

    def __init__(self, parameters: Sequence[Any], size: float) -> None:
        self._parameters = parameters
        self._size = size

    def __call__(self, cached: Cached, labels: torch.Tensor) -> None:
        """Sets `grad_sample`; the only cached tensor is (N,) each record's coordinate."""
        (coordinates,) = cached
        begin = 0
        for parameter in self._parameters:
            sample = parameter.new_zeros(len(coordinates), parameter.numel())
            inside = (coordinates >= begin) & (coordinates < begin + parameter.numel())
            rows = inside.nonzero()[:, 0]
            sample[rows, coordinates[rows] - begin] = self._size
            parameter.grad_sample = sample.view(-1, *parameter.shape)
            begin += parameter.numel()

    def close(self) -> None:
        """Nothing to close."""


class ProbedOptimizer(JointOptimizer):
    """The production optimiser, with canaries in its sum.

    Args:
        place: whose gradients these are.
        optimizer: as there.
        clipping_norm: as there.
        noise: as there.
    """

    def __init__(
        self, place: Place, optimizer: torch.optim.Optimizer, clipping_norm: float,
        noise: NoiseSource,
    ) -> None:  # fmt: skip
        super().__init__(optimizer, clipping_norm, noise)
        self._place = place
        self._here = np.zeros(0, dtype=np.int64)
        self._begins = np.cumsum([0, *(p.numel() for p in self.params)])
        self._physical_batch = 1

    def noisy_sum(
        self, engine: Engine, cached: Cached, labels: torch.Tensor, physical_batch: int,
        sizes: torch.Tensor | None = None,
    ) -> int:  # fmt: skip
        """Takes the canaries out of the batch, and notes who is in it."""
        *records, marks = cached
        place = self._place
        place.note_batch(marks)
        real = marks < place.records
        self._here = place.owner[(marks[~real].unique() - place.records).numpy()]
        self._physical_batch = physical_batch
        if sizes is not None:
            owners = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
            sizes = sizes[owners[real].unique()]
        return super().noisy_sum(
            engine, tuple(t[real] for t in records), labels[real], physical_batch, sizes
        )

    def add_noise(self) -> None:
        """Puts the batch's canaries in, lets the production code add its noise, and notes both."""
        probe, place = self._place.probe, self._place
        canaries = probe.canaries
        probe.others[place.round - 1, place.site] += self._at(canaries.coordinate, "summed_grad")
        here, sizes = np.unique(self._here, return_counts=True)
        here = place.mine[here]
        clipped = canaries.kind[here] == CLIPPED
        self._add_before_clipping(canaries.coordinate[here[clipped]], sizes[clipped])
        self._add_to_sum(canaries.coordinate[here[~clipped]])
        super().add_noise()
        head = canaries.kind == HEAD
        noisy = self._at(canaries.coordinate[head], "grad")
        probe.head[place.round - 1, place.site, head] += noisy

    def _add_before_clipping(
        self, coordinates: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> None:
        """The canaries' records through the production code, as units of these sizes."""
        if len(coordinates) == 0:
            return
        rows = torch.from_numpy(np.repeat(coordinates, sizes))
        engine = HugeGradients(self.params, EXCESS * self._place.probe.length)
        units = torch.from_numpy(sizes) if (sizes > 1).any() else None
        self._add(engine, (rows,), torch.zeros_like(rows), self._physical_batch, units)

    def _add_to_sum(self, coordinates: NDArray[np.int64]) -> None:
        for parameter, inside in map(self._find, coordinates):
            if parameter.summed_grad is None:
                parameter.summed_grad = torch.zeros_like(parameter)
            parameter.summed_grad.view(-1)[inside] += self._place.probe.length

    def _find(self, coordinate: int) -> tuple[Any, int]:
        """The parameter that a coordinate of the joint vector lies in, and where."""
        which = int(np.searchsorted(self._begins, coordinate, side="right")) - 1
        return self.params[which], int(coordinate - self._begins[which])

    def _at(self, coordinates: NDArray[np.int64], name: str) -> NDArray[np.float64]:
        """The values of an attribute of the parameters at coordinates of the joint vector."""
        flat = [
            torch.zeros(p.numel()) if getattr(p, name) is None else getattr(p, name).reshape(-1)
            for p in self.params
        ]
        return torch.cat([f.detach().cpu().double() for f in flat]).numpy()[coordinates]


class ProbedSite(Site):
    """A production site that a probe watches."""

    probe: Probe
    place: int

    def _round(self, *args: Any) -> Tensors:
        with self.probe.watching(self.place):
            return super()._round(*args)

    def _counts(
        self, bench: Workbench, plan: Plan, step: StepNoise, number: int, adapter: Tensors
    ) -> Counts:
        with self.probe.counting(self.place, number):
            return super()._counts(bench, plan, step, number, adapter)
