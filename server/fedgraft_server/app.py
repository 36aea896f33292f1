"""The ServerApp that a SuperLink runs: it reads what to do and does it.

Flower loads `app` by name, from the bundle that `fedgraft_server.runs` sends. What the run is comes
with it as run configuration:

    plan        canonical JSON of the plan
    directory   of the run, on the server: checkpoints and the exported adapter
    sites       node ids of the sites that take part, with commas between them
    signature   the operator's, on the plan
    backbone    directory of the plan's backbone, if it is not where the plan says
    ca          certificate of the federation's CA (PEM), for secure aggregation
    registry    the server's, for the same: it says which node may speak for which site
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from flwr.app import Context, UserConfig
from flwr.serverapp import Grid, ServerApp

from fedgraft_common.errors import FedgraftError, ServerError
from fedgraft_common.logs import AS_JSON, set_up_logs
from fedgraft_common.plan import Plan, parse_plan
from fedgraft_server.registry import Registry
from fedgraft_server.run_folder import COMPLETED, FAILED, Outcome, RunFolder

if TYPE_CHECKING:
    from fedgraft_server.federation import RoundSummary

log = logging.getLogger(__name__)
GATHERING = 30.0  # seconds that the first round waits for every site to be connected
_HELD: list[FileLock] = []  # until the process ends: Flower then knows what became of the run


def read_run_config(config: UserConfig) -> tuple[Plan, Path, frozenset[int]]:
    """Plan, directory and sites of a run.

    Raises:
        PlanError: the plan is wrong.
        ServerError: another entry is missing or wrong.
    """
    text, directory, sites = (str(config.get(key, "")) for key in ("plan", "directory", "sites"))
    try:
        document = json.loads(text)
    except ValueError:
        raise _wrong("plan", text[:40], "a plan as canonical JSON") from None
    plan = parse_plan(document, origin="run configuration")
    if not directory:
        raise _wrong("directory", directory, "a directory of the server")
    try:
        nodes = frozenset(int(part) for part in sites.split(","))
    except ValueError:
        raise _wrong("sites", sites, "node ids with commas between them") from None
    return plan, Path(directory), nodes


def _wrong(key: str, found: str, allowed: str) -> ServerError:
    return ServerError(
        f"run configuration: {key}", found, allowed, "Start runs with `fedgraft run`."
    )


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the plan over the sites that were named, from its newest checkpoint.

    An error of ours is how the run ends: it is written down, and the run waits for the coordinator.
    Anything else (a signal, a connection that is gone) leaves it to be continued.
    """
    names: dict[int, str] = {}
    plan, directory, sites = read_run_config(context.run_config)
    folder = RunFolder(directory)
    directory.mkdir(parents=True, exist_ok=True)
    set_up_logs(  # Flower sends it on to `fedgraft logs`, the server reads the file
        bool(os.environ.get(AS_JSON)), facts={"run": str(context.run_id)}, names=names,
        file=folder.log,
    )  # fmt: skip
    _HELD.append(folder.take(context.run_id))
    try:
        _run(plan, folder, sites, grid, context.run_config, names)
    except FedgraftError as error:
        folder.end(Outcome(FAILED, str(error)))
        raise
    folder.end(Outcome(COMPLETED))


def _run(
    plan: Plan,
    folder: RunFolder,
    sites: frozenset[int],
    grid: Grid,
    config: UserConfig,
    names: dict[int, str],
) -> None:
    # Imports torch, for seconds; whoever looks after runs must see the lock before.
    from fedgraft_common.site_signature import Trust
    from fedgraft_server.bell import Bells
    from fedgraft_server.federation import run_federation
    from fedgraft_server.metrics import FILE, RunMetrics
    from fedgraft_server.superlink_grid import SuperlinkGrid

    enough = plan.aggregation.minimum_sites
    if plan.privacy.mechanism == "distributed":  # as `usable_updates` wants it
        enough = max(enough, plan.noise_shares + plan.privacy.tolerated_colluders)
    metrics = RunMetrics(folder.path / FILE)
    bells = Bells.of(folder.path.parent)  # of a server that has a gateway
    superlink = SuperlinkGrid(
        grid, sites, enough, on_reply=metrics.on_reply, names=names, bells=bells
    )
    count = superlink.wait_for_sites(min(GATHERING, plan.rounds.deadline))
    log.info("%d of %d sites are connected", count, len(sites), extra={"action": "start"})

    def note(summary: RoundSummary) -> None:
        facts = {"action": "round", "round": summary.number}
        log.info("round %d: %d updates", summary.number, summary.sites, extra=facts)
        metrics.on_round(summary)

    signature, backbone = (str(config.get(key, "")) for key in ("signature", "backbone"))
    where = Path(backbone) if backbone else None
    trust = partial(Trust.from_file, Path(str(config.get("ca", ""))))
    registry = str(config.get("registry", ""))
    run_federation(
        plan, superlink, folder.path, note, signature=signature, backbone=where, trust=trust,
        registered=partial(site_of, Path(registry)) if registry else None,
    )  # fmt: skip


def site_of(registry: Path, certificate: bytes) -> tuple[str, int | None]:
    """Name and node of the site that a certificate (DER) was issued to, as of now.

    Raises:
        IdentityError: unknown, revoked or expired.
    """
    with Registry(registry) as opened:
        site = opened.site_of(hashlib.sha256(certificate).hexdigest())
    return site.name, site.node_id
