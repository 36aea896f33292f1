"""One site of a rehearsed federation: the production daemon, with a simulated site's records.

    python -m fedgraft_simulations.federation.site SITE_FILE PLAN NUMBER

Everything is what `fedgraft site up` runs (identity, mutual TLS, signed plans, ledger, egress
guard), but for two things that no site file can ask for: the records are the plan's partition, and
noise and sampling come from the plan's seed, so that the result can be compared with a simulation.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedgraft_client.opening import open_store
from fedgraft_client.runtime import Runtime
from fedgraft_client.secure_member import Membership
from fedgraft_client.site import Site, SiteConfig
from fedgraft_client.site_file import load_site_file
from fedgraft_client.up import run_until_stopped
from fedgraft_common.logs import AS_JSON, set_up_logs
from fedgraft_common.plan import Plan, load_plan
from fedgraft_simulations.partition import partition


def open_simulated(
    plan: Plan,
    number: int,
    site_file: Path,
    operator_key: Ed25519PublicKey | None = None,
    locate: Callable[[Plan], Path | None] = lambda _: None,
    membership: Membership | None = None,
) -> Site:
    """The site with the records of one share of the plan's data, and reproducible noise."""
    file, share = load_site_file(site_file), partition(plan)[number]
    config = SiteConfig(share.name, share.classes, share.train.unit_count, simulated=True)
    return Site(
        config, share.train, Runtime(file.device, file.physical_batch, locate),
        open_store(file, site_file.parent), file.policy,
        held_out=share.test, operator_key=operator_key, membership=membership,
    )  # fmt: skip


def main() -> None:
    """Runs until SIGTERM."""
    site_file, plan, number = Path(sys.argv[1]), load_plan(Path(sys.argv[2])), int(sys.argv[3])
    set_up_logs(bool(os.environ.get(AS_JSON)), facts={"site": load_site_file(site_file).name})
    sys.exit(run_until_stopped(site_file, partial(open_simulated, plan, number)))


if __name__ == "__main__":
    main()
