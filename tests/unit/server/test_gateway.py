"""What needs no network: the list of calls and its copy for nginx. The rest is in integration/."""

from __future__ import annotations

import re
from pathlib import Path

from flwr.superlink.routers.fleet.router import router

from fedgraft_server.gateway import FLEET_CALLS, FLEET_PATHS
from fedgraft_server.settings import GatewayTable

NGINX = Path(__file__).parents[3] / "deploy" / "gateway" / "nginx.conf"


def forwarded_by_nginx(text: str) -> dict[str, list[str]]:
    """Upstream -> paths, of every location that forwards anything."""
    without_comments = re.sub(r"#.*", "", text)
    found: dict[str, list[str]] = {}
    for match in re.finditer(r"location\s+([^{]*)\{([^}]*)\}", without_comments):
        target = re.search(r"proxy_pass\s+https://([^;/]+)", match[2])
        if target:
            found.setdefault(target[1], []).append(match[1].strip())
    return found


def test_nginx_forwards_the_same_paths_and_nothing_else() -> None:
    found = forwarded_by_nginx(NGINX.read_text())
    assert found.pop("superlink") == [f"= {path}" for path in FLEET_PATHS.values()]
    assert found == {"127.0.0.1:19444": ["= /ca", "= /join"]}


def test_the_test_above_sees_a_prefix_location() -> None:
    text = NGINX.read_text().replace(
        "location / {", "location /v1/ { proxy_pass https://superlink;"
    )
    assert "/v1/" in forwarded_by_nginx(text)["superlink"]


def test_nginx_has_the_same_limits_and_the_same_demands() -> None:
    text, table = NGINX.read_text(), GatewayTable()
    assert f"client_max_body_size {table.max_request_bytes // 2**20}m;" in text
    assert f"rate={table.requests_per_second:g}r/s;" in text
    assert f"burst={table.burst} " in text
    assert text.count("ssl_protocols TLSv1.3;") == 4  # two servers, two upstreams
    assert text.count("ssl_verify_client on;") == 1


def test_every_call_exists_in_flower_and_the_dangerous_ones_are_not_ours() -> None:
    flowers = {route.path for route in router.routes}  # type: ignore[attr-defined]
    assert set(FLEET_PATHS.values()) < flowers
    left_out = {path.removeprefix("/v1/fleet/") for path in flowers} - set(FLEET_CALLS)
    assert left_out == {"register-node", "unregister-node", "get-fab"}
