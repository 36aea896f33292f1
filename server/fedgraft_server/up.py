"""`fedgraft server up`: SuperLink, gateway, joining port and further services, in one life.

One process holds everything but Flower's SuperLink and SuperExec, which are its children. It ends
on SIGTERM or SIGINT: no new requests, those under way are finished, then services and children
stop. Runs that this cuts short go on at the next start, as they do after a SIGKILL of anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from fedgraft_common.errors import FedgraftError, ServerError
from fedgraft_server.authority import (
    Authority,
    check_own_certificates,
    renew_server_certificates,
)
from fedgraft_server.bell import Bells
from fedgraft_server.continuation import Continuation
from fedgraft_server.enrollment import Enrollment
from fedgraft_server.gateway import Gateway, upstream_session
from fedgraft_server.kept_process import KeptProcess
from fedgraft_server.listener import Listener, bind, listener
from fedgraft_server.program_output import RunLogs
from fedgraft_server.registry import Registry, utc_now
from fedgraft_server.runs import Runs
from fedgraft_server.settings import ServerDirectory
from fedgraft_server.superlink import SuperLink, synchronise

LOG = logging.getLogger(__name__)

Service = Callable[[ServerDirectory, Registry], contextlib.AbstractContextManager[object]]
"""Started (entered) after the directory is checked, stopped (left) after the gateway drained."""

_JOIN_CONNECTIONS: Final = 64
_TICK: Final = 0.5  # seconds between two looks at the registry, or at the runs
_RETRY: Final = 1.0  # seconds between two attempts to reach the SuperLink
_CERTIFICATES: Final = 3600.0  # seconds between two looks at the server's own certificates


async def serve(
    directory: ServerDirectory,
    services: Sequence[Service] = (),
    now: Callable[[], dt.datetime] = utc_now,
) -> None:
    """Runs the server until a signal.

    Args:
        directory: made by `fedgraft server init`.
        services: run beside the gateway, such as the backbone service.
        now: the clock, with time zone.

    Raises:
        FedgraftError: the directory cannot be used, or a port is taken.
    """
    settings = directory.settings()
    authority = Authority.load(directory)
    renew_server_certificates(directory, settings, authority, now())
    check_own_certificates(directory, now())
    stop, joined = asyncio.Event(), asyncio.Event()
    superlink = SuperLink(directory, settings)
    operator_key = directory.operator[0].read_text(encoding="ascii")
    async with contextlib.AsyncExitStack() as stack:
        registry = stack.enter_context(Registry(directory.registry, now))
        carrier, starter = superlink.processes(registry)
        table = settings.gateway
        sites_socket = stack.enter_context(contextlib.closing(bind(table.bind, table.port)))
        join_socket = stack.enter_context(contextlib.closing(bind(table.bind, table.join_port)))
        upstream = await stack.enter_async_context(upstream_session(superlink.client_context()))
        enrollment = Enrollment(
            registry, settings, authority, operator_key, now, on_join=joined.set
        )
        fleet_port = superlink.fleet_port()
        if fleet_port is not None:
            stack.push_async_callback(fleet_port.close)
        gateway = Gateway(
            registry, settings, upstream, superlink.url, enrollment.renew,
            bells=Bells.of(directory.runs), port=fleet_port,
        )  # fmt: skip
        sites = listener(gateway, directory.server, directory.ca[0], table.max_connections)
        joining = listener(enrollment, directory.server, None, _JOIN_CONNECTIONS)

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
            stack.callback(loop.remove_signal_handler, number)
        for service in services:
            stack.enter_context(service(directory, registry))

        def renew_own() -> None:
            if renew_server_certificates(directory, settings, authority, now()):
                LOG.info("own certificate renewed", extra={"action": "renew-server"})
                for served in (sites, joining):
                    served.reload_certificate()

        background = [
            asyncio.create_task(carrier.run(), name="SuperLink"),
            asyncio.create_task(starter.run(), name="SuperExec"),
            asyncio.create_task(_follow(registry, superlink, carrier, joined), name="registry"),
            asyncio.create_task(_continue_runs(directory, superlink, starter), name="runs"),
            asyncio.create_task(_follow_logs(directory), name="logs of runs"),
            asyncio.create_task(_hourly(renew_own), name="certificates"),
        ]
        listening = [
            asyncio.create_task(sites.serve([sites_socket]), name="gateway"),
            asyncio.create_task(joining.serve([join_socket]), name="joining port"),
        ]
        LOG.info(
            "serving %s for sites, joining on port %s", settings.gateway_address, table.join_port,
            extra={"action": "up"},
        )  # fmt: skip
        try:
            stopped = asyncio.create_task(stop.wait())
            watched: set[asyncio.Task[Any]] = {stopped, *background, *listening}
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            LOG.info("draining", extra={"action": "drain"})
            await _drain((sites, joining), listening)
        finally:
            for task in (*background, *listening):
                task.cancel()
            await asyncio.gather(*background, *listening, return_exceptions=True)
        for task in done - {stopped}:
            raise ServerError(
                task.get_name(), task.exception() or "its end", "to run until a signal",
                "Look at the log lines before this; then start again.",
            ) from task.exception()  # fmt: skip


async def _drain(listeners: Sequence[Listener], tasks: Sequence[asyncio.Task[None]]) -> None:
    for served in listeners:
        served.should_exit = True
    await asyncio.wait(tasks)


async def _follow(
    registry: Registry, superlink: SuperLink, carrier: KeptProcess, joined: asyncio.Event
) -> None:
    """Keeps the SuperLink's node keys equal to the registry's sites, across its restarts."""
    context = superlink.client_context()
    seen: tuple[int, int | None] | None = None
    is_away = False
    while True:
        state = (registry.version, carrier.pid)
        if state == seen and not joined.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK):
                    await joined.wait()
            continue
        joined.clear()
        try:
            await asyncio.to_thread(synchronise, registry, superlink.url, context)
        except ServerError as error:
            if not is_away:
                LOG.info("waiting for the SuperLink: %s", error, extra={"action": "wait"})
            is_away = True
            seen = None
            await asyncio.sleep(_RETRY)
            continue
        is_away = False
        seen = state
        count = sum(site.revoked is None for site in registry.sites())
        LOG.info("SuperLink knows %s sites", count, extra={"action": "ready"})


async def _continue_runs(
    directory: ServerDirectory, superlink: SuperLink, starter: KeptProcess
) -> None:
    """Lets every run go on that something killed, for as long as the server runs."""
    with Runs(superlink.address, superlink.client_context(), timeout=10.0) as link:
        continuation = Continuation(directory, link, lambda: starter.started, starter.children)
        while True:
            await asyncio.sleep(_TICK)
            try:
                await asyncio.to_thread(continuation.look)
            except FedgraftError as error:  # the SuperLink is away; `_follow` says so
                LOG.debug("looking after runs: %s", error)
            except Exception:
                LOG.exception("looking after runs", extra={"action": "continue"})


async def _follow_logs(directory: ServerDirectory) -> None:
    """Passes on what runs log."""
    logs = RunLogs(directory.runs)
    while True:
        await asyncio.sleep(_TICK)
        try:
            logs.look()
        except OSError as error:  # a run's directory was taken away meanwhile
            LOG.debug("logs of runs: %s", error)


async def _hourly(work: Callable[[], None]) -> None:
    """Wall-clock hours do not matter here, so a monotonic sleep is enough."""
    last = time.monotonic()
    while True:
        await asyncio.sleep(60)
        if time.monotonic() - last >= _CERTIFICATES:
            last = time.monotonic()
            work()
