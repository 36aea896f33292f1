"""Fedgraft's side of `digits_vit`: a plan run from start to end in a fresh process.

python -m fedgraft_simulations.benchmarks.fedgraft_job PLAN.json DIRECTORY
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from statistics import fmean

import torch

from fedgraft_client.app import client_app
from fedgraft_client.data import Records
from fedgraft_client.head import LinearHead
from fedgraft_client.prefix import Cached
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan, parse_plan
from fedgraft_server.federation import RoundSummary, server_app
from fedgraft_simulations.local_grid import LocalGrid, local_context
from fedgraft_simulations.sites import SimulatedSites


def run(plan: Plan, directory: Path) -> dict[str, float]:
    """Federates, then measures both heads of every site on its held-out records."""
    adapter: Tensors = {}

    def note(summary: RoundSummary) -> None:
        adapter.update(summary.adapter)

    sites = SimulatedSites(plan, directory / "sites", "cpu")
    server = server_app(plan, directory / "server", note, durable=False, trust=sites.trust)
    server(LocalGrid(client_app(sites), plan.sites.count), local_context(0, 1))

    trained, refitted = [], []
    for site, share in zip(sites.all(), sites.shares(), strict=True):
        bench = site.bench(plan)
        test: Cached = bench.cache(share.test.inputs)
        features = bench.features(adapter, test)
        trained.append(_accuracy(site.trained_head(plan), features, share.test))
        refitted.append(_accuracy(site.refit(plan, adapter), features, share.test))
    step = sites[0].step(plan)
    sigma = step.event.noise_multiplier if step.event else 0.0
    return {"accuracy": fmean(refitted), "accuracy before refit": fmean(trained), "sigma": sigma}


def _accuracy(head: LinearHead, features: torch.Tensor, records: Records) -> float:
    with torch.no_grad():
        return float((head.cpu()(features).argmax(dim=1) == records.labels).float().mean())


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    loaded = parse_plan(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sys.argv[1])
    print(json.dumps(run(loaded, Path(sys.argv[2]))))
