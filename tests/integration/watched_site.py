"""A site of a rehearsed federation that writes down each look at its data before it looks.

    python watched_site.py SITE_FILE PLAN... NUMBER

`fedgraft_simulations.federation.site` with one difference: before each training a line goes to
`looked` beside the site file, and onto the disk. After any number of SIGKILLs the ledger must have
charged for at least as many looks as that file has lines.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from fedgraft_client import site as site_module
from fedgraft_client.training import train_round
from fedgraft_client.up import run_until_stopped
from fedgraft_common.logs import set_up_logs
from fedgraft_common.plan import load_plan
from fedgraft_simulations.federation.site import open_simulated


def note(path: Path, line: str) -> None:
    """On the disk before anything goes on."""
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    site_file, plan, number = Path(sys.argv[1]), load_plan(Path(sys.argv[2])), int(sys.argv[3])
    looked = site_file.with_name("looked")

    def watched(*arguments: Any, **options: Any) -> Any:
        note(looked, f"{arguments[1].hash} {arguments[2]}")
        return train_round(*arguments, **options)

    site_module.train_round = watched  # type: ignore[attr-defined]
    set_up_logs()
    sys.exit(run_until_stopped(site_file, partial(open_simulated, plan, number)))


if __name__ == "__main__":
    main()
