"""The server's own membership attack: which candidates explain the updates it received?

An update is a sum of per-unit gradients, and the server knows everything that they are computed
from but the units: adapter, fixed head, clipping norm, round. So it computes the gradient g_i of
each candidate i in each round and solves

    update_t = sum over i of (w_i + sampling_i,t) g_i,t + noise_t      for all rounds t together

for w, which is the sample rate q for a unit that took part and 0 for one that did not. Both errors
are known: noise has the plan's standard deviation s, and sampling a variance of about
v = q (1 - q) / 2 along each g_i. So the best linear estimate is generalised least squares with the
covariance s^2 I + v G_t' G_t, and a Gaussian prior on w. Without noise and with more values than
candidates it reads the batches off exactly; under noise it averages over rounds. An attacker who
believes the claim would overlook noise that is missing, so it is tried with the claimed s and with
a small part of it. This is the passive white-box attacker of Nasr, Shokri and Houmansadr 2019,
section 4, who makes use of the fact that an update is a sum. What a released model can tell follows
from the updates, so the same ceiling holds for both.

Shapes: U candidate units, D values of the adapter that are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft_client.head import LinearHead
from fedgraft_common.mechanism import StepNoise
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan
from fedgraft_simulations.audit.candidates import Candidates

VALUES = 8192
"""Values of the adapter that are looked at, drawn at random; more only cost time."""
CHUNK = 128
BELIEFS = (1.0, 0.03)
"""What the attacker takes the noise for, as shares of what is claimed."""
EXACT = 512
"""Candidates up to which sums are kept in float64; beyond, noise hides the difference."""


class UpdateRegression:
    """Collects rounds, then solves.

    Args:
        plan: the run.
        candidates: of the sites whose updates come in as one: one site, or all of them where the
            server sees only the sum.
        heads: of the same sites, as far as the attacker knows them.
        step: sample rate and noise of one site.
        shares: noise shares in the sum; 1 for a single site under the local mechanism.
        random: draws the values that are looked at.

    Attributes:
        beliefs: standard deviations that the noise is taken for, one attack each.
    """

    def __init__(
        self,
        plan: Plan,
        candidates: Sequence[Candidates],
        heads: Sequence[LinearHead],
        step: StepNoise,
        shares: int,
        random: np.random.Generator,
    ) -> None:
        self._plan = plan
        self._candidates = candidates
        self._heads = heads
        self._step = step
        bench = candidates[0].bench
        noise = step.adapter_std * math.sqrt(shares)
        self.beliefs = tuple(share * noise for share in BELIEFS) if noise else (0.0,)
        size = sum(t.numel() for t in bench.initial.values())
        chosen = random.permutation(size)[:VALUES] if size > VALUES else np.arange(size)
        self._chosen = torch.from_numpy(np.sort(chosen))
        self._names = list(bench.adapted.adapter)
        count = sum(len(c.members) for c in candidates)
        exact = count <= EXACT or not noise
        self._dtype = torch.float64 if exact else torch.float32
        self._floor = 1e-6 if exact else 1e-4
        self._precision = torch.zeros(len(self.beliefs), count, count, dtype=self._dtype)
        self._evidence = torch.zeros(len(self.beliefs), count, dtype=self._dtype)

    def add(self, number: int, before: Tensors, sent: Tensors) -> None:
        """Takes in a round.

        Args:
            number: of the round.
            before: the adapter that the server sent.
            sent: what came back: the sum of gradients (distributed), or the adapter after the
                round's steps, which are taken for one.
        """
        if self._plan.privacy.mechanism == "distributed":
            update = self._flat(sent)
        else:
            rate = self._plan.training.learning_rate * self._plan.step_scale(number)
            rate *= self._plan.training.local_steps / self._plan.training.expected_batch
            update = (self._flat(before) - self._flat(sent)) / rate
        gradients = torch.cat(
            [
                unit_gradients(before, head, site, self._step.clipping_norm)[:, self._chosen]
                for site, head in zip(self._candidates, self._heads, strict=True)
            ]
        ).to(self._dtype)
        products, seen = gradients @ gradients.T, gradients @ update.to(self._dtype)
        q = self._step.sample_rate
        floor = self._floor * float(products.diagonal().mean())
        for belief, noise in enumerate(self.beliefs):
            weight = (q * (1 - q) / 2) * products
            weight.diagonal().add_(max(noise**2, floor))
            factor = torch.linalg.cholesky(weight)
            self._precision[belief] += torch.cholesky_solve(products, factor)
            self._evidence[belief] += torch.cholesky_solve(seen[:, None], factor)[:, 0]

    def solve(self) -> NDArray[np.float64]:
        """(beliefs, U) weight of each candidate, in the order of sites and units."""
        middle = self._step.sample_rate / 2  # mean and deviation of a weight, before anything
        system = self._precision.double()
        system.diagonal(dim1=1, dim2=2).add_(1 / middle**2)
        found: torch.Tensor = torch.linalg.solve(system, self._evidence.double() + 1 / middle)
        weights: NDArray[np.float64] = found.numpy()
        return weights

    def _flat(self, tensors: Tensors) -> torch.Tensor:
        return torch.cat([tensors[name].flatten() for name in self._names])[self._chosen]


def unit_gradients(
    adapter: Tensors, head: LinearHead, site: Candidates, clipping_norm: float
) -> torch.Tensor:
    """The clipped adapter gradient of each unit, computed as the trainer does.

    Args:
        adapter: where the round starts.
        head: of the site.
        site: its candidates.
        clipping_norm: C of the joint gradient of adapter and head; infinite for none.

    Returns:
        (U, values of the adapter) float32.
    """
    bench = site.bench
    model, engine = bench.trainer(head)
    bench.adapted.load(adapter)
    own = list(bench.adapted.adapter.values())
    trained = [*own, *(p for p in model.head.parameters() if p.requires_grad)]
    rows = []
    for start in range(0, len(site.labels), CHUNK):
        part = slice(start, start + CHUNK)
        cached = tuple(tensor[part].to(bench.device) for tensor in site.cached)
        engine(cached, site.labels[part].to(bench.device))
        found = [p.grad_sample.flatten(1).float().cpu() for p in trained]  # type: ignore[attr-defined]
        rows.append(torch.cat(found, dim=1))
    for parameter in trained:
        parameter.grad_sample = None  # type: ignore[attr-defined]
    records = torch.cat(rows)
    units, counts = torch.from_numpy(site.units), torch.bincount(torch.from_numpy(site.units))
    total = records.new_zeros(len(counts), records.shape[1]).index_add_(0, units, records)
    mean = total / counts[:, None]
    norm = mean.norm(dim=1, keepdim=True)
    clipped: torch.Tensor = mean * (clipping_norm / norm.clamp(min=1e-6)).clamp(max=1.0)
    return clipped[:, : sum(p.numel() for p in own)]
