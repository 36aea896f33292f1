"""Health of a site's container: did the daemon's last call reach the server?

It reads the status file that the daemon writes beside its ledger. A site that lost its server is
shown as unhealthy and goes on trying by itself; restarting it would not help.
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
from pathlib import Path


def main() -> int:
    """Exit code for Docker: 0 healthy, 1 not; says why on standard error."""
    site = Path(os.environ.get("FEDGRAFT_SITE", "site.toml"))
    try:
        home = tomllib.loads(site.read_text(encoding="utf-8")).get("home", "home")
        health = json.loads((site.parent / home / "status.json").read_text(encoding="utf-8"))
        state, connected = health["state"], health["connected"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.stderr.write(f"not healthy: {error!r}\n")
        return 1
    if state == "stopped" or connected is not True:
        sys.stderr.write(f"not healthy: {state}, connected: {connected}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
