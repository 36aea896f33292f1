"""One step of DP-SGD over the joint vector of adapter and head (Abadi et al. 2016, algorithm 1).

Formal guarantee: one `noisy_sum` is a Poisson-subsampled Gaussian mechanism with sample rate q
and noise multiplier sigma, for adding or removing one unit. Each unit's gradient of adapter and
head together is clipped to L2 norm C, so the joint sum has sensitivity C; independent Gaussian
noise is added to every coordinate. Two standard deviations are allowed because the distributed
mechanism adds only a share of the adapter's noise at each site (PRIVACY.md, "Two mechanisms").
The denominator is a public constant of the plan and is applied by the caller.

Edge cases: an empty batch releases pure noise. A gradient of zero is left as it is. An infinite C
and a noise of zero are the mechanism `none`, which promises nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from opacus.optimizers import DPOptimizer

from fedgraft_client.gradients import Engine
from fedgraft_client.prefix import Cached
from fedgraft_client.randomness import NoiseSource


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
        self, engine: Engine, cached: Cached, labels: torch.Tensor, physical_batch: int
    ) -> None:
        """Clips, sums and noises the gradients of one Poisson batch into each `grad`.

        Args:
            engine: computes per-example gradients.
            cached: the batch's tensors, N records first; N may be 0.
            labels: (N,) int64.
            physical_batch: records whose gradients are held in memory at once; it changes
                neither the sum nor the noise.
        """
        self.zero_grad(set_to_none=True)
        self._clear(("grad_sample", "summed_grad"))
        for start in range(0, len(labels), physical_batch):
            part = slice(start, start + physical_batch)
            engine(tuple(tensor[part] for tensor in cached), labels[part])
            self._contain()
            self.clip_and_accumulate()
            self._clear(("grad_sample",))
        self.add_noise()
        self._clear(("summed_grad",))

    def _contain(self) -> None:
        """Float32, and zeros for a record whose gradient is not finite.

        Both act on each record alone, so its share of the sum stays within C. NaN times a
        clipping factor is NaN: a server that sends an adapter near overflow would learn from it
        whether a record that overflows was in the batch.
        """
        samples = [p.grad_sample.float() for p in self.params]
        finite = torch.stack([s.reshape(len(s), -1).isfinite().all(dim=1) for s in samples])
        keep = finite.all(dim=0)
        for parameter, sample in zip(self.params, samples, strict=True):
            mask = keep.view(-1, *[1] * (sample.dim() - 1))
            parameter.grad_sample = torch.where(mask, sample, 0.0)

    def _clear(self, names: Iterable[str]) -> None:
        for parameter in self.params:
            for name in names:
                setattr(parameter, name, None)
