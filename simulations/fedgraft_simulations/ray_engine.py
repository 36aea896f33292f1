"""A federation on Flower's own simulation runtime: the same apps, carried by Ray.

For several GPUs or a cluster. Ray starts one process per actor, and each of them imports torch
and loads the backbone; an actor may serve any site, because what a site keeps between rounds (its
head, its last reply) is in files. On one small machine `LocalGrid` is much faster.

Flower's runtime reports what goes wrong at a site as a message and then carries on. Here it is an
exception in the caller, as it is with `LocalGrid`.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
from flwr.app import Context, Message
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

RUNTIME_MODULES = ("run_simulation", "vce_api", "raybackend")  # they log what they then raise
PULL_INTERVAL = 0.1  # seconds between two looks for replies; the in-memory grid's own value
EXIT_PATIENCE = 10.0  # seconds a Ray process may take to end before it is killed
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # actors use this interpreter, however it was started
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray's own warning asks for
}


class SiteError(RuntimeError):
    """A ClientApp raised, or its actor died; the text is Flower's report of it."""


def run_on_ray(
    server_app: ServerApp,
    client_app: ClientApp,
    sites: int,
    device: str = "auto",
    actors: int | None = None,
) -> None:
    """Runs a federation on Flower's simulation runtime, from the main thread.

    Args:
        server_app: runs in a thread of this process.
        client_app: answers for every site; cloudpickle sends it to the actors. A site's Context
            has its number as `partition-id`.
        sites: how many there are.
        device: `cpu`, or anything else for one actor per GPU if there is a GPU. An actor sees
            only its own GPU, as cuda:0.
        actors: processes that serve the sites; as many as processors (or GPUs) if absent.

    Raises:
        SiteError: the ClientApp raised, or an actor died.
        Exception: whatever the ServerApp raised.
        RuntimeError: Ray did not start.
    """
    stop = threading.Event()
    failures: list[BaseException] = []
    inner = server_app
    processes: set[psutil.Process] = set()
    ours = set(psutil.Process().children(recursive=True))

    outer = ServerApp()

    @outer.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            attentive = _AttentiveGrid(grid, stop)
            attentive.wait_for_nodes(sites)
            inner(attentive, context)
        except BaseException as error:
            failures.append(error)
            raise
        finally:
            processes.update(psutil.Process().children(recursive=True))

    with _surroundings() as directory, _quiet():
        try:
            import_module("flwr.simulation").run_simulation(
                outer, client_app, sites, "ray", _backend(directory, device, actors)
            )
        except RuntimeError:
            if not failures:
                raise
        finally:
            stop.set()
            processes.update(psutil.Process().children(recursive=True))
            import_module("ray").shutdown()
            _see_off(processes - ours)
    for failure in failures:
        raise failure


class _AttentiveGrid(Grid):
    """Flower's grid, but a site's error is raised and waiting ends when the runtime ends."""

    def __init__(self, grid: Grid, stop: threading.Event) -> None:
        self._grid = grid
        self._stop = stop

    def wait_for_nodes(self, count: int) -> None:
        """Nodes are registered one by one while the ServerApp already runs."""
        while len(list(self._grid.get_node_ids())) < count:
            self._pause()

    def _pause(self) -> None:
        if self._stop.wait(PULL_INTERVAL):
            raise RuntimeError("Flower's simulation runtime ended before the ServerApp did")

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """As Flower's in-memory grid does it."""
        waiting = set(self.push_messages(messages))
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and time.monotonic() < deadline:
            arrived = list(self.pull_messages(waiting))
            replies += arrived
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            if waiting:
                self._pause()
        return replies

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have arrived.

        Raises:
            SiteError: one of them is an error.
        """
        replies = list(self._grid.pull_messages(message_ids))
        for reply in replies:
            if reply.has_error():
                raise SiteError(_reason(reply.error))
        return replies

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hands messages to the runtime."""
        return self._grid.push_messages(messages)

    def get_node_ids(self) -> Iterable[int]:
        """One id per site."""
        return self._grid.get_node_ids()

    def create_message(self, *arguments: Any, **options: Any) -> Message:
        """A message to one site."""
        return self._grid.create_message(*arguments, **options)

    def set_run(self, run: Any) -> None:
        """The runtime has set its own run."""

    @property
    def run(self) -> Any:
        """The runtime's run."""
        return self._grid.run


def _reason(error: Error) -> str:
    text = error.reason or f"error code {error.code}"
    return re.sub(r"\x1b\[\d+m", "", text)  # Ray colours its tracebacks


def _backend(directory: Path, device: str, actors: int | None) -> dict[str, dict[str, Any]]:
    import torch

    gpus = torch.cuda.device_count() if device != "cpu" else 0
    start: dict[str, Any] = {"_temp_dir": str(directory), "configure_logging": False}
    if actors is not None:
        start["num_cpus"] = actors
    return {
        "init_args": start,
        "client_resources": {"num_cpus": 1, "num_gpus": 1.0 if gpus else 0.0},
    }


@contextlib.contextmanager
def _surroundings() -> Iterator[Path]:
    """A private home for Flower and Ray, telemetry off; everything as before afterwards.

    Ray's sockets lie in its directory and a socket's path holds about 100 characters, so the
    directory is in /tmp (where Ray puts it by default), not in a test's own deep one.
    """
    telemetry: Any = import_module("flwr.supercore.telemetry")
    before = dict(os.environ)
    sent = telemetry.FLWR_TELEMETRY_ENABLED
    root = "/tmp" if Path("/tmp").is_dir() else None  # noqa: S108 - a private directory below it
    with tempfile.TemporaryDirectory(
        prefix="fedgraft-ray-", dir=root, ignore_cleanup_errors=True
    ) as name:
        os.environ.update(ENVIRONMENT, FLWR_HOME=name)
        telemetry.FLWR_TELEMETRY_ENABLED = "0"  # read from the environment at import: too early
        try:
            yield Path(name)
        finally:
            telemetry.FLWR_TELEMETRY_ENABLED = sent
            os.environ.clear()
            os.environ.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Flower's warnings, but not its wish to be called otherwise, nor errors that are raised."""

    def passes(record: logging.LogRecord) -> bool:
        deprecated = "`run_simulation` function is deprecated" in record.getMessage()
        raised = record.module in RUNTIME_MODULES
        return record.levelno >= logging.WARNING and not deprecated and not raised

    logger = logging.getLogger("flwr")
    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


def _see_off(processes: Iterable[psutil.Process]) -> None:
    """Waits for Ray's processes to end, and ends those that do not."""
    _, alive = psutil.wait_procs(list(processes), timeout=EXIT_PATIENCE)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=EXIT_PATIENCE)
    with warnings.catch_warnings():  # Ray leaves its pipes to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
