"""Flower's SuperLink as a child process, and the node keys it is told.

The only file of the server's deployment that uses Flower's internals besides the gateway's nine
paths: `ControlHttpClient`, on loopback, to register and unregister node keys.

The SuperLink binds 127.0.0.1 and speaks TLS even there, because `--enable-supernode-auth` is
refused without it. That option also shuts Flower's own self-registration.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import ssl
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import httpx
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.control.control_http_client import ControlHttpClient

from fedgraft_common.errors import ServerError
from fedgraft_server.registry import Registry
from fedgraft_server.settings import ServerDirectory, Settings

LOG = logging.getLogger(__name__)

HOST: Final = "127.0.0.1"
_UNREGISTERED: Final = "unregistered"  # flwr.supercore.constant.NodeStatus
_SETTLED: Final = 60.0  # seconds of life after which a death counts as the first
_MAX_DELAY: Final = 30.0  # seconds between two starts
_STOP_TIMEOUT: Final = 10.0  # seconds from SIGTERM to SIGKILL


class SuperLink:
    """Keeps one `flower-superlink` running.

    Args:
        directory: its certificate, state and settings.
        settings: its port.
    """

    def __init__(self, directory: ServerDirectory, settings: Settings) -> None:
        self._directory = directory
        self._port = settings.superlink.port
        self._process: asyncio.subprocess.Process | None = None
        self.url = f"https://{HOST}:{self._port}"

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if running and self._process else None

    def client_context(self) -> ssl.SSLContext:
        """Trusts our CA and nothing else."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self._directory.ca[0])
        return context

    def command(self) -> list[str]:
        """What is run."""
        certificate, key = self._directory.superlink
        return [
            str(_program("flower-superlink")),
            "--host", HOST, "--port", str(self._port),
            "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key),
            "--ssl-ca-certfile", str(self._directory.ca[0]),
            "--enable-supernode-auth",
            "--database", str(self._directory.flower_state),
            "--disable-runtime-dependency-installation",
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
        }

    async def run(self) -> None:
        """Starts it again whenever it dies, later each time, until cancelled; then stops it."""
        deaths = 0
        self._directory.flower_home.mkdir(mode=0o700, exist_ok=True)
        try:
            while True:
                started = time.monotonic()
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "fedgraft_server.tied", str(os.getpid()),
                    *self.command(), env=self.environment(os.environ),
                    stdin=asyncio.subprocess.DEVNULL,
                )  # fmt: skip
                LOG.info(
                    "SuperLink started", extra={"action": "superlink-start", "child": self.pid}
                )
                code = await self._process.wait()
                deaths = 0 if time.monotonic() - started > _SETTLED else deaths + 1
                delay = min(_MAX_DELAY, 0.5 * 2 ** min(deaths, 10))
                LOG.error(
                    "SuperLink ended with code %s; starting it again in %.0f s", code, delay,
                    extra={"action": "superlink-died"},
                )  # fmt: skip
                await asyncio.sleep(delay)
        finally:
            await self._stop()

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(_STOP_TIMEOUT):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        LOG.info("SuperLink stopped", extra={"action": "superlink-stop"})


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
