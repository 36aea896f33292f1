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

from fedgraft_client.device_memory import smaller
from fedgraft_client.gradients import Engine
from fedgraft_client.prefix import Cached
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.units import pack

SMALLEST = 8
"""Records that go through the model at once at least, if as many fit."""


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
    ) -> int:
        """Clips, sums and noises the gradients of one Poisson batch into each `grad`.

        When the device runs out of memory, the part of the batch that did not fit is computed
        again in smaller parts. It is the same batch: nothing is sampled anew, each unit is in the
        sum once, and noise is drawn once, at the end.

        Args:
            engine: computes per-example gradients.
            cached: the batch's tensors, N records first, on any device; N may be 0.
            labels: (N,) int64.
            physical_batch: records whose gradients are computed at once; it changes neither the
                sum nor the noise.
            sizes: (B,) int64 on the CPU, how many consecutive records each unit has, at least 1
                and N together; None if every record is a unit. A unit is averaged whole before
                it is clipped, also one with more records than `physical_batch`.

        Returns:
            The physical batch that the device had room for: `physical_batch`, or less.

        Raises:
            DeviceError: the device has no room for a single record.
        """
        self.zero_grad(set_to_none=True)
        self._clear(("grad_sample", "summed_grad"))
        physical_batch = self._add(engine, cached, labels, physical_batch, sizes)
        self.add_noise()
        self._clear(("summed_grad",))
        return physical_batch

    def _add(
        self,
        engine: Engine,
        cached: Cached,
        labels: torch.Tensor,
        physical_batch: int,
        sizes: torch.Tensor | None,
    ) -> int:
        """Adds the clipped gradients to `summed_grad`; returns the physical batch that fitted."""
        done = 0
        for part, units in _parts(len(labels), physical_batch, sizes):
            inputs, answers = tuple(tensor[part] for tensor in cached), labels[part]
            if not self._add_part(engine, inputs, answers, physical_batch, units):
                filled = max(len(answers), min(SMALLEST, physical_batch))  # see `_gradients`
                half = smaller(physical_batch, filled)
                rest = tuple(tensor[part.start :] for tensor in cached)
                left = None if sizes is None else sizes[done:]
                return self._add(engine, rest, labels[part.start :], half, left)
            done += 0 if units is None else len(units)
        return physical_batch

    def _add_part(
        self,
        engine: Engine,
        cached: Cached,
        labels: torch.Tensor,
        physical_batch: int,
        sizes: torch.Tensor | None,
    ) -> bool:
        """Adds one part to the sum, whole; or, if memory did not suffice, nothing of it.

        Memory may run out when the first parameters have been added and the others have not.
        Adding them again would let a unit contribute more than C, so the sum so far is set aside
        and replaced only when all of the part is there.
        """
        before = [parameter.summed_grad for parameter in self.params]
        self._clear(("summed_grad",))
        try:
            self._compute(engine, cached, labels, physical_batch, sizes)
            self.clip_and_accumulate()
            after = [
                parameter.summed_grad if total is None else total + parameter.summed_grad
                for parameter, total in zip(self.params, before, strict=True)
            ]
        except torch.OutOfMemoryError:
            after = None
        for parameter, total in zip(self.params, before if after is None else after, strict=True):
            parameter.summed_grad = total
        self._clear(("grad_sample",))
        return after is not None

    def _compute(
        self,
        engine: Engine,
        cached: Cached,
        labels: torch.Tensor,
        physical_batch: int,
        sizes: torch.Tensor | None,
    ) -> None:
        """Sets each `grad_sample` to one row per unit of a part."""
        device = self.params[0].device
        if len(labels) <= physical_batch:
            inputs = tuple(tensor.to(device) for tensor in cached)
            self._gradients(engine, inputs, labels.to(device), physical_batch)
            self._contain()
            if sizes is not None:
                self._average(sizes)
            return
        # One unit that is larger than the physical batch: its average, from one pass after another.
        totals = [torch.zeros_like(p, dtype=torch.float32) for p in self.params]
        for start in range(0, len(labels), physical_batch):
            chunk = slice(start, start + physical_batch)
            inputs = tuple(tensor[chunk].to(device) for tensor in cached)
            self._gradients(engine, inputs, labels[chunk].to(device), physical_batch)
            self._contain()
            for parameter, total in zip(self.params, totals, strict=True):
                total.add_((parameter.grad_sample / len(labels)).sum(dim=0))
            self._clear(("grad_sample",))
        for parameter, total in zip(self.params, totals, strict=True):
            parameter.grad_sample = total.unsqueeze(0)
        self._contain()

    def _gradients(
        self, engine: Engine, cached: Cached, labels: torch.Tensor, physical_batch: int
    ) -> None:
        """Per-example gradients; a very small batch is filled up with copies, which are dropped.

        Matrix kernels take other paths for one to three rows, so the last bits of one record's
        gradient would tell how many others are there.
        """
        count = len(labels)
        missing = min(SMALLEST, physical_batch) - count
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
