"""Runs on a SuperLink: start, list, stop, logs, through Flower's Control API.

The Control API has no authentication, so its SuperLink listens on loopback and nowhere else, and
this talks to loopback only. Flower's command line does the same calls, but rewrites files and
starts helpers on the way; nothing on disk is touched here.
"""

from __future__ import annotations

import hashlib
import ssl
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.proto.run_pb2 import Run
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab

from fedgraft_common.errors import ServerError
from fedgraft_common.plan import Plan

STUB: Final = "pyproject.toml"
_PAGE: Final = 200


@dataclass(frozen=True, slots=True)
class RunState:
    """A run as the SuperLink sees it.

    Attributes:
        id: Flower's number.
        folder: name of the run directory; a run that was continued is several to Flower.
        status: pending, starting, running or finished.
        outcome: completed, failed or stopped, once it is finished.
        details: why it failed.
        claimed: ISO time when a process was begun for it; empty before.
        started: ISO time; empty before the start.
        finished: ISO time; empty before the end.
    """

    id: int
    folder: str
    status: str
    outcome: str
    details: str
    claimed: str
    started: str
    finished: str

    @property
    def is_over(self) -> bool:
        """Whether Flower is done with it."""
        return self.status == "finished"


@dataclass(frozen=True, slots=True)
class NodeState:
    """A registered site.

    Attributes:
        id: Flower's number.
        name: what it was registered as.
        status: registered, online, offline or unregistered.
        public_key: of its node key, in OpenSSH's or PEM form as it was registered.
        last_connected: ISO time; empty if never.
    """

    id: int
    name: str
    status: str
    public_key: bytes
    last_connected: str


