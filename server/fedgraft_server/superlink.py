"""Flower's programs on the server as child processes, and the node keys the SuperLink is told.

Two of them. The SuperLink carries messages; it binds 127.0.0.1 and speaks TLS even there, because
`--enable-supernode-auth` is refused without it. That option also shuts Flower's own
self-registration. The SuperExec starts a process for each run. A SuperLink would start one itself,
but does not notice when it dies, and takes every run with it when it dies itself; as a child of
ours it is started again, and a run survives the SuperLink.

The only file of the server's deployment that uses Flower's internals besides the gateway's nine
paths: `ControlHttpClient`, on loopback, to register and unregister node keys.
"""

from __future__ import annotations

import os
import shutil
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import httpx
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.control.control_http_client import ControlHttpClient

from fedgraft_common.errors import ServerError
from fedgraft_common.logs import AS_JSON
from fedgraft_server.fleet_port import OPENS, FleetPort
from fedgraft_server.kept_process import KeptProcess
from fedgraft_server.program_output import ProgramOutput
from fedgraft_server.registry import Registry
from fedgraft_server.settings import ServerDirectory, Settings

HOST: Final = "127.0.0.1"
_UNREGISTERED: Final = "unregistered"  # flwr.supercore.constant.NodeStatus


class SuperLink:
    """The SuperLink of a server directory, and what starts its runs.

    Args:
        directory: its certificate, state and settings.
        settings: its port.
    """

    def __init__(self, directory: ServerDirectory, settings: Settings) -> None:
        self._directory = directory
        self._port = settings.superlink.port
        self._fleet_address = f"{HOST}:{settings.superlink.fleet_port}"
        self.address = f"{HOST}:{self._port}"
        self.url = f"https://{self.address}"

    def client_context(self) -> ssl.SSLContext:
        """Trusts our CA and nothing else."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self._directory.ca[0])
        return context

    def fleet_port(self) -> FleetPort | None:
        """A client of the SuperLink's gRPC port; None if this Flower has no such port. Close it."""
        if OPENS is None:
            return None
        return FleetPort(self._fleet_address, self._directory.ca[0].read_bytes())

    def processes(self, registry: Registry) -> tuple[KeptProcess, KeptProcess]:
        """SuperLink and SuperExec, not started yet; their log lines name sites of the registry."""
        names: dict[int, str] = {}

        def site_of(node: int) -> str | None:
            if node not in names:
                names.update((s.node_id, s.name) for s in registry.sites() if s.node_id)
            return names.get(node)

        self._directory.flower_home.mkdir(mode=0o700, exist_ok=True)
        environment = self.environment(os.environ)
        carrier, starter = (
            KeptProcess(name, command, environment, ProgramOutput(name, site_of))
            for name, command in (
                ("SuperLink", self.command()),
                ("SuperExec", self.superexec_command()),
            )
        )
        return carrier, starter

    def command(self) -> list[str]:
        """The SuperLink's."""
        certificate, key = self._directory.superlink
        return [
            str(_program("flower-superlink")),
            "--host", HOST, "--port", str(self._port),
            "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key),
            "--ssl-ca-certfile", str(self._directory.ca[0]),
            "--enable-supernode-auth",
            "--database", str(self._directory.flower_state),
            "--isolation", "process",
            "--disable-runtime-dependency-installation",
            *(() if OPENS is None else ("--fleet-api-address", self._fleet_address)),
        ]  # fmt: skip

    def superexec_command(self) -> list[str]:
        """The SuperExec's."""
        return [
            str(_program("flower-superexec")),
            "--root-certificates", str(self._directory.ca[0]),
            "--runtime-api-address", self.address,
        ]  # fmt: skip

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """Private settings, no telemetry, no update check, Flower's other programs in reach."""
        programs = str(_program("flower-superlink").parent)
        return {
            **inherited,
            "PATH": os.pathsep.join([programs, inherited.get("PATH", os.defpath)]),
            "FLWR_HOME": str(self._directory.flower_home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FEDGRAFT_SERVER_DIR": str(self._directory.path),
            **({} if OPENS is None else {OPENS: "1"}),
            AS_JSON: "1",  # between processes; what people see is decided by `fedgraft server up`
        }


def synchronise(registry: Registry, url: str, context: ssl.SSLContext) -> None:
    """Makes the SuperLink know exactly the present sites' node keys, and learns their numbers.

    Args:
        registry: what should be; receives the numbers.
        url: of the SuperLink.
        context: trusts its certificate.

    Raises:
        ServerError: the SuperLink cannot be reached, or refuses a key.
    """
    wanted = {site.node_key: site.name for site in registry.sites() if site.revoked is None}
    try:
        with ControlHttpClient(url, verify=context, timeout=10.0) as control:
            listed = control.ListNodes(ListNodesRequest()).nodes_info
            present = {
                node.public_key.decode("ascii", "replace"): node.node_id
                for node in listed
                if node.status != _UNREGISTERED
            }
            for key in present.keys() - wanted.keys():
                control.UnregisterNode(UnregisterNodeRequest(node_id=present.pop(key)))
            for key in wanted.keys() - present.keys():
                request = RegisterNodeRequest(public_key=key.encode(), name=wanted[key])
                present[key] = control.RegisterNode(request).node_id
    except (httpx.HTTPError, ValueError) as error:
        raise ServerError(
            "SuperLink", str(error) or type(error).__name__, "an answer on its loopback port",
            "It is tried again; if this lasts, look at the SuperLink's log lines.",
        ) from None  # fmt: skip
    registry.set_node_ids(present)


def _program(name: str) -> Path:
    """Beside this Python first: the version that was installed with fedgraft."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ServerError(
            name, "no such program", "Flower's program, installed with fedgraft",
            "Install fedgraft again in this environment.",
        )  # fmt: skip
    return Path(found)
