"""Health of a server's container: does it answer over TLS with a certificate that sites accept?

It asks the joining port for the CA's certificate. That needs neither a client certificate nor a
secret, goes through the same process as the gateway, and fails on an expired certificate.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys
import tomllib
from pathlib import Path


def main() -> int:
    """Exit code for Docker: 0 healthy, 1 not; says why on standard error."""
    directory = Path(os.environ.get("FEDGRAFT_SERVER_DIR", "server"))
    try:
        settings = tomllib.loads((directory / "federation.toml").read_text(encoding="utf-8"))
        context = ssl.create_default_context(cafile=directory / "ca.pem")
        # The certificate names the host that sites know, and this asks over loopback.
        context.check_hostname = False
        port = int(settings["gateway"]["join_port"])
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=8.0, context=context)
        try:
            connection.request("GET", "/ca")
            status = connection.getresponse().status
        finally:
            connection.close()
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        sys.stderr.write(f"not healthy: {error!r}\n")
        return 1
    if status != 200:
        sys.stderr.write(f"not healthy: status {status}\n")
    return int(status != 200)


if __name__ == "__main__":
    sys.exit(main())
