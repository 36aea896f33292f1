"""What a site can do without anyone: nothing leaves, so nothing needs noise.

This is the honest baseline (PRIVACY.md): federation is worth joining only if it beats the better
of staying alone with a head only and with adapter and head. Both end in the same refit as every
federated row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fedgraft_client.head import LinearHead
from fedgraft_client.refit import refit_head
from fedgraft_client.runtime import SiteModel
from fedgraft_client.site import Site
from fedgraft_client.task_head import empty_head
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan

ALONE_STIFFNESS = 0.01  # of the refit: the best of 0.01 to 3 for these baselines on the digits
STEPS = 60
PASSES = 10
LEARNING_RATE = 0.01
BATCH = 256
"""Records whose activations are kept for a step. Those of a few thousand texts take 7 GB."""


def train_alone(site: Site, plan: Plan) -> Tensors:
    """Trains adapter and head together on one site's records: Adam, no DP.

    Starts from the head fitted to the untouched backbone, so that the adapter has something to
    improve from the first step on. Takes `STEPS` steps, each on all records, or on `BATCH` of them
    if there are more, and then passes over all of them at least `PASSES` times.

    Args:
        site: its records and model.
        plan: says which backbone and adapter.

    Returns:
        The adapter.
    """
    bench = site.bench(plan)
    bench.release()  # Opacus' hooks would keep the per-example gradients of every step
    labels = site.labels(bench).to(bench.device)
    head = fit_alone(site, plan, bench.initial)
    model = SiteModel(bench.prefix, head.requires_grad_(not head.public), bench.device)
    model.dtype = bench.dtype
    cached = tuple(tensor.to(bench.device) for tensor in site.cached(bench))
    parameters = [
        *bench.adapted.adapter.values(),
        *(p for p in head.parameters() if p.requires_grad),
    ]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    for part in _parts(len(labels)):
        optimizer.zero_grad()
        outputs = model(*(tensor[part.to(bench.device)] for tensor in cached))
        head.task.loss(outputs, labels[part.to(bench.device)]).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return bench.adapted.state()


def _parts(records: int) -> Iterator[torch.Tensor]:
    """Which records each step sees: all of them in order, or shuffled parts of `BATCH`."""
    if records <= BATCH:
        yield from [torch.arange(records)] * STEPS
        return
    generator = torch.Generator().manual_seed(0)
    parts = -(-records // BATCH)
    for _ in range(max(PASSES, -(-STEPS // parts))):
        yield from torch.randperm(records, generator=generator).tensor_split(parts)


def fit_alone(site: Site, plan: Plan, adapter: Tensors) -> LinearHead:
    """A head fitted from nothing to a site's own records, for one that stays alone."""
    bench = site.bench(plan)
    features = bench.features(adapter, site.cached(bench))
    start = site.start_head(plan)
    new = start if start.public else empty_head(start.task, bench.adapted.feature_dim)
    return refit_head(features, site.labels(bench), new, ALONE_STIFFNESS)
