"""One step of DP-SGD over the joint vector of adapter and head (Abadi et al. 2016, algorithm 1).

Formal guarantee: one `noisy_sum` of a batch whose units were sampled by Poisson with rate q is a
Poisson-subsampled Gaussian mechanism with noise multiplier sigma, for adding or removing one unit
(proof: `deploy/decisions/0004-sensitivity-and-neighbours.md`). A unit is a record, or all records
that share a value of a column; its gradient is then the average over the records chosen for it.
Each unit's gradient of adapter and head together is clipped to L2 norm C, so the joint sum has
sensitivity C, whatever the number of records; independent Gaussian noise is added to every
coordinate. Two standard deviations are allowed because the distributed mechanism adds only a
share of the adapter's noise at each site (PRIVACY.md, "Two mechanisms"). The denominator is a
public constant of the plan and is applied by the caller.

Edge cases: an empty batch releases pure noise. A gradient of zero is left as it is. A record whose
gradient is not finite counts as one of its unit with a gradient of zero. An infinite C and a noise
of zero are the mechanism `none`, which promises nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from opacus.optimizers import DPOptimizer

from fedgraft_client.gradients import Engine
from fedgraft_client.prefix import Cached
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.units import pack

SMALLEST = 8
"""Records that go through the model at once at least."""


class JointOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' flat clipping over all parameters, with noise from Fedgraft's own source.

    Args:
        optimizer: plain SGD whose groups each carry `noise_std`, the standard deviation of the
            noise on a coordinate of the gradient sum (same unit as C). Made afresh every round:
            wrapping an optimiser that was already wrapped would clip and noise twice.
        clipping_norm: C.
        noise: where noise comes from.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, clipping_norm: float, noise: NoiseSource
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=0.0,  # unused: add_noise below reads each group's noise_std
            max_grad_norm=clipping_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self._noise = noise

    def add_noise(self) -> None:
        """Sets `grad` to the clipped sum plus noise, added in float64."""
        for group in self.param_groups:
            parameters: list[Any] = group["params"]  # Opacus hangs summed_grad on each
            sizes = [p.numel() for p in parameters]
            if not sizes:
                continue
            draw = self._noise.gaussian((sum(sizes),), group["noise_std"])
            for parameter, part in zip(parameters, draw.split(sizes), strict=True):
                total = part.view(parameter.shape).to(parameter.device)
                if parameter.summed_grad is not None:
                    total = total + parameter.summed_grad.double()
                parameter.grad = total.to(parameter.dtype)

    def noisy_sum(
        self,
        engine: Engine,
        cached: Cached,
        labels: torch.Tensor,
        physical_batch: int,
        sizes: torch.Tensor | None = None,
    ) -> None:
        """Clips, sums and noises the gradients of one Poisson batch into each `grad`.

        Args:
            engine: computes per-example gradients.
            cached: the batch's tensors, N records first; N may be 0.
            labels: (N,) int64.
            physical_batch: records whose gradients are held in memory at once; it changes
                neither the sum nor the noise.
            sizes: (B,) int64 on the CPU, how many consecutive records each unit has, at least 1
                and N together; None if every record is a unit. No unit is split over two physical
                batches, so one with more records than `physical_batch` makes a larger one.
        """
        self.zero_grad(set_to_none=True)
        self._clear(("grad_sample", "summed_grad"))
        for part, units in _parts(len(labels), physical_batch, sizes):
            self._gradients(engine, tuple(tensor[part] for tensor in cached), labels[part])
            self._contain()
            if units is not None:
                self._average(units)
            self.clip_and_accumulate()
            self._clear(("grad_sample",))
        self.add_noise()
        self._clear(("summed_grad",))

    def _gradients(self, engine: Engine, cached: Cached, labels: torch.Tensor) -> None:
        """Per-example gradients; a very small batch is filled up with copies, which are dropped.

        Matrix kernels take other paths for one to three rows, so the last bits of one record's
        gradient would tell how many others are there.
        """
        count = len(labels)
        missing = SMALLEST - count
        if missing > 0:
            fill = torch.cat([torch.arange(count), torch.zeros(missing, dtype=torch.int64)])
            cached = tuple(tensor[fill.to(tensor.device)] for tensor in cached)
            labels = labels[fill.to(labels.device)]
        engine(cached, labels)
        if missing > 0:
            for parameter in self.params:
                parameter.grad_sample = parameter.grad_sample[:count]

    def _contain(self) -> None:
        """Float32, and zeros for a row (a record, or a unit's average) that is not finite.

        Both act on each row alone, so a unit's share of the sum stays within C. NaN times a
        clipping factor is NaN: a server that sends an adapter near overflow would learn from it
        whether a record that overflows was in the batch.
        """
        samples = [p.grad_sample.float() for p in self.params]
        finite = torch.stack([s.reshape(len(s), -1).isfinite().all(dim=1) for s in samples])
        keep = finite.all(dim=0)
        for parameter, sample in zip(self.params, samples, strict=True):
            mask = keep.view(-1, *[1] * (sample.dim() - 1))
            parameter.grad_sample = torch.where(mask, sample, 0.0)

    def _average(self, sizes: torch.Tensor) -> None:
        """Replaces the records' gradients by the average over each unit's records.

        Divides before it adds: the sum of two finite records could overflow where their average
        does not. What rounding could still push over the edge is contained again.
        """
        if int(sizes.max()) == 1:
            return
        unit = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        for parameter in self.params:
            sample = parameter.grad_sample
            where = unit.to(sample.device)
            share = sizes.to(sample)[where].view(-1, *[1] * (sample.dim() - 1))
            total = sample.new_zeros(len(sizes), *sample.shape[1:])
            parameter.grad_sample = total.index_add_(0, where, sample / share)
        self._contain()

    def _clear(self, names: Iterable[str]) -> None:
        for parameter in self.params:
            for name in names:
                setattr(parameter, name, None)


def _parts(
    records: int, physical_batch: int, sizes: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """The physical batches of a batch: which records, and the sizes of the units they are."""
    if sizes is None:
        for start in range(0, records, physical_batch):
            yield slice(start, start + physical_batch), None
        return
    start = 0
    for units in sizes.split(pack(sizes, physical_batch)):
        stop = start + int(units.sum())
        yield slice(start, stop), units
        start = stop