class Runs:
    """The runs and sites of one SuperLink.

    Args:
        address: `host:port` of the SuperLink; loopback.
        tls: trusts the SuperLink's certificate; None for plain HTTP.
        timeout: seconds that a call may take.

    Raises:
        ServerError: the address is not a loopback one.
    """

    def __init__(
        self, address: str, tls: ssl.SSLContext | None = None, timeout: float = 30.0
    ) -> None:
        host = address.rpartition(":")[0].strip("[]")
        if not (host in ("localhost", "::1") or host.startswith("127.")):
            raise ServerError(
                "SuperLink address", address, "a loopback address",
                "Run this command on the server; its Control API must not be reachable from "
                "elsewhere.",
            )  # fmt: skip
        self.address = address
        scheme = "http" if tls is None else "https"
        self._client = ControlHttpClient(
            f"{scheme}://{address}", verify=tls if tls is not None else True, timeout=timeout
        )

    def __enter__(self) -> Runs:
        """This object."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the connection."""
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def start(
        self,
        plan: Plan,
        directory: Path,
        sites: Collection[int],
        signature: str = "",
        backbone: Path | None = None,
        ca: Path | None = None,
        registry: Path | None = None,
    ) -> int:
        """Starts a run; one that was cut short continues from its directory.

        Args:
            plan: what to run.
            directory: of the run, on this machine.
            sites: node ids of the sites that take part.
            signature: the operator's, on the plan.
            backbone: where the plan's backbone lies, if not where it says.
            ca: certificate of the federation's CA, for secure aggregation.
            registry: the server's, for the same.

        Returns:
            Flower's number of the run.

        Raises:
            ServerError: the SuperLink cannot be reached or refused.
        """
        config = {
            "plan": plan.canonical,
            "directory": str(directory.resolve()),
            "sites": ",".join(str(node) for node in sorted(sites)),
            "signature": signature,
            "backbone": str(backbone.resolve()) if backbone else "",
            "ca": str(ca.resolve()) if ca else "",
            "registry": str(registry.resolve()) if registry else "",
        }
        return self.start_bundle(stub(), config)

    def start_bundle(self, bundle: Mapping[str, bytes], config: Mapping[str, str]) -> int:
        """Starts a run of any Flower bundle: path in the bundle to content.

        Raises:
            ServerError: the SuperLink cannot be reached or refused.
        """
        with warnings.catch_warnings():  # Flower uses a pattern class that its author deprecated
            warnings.simplefilter("ignore", DeprecationWarning)
            content = build_fab_from_files(bundle)[0]
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        request = StartRunRequest(
            fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(config))
        )
        with self._told():
            response = self._client.StartRun(request)
        if not response.HasField("run_id"):
            raise self._refused(response.note or "no run was started")
        return int(response.run_id)

    def all(self) -> list[RunState]:
        """All runs, oldest first.

        Raises:
            ServerError: the SuperLink cannot be reached or refused.
        """
        found: dict[int, Run] = {}
        more = True
        while more:  # Flower gives at most so many at once, 20 if it is not told
            request = ListRunsRequest(limit=_PAGE, skip=len(found))
            with self._told():
                page = self._client.ListRuns(request).run_dict
            more = len(page) == _PAGE and not page.keys() <= found.keys()
            found |= page
        return [
            RunState(
                run.run_id,
                Path(run.override_config["directory"].string).name,
                run.status.status,
                run.status.sub_status,
                run.status.details,
                run.starting_at,
                run.running_at,
                run.finished_at,
            )
            for run in sorted(found.values(), key=lambda run: run.pending_at)
        ]

    def of(self, folder: str) -> list[RunState]:
        """What Flower knows of the run with this directory, oldest first.

        Raises:
            ServerError: the SuperLink cannot be reached or refused.
        """
        return [state for state in self.all() if state.folder == folder]

    def state(self, run: int) -> RunState:
        """One run.

        Raises:
            ServerError: there is no such run, or the SuperLink cannot be reached.
        """
        for state in self.all():
            if state.id == run:
                return state
        raise ServerError("run", run, "a run of this server", "List them with `fedgraft runs`.")

    def stop(self, run: int) -> None:
        """Stops a run; its checkpoints stay.

        Raises:
            ServerError: it does not run, or the SuperLink cannot be reached.
        """
        with self._told():
            stopped = self._client.StopRun(StopRunRequest(run_id=run)).success
        if not stopped:
            raise self._refused(f"run {run} was not stopped")

    def logs(self, run: int) -> Iterator[str]:
        """What the run's ServerApp has written, and writes until it ends.

        Raises:
            ServerError: there is no such run, or the SuperLink cannot be reached.
        """
        with self._told():
            for response in self._client.StreamLogs(StreamLogsRequest(run_id=run)):
                yield response.log_output

    def nodes(self) -> list[NodeState]:
        """All registered sites.

        Raises:
            ServerError: the SuperLink cannot be reached or refused.
        """
        with self._told():
            nodes = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [
            NodeState(n.node_id, n.name, n.status, n.public_key, n.last_activated_at) for n in nodes
        ]

    def register(self, public_key: bytes, name: str) -> int:
        """Registers a site's node key.

        Args:
            public_key: as `flwr.supercore.primitives.asymmetric.public_key_to_bytes` gives it.
            name: for the list of sites.

        Returns:
            Its node id.

        Raises:
            ServerError: the key is registered already, or the SuperLink cannot be reached.
        """
        with self._told():
            response = self._client.RegisterNode(
                RegisterNodeRequest(public_key=public_key, name=name)
            )
        return int(response.node_id)

    def unregister(self, node: int) -> None:
        """Takes a site's registration back.

        Raises:
            ServerError: there is no such site, or the SuperLink cannot be reached.
        """
        with self._told():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            reason = FlowerError.from_json(error.response.text)
            told = f"HTTP {error.response.status_code}"
            raise self._refused(f"{told}, {reason.message}" if reason else told) from None
        except httpx.HTTPError as error:
            raise ServerError(
                f"SuperLink {self.address}", type(error).__name__, "a running SuperLink",
                "Start the server with `fedgraft server up`.",
            ) from None  # fmt: skip

    def _refused(self, found: str) -> ServerError:
        return ServerError(
            f"SuperLink {self.address}", found, "a request it accepts",
            "Look into the SuperLink's log.",
        )  # fmt: skip


def stub() -> dict[str, bytes]:
    """The bundle of every run: one file that names installed code."""
    return {STUB: (files("fedgraft_server") / "flower_app" / STUB).read_bytes()}
