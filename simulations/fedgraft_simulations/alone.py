"""What a site can do without anyone: nothing leaves, so nothing needs noise.

This is the honest baseline (PRIVACY.md): federation is worth joining only if it beats the better
of staying alone with a head only and with adapter and head. Both end in the same refit as every
federated row.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from fedgraft_client.head import LinearHead
from fedgraft_client.refit import refit_head
from fedgraft_client.runtime import SiteModel
from fedgraft_client.site import Site
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan

ALONE_STIFFNESS = 0.01  # of the refit: the best of 0.01 to 3 for these baselines on the digits
STEPS = 60
LEARNING_RATE = 0.01


def train_alone(site: Site, plan: Plan) -> Tensors:
    """Trains adapter and head together on one site's records: full-batch Adam, no DP.

    Starts from the head fitted to the untouched backbone, so that the adapter has something to
    improve from the first step on.

    Args:
        site: its records and model.
        plan: says which backbone and adapter.

    Returns:
        The adapter.
    """
    bench = site.runtime.workbench(plan)
    bench.release()  # Opacus' hooks would keep the per-example gradients of every step
    labels, classes = site.records.labels, len(site.config.classes)
    features = bench.features(bench.initial, site.cached(bench))
    zeros = LinearHead(bench.adapted.feature_dim, classes)
    head = refit_head(features, labels, zeros, ALONE_STIFFNESS)
    model = SiteModel(bench.prefix, head.requires_grad_(True), bench.device)
    model.dtype = bench.dtype
    cached = tuple(tensor.to(bench.device) for tensor in site.cached(bench))
    parameters = [*bench.adapted.adapter.values(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        functional.cross_entropy(model(*cached), labels.to(bench.device)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return bench.adapted.state()
