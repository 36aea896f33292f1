"""What a rehearsed federation must come to: the same sites and plan over a grid in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from fedgraft_client.app import client_app
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan
from fedgraft_server.federation import run_federation
from fedgraft_simulations.federation.processes import site_file
from fedgraft_simulations.federation.site import open_simulated
from fedgraft_simulations.local_grid import LocalGrid
from fedgraft_simulations.partition import partition

EXPORT = "adapter/adapter_model.safetensors"
"""The final adapter, in the directory of a run."""


def undisturbed(
    plan: Plan, directory: Path, names: Sequence[str] = (), backbone: Path | None = None
) -> Tensors:
    """The adapter that a run exports when nothing dies, by PEFT's names.

    Args:
        plan: the run.
        directory: new; for ledgers and checkpoints.
        names: of the sites that take part; default: all.
        backbone: where the plan's backbone lies, if not where the plan says.
    """
    sites = []
    for number, share in enumerate(partition(plan)):
        if names and share.name not in names:
            continue
        home = directory / share.name
        home.mkdir(parents=True)
        file = home / "site.toml"
        file.write_text(site_file(share, plan), encoding="utf-8")
        sites.append(open_simulated(plan, number, file, locate=lambda _: backbone))
    app = client_app(lambda context: sites[int(context.node_config["partition-id"])])
    try:
        grid = LocalGrid(app, len(sites))
        run_federation(plan, grid, directory / "run", durable=False, backbone=backbone)
        return load_file(directory / "run" / EXPORT)
    finally:
        for site in sites:
            site.store.close()
