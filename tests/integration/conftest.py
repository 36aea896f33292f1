"""Real TLS on loopback: a federation's directory, its listeners in a thread, sites that join."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

from fedgraft_client.identity import Identity, join
from fedgraft_common.certificates import fingerprint
from fedgraft_common.invite import Invite
from fedgraft_server.authority import Authority, create
from fedgraft_server.bell import Bells
from fedgraft_server.enrollment import Enrollment
from fedgraft_server.gateway import Gateway, upstream_session
from fedgraft_server.listener import Listener, bind, listener
from fedgraft_server.registry import Registry
from fedgraft_server.settings import (
    BackboneTable,
    FederationTable,
    GatewayTable,
    ServerDirectory,
    Settings,
    SuperLinkTable,
)
from fedgraft_server.superlink import SuperLink


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def is_free(port: int) -> bool:
    """Whether nobody listens there now."""
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True


class Clock:
    """The time, moved at will."""

    def __init__(self) -> None:
        self.ahead = dt.timedelta()

    def __call__(self) -> dt.datetime:
        return dt.datetime.now(dt.UTC) + self.ahead


@dataclass
class Upstream:
    """Stands in for the SuperLink: notes what reaches it, answers what it is told to."""

    seen: list[dict[str, Any]] = field(default_factory=list)
    broken_off: int = 0
    status: int = 200
    answer: bytes = b"answer"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                self.broken_off += 1
                return
            body += event.get("body", b"")
            more = event.get("more_body", False)
        self.seen.append(
            {"path": scope["raw_path"], "headers": list(scope["headers"]), "body": body}
        )
        headers = [
            (b"content-type", b"application/x-protobuf"),
            (b"content-length", str(len(self.answer)).encode()),
            (b"x-private", b"1"),
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.answer})


@dataclass
class Federation:
    """A directory, and what runs from it."""

    directory: ServerDirectory
    settings: Settings
    clock: Clock
    upstream: Upstream
    home: Path

    @property
    def registry(self) -> Registry:
        """Opened anew; close it."""
        return Registry(self.directory.registry, self.clock)

    def invite(self, name: str, valid: dt.timedelta = dt.timedelta(hours=1)) -> str:
        """As `fedgraft server invite` does."""
        with self.registry as registry:
            secret = registry.invite(name, ("all",), valid)
        authority = Authority.load(self.directory)
        return Invite(
            name=name,
            host=self.settings.federation.host,
            port=self.settings.gateway.join_port,
            ca_sha256=fingerprint(authority.certificate),
            secret=secret,
            expires=self.clock() + valid,
        ).encode()

    def join(self, name: str) -> Identity:
        """A site with a directory of its own."""
        return join(self.invite(name), self.home / name, self.clock)


def make_federation(path: Path, limits: dict[str, Any] | None = None) -> Federation:
    """A server directory on free ports of loopback."""
    ports = free_ports(4)
    while not is_free(ports[3] + 1):  # the SuperLink takes a second one, the next
        ports = free_ports(4)
    settings = Settings(
        federation=FederationTable(name="test", host="localhost"),
        gateway=GatewayTable(
            **{"bind": "127.0.0.1", "port": ports[0], "join_port": ports[1], **(limits or {})}
        ),
        backbone=BackboneTable(port=ports[2]),
        superlink=SuperLinkTable(port=ports[3]),
    )
    clock = Clock()
    directory = ServerDirectory(path / "server")
    create(directory, settings, clock())
    return Federation(directory, settings, clock, Upstream(), path)


@contextlib.contextmanager
def in_thread(main: Callable[[asyncio.Event], Any]) -> Iterator[None]:
    """Runs a coroutine function in another thread's loop; its event ends it."""
    started, stop = threading.Event(), asyncio.Event()
    loop = uvloop.new_event_loop()
    failures: list[BaseException] = []

    async def run() -> None:
        started.set()
        await main(stop)

    def thread() -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(run())
        except BaseException as error:
            failures.append(error)
            started.set()

    worker = threading.Thread(target=thread)
    worker.start()
    started.wait(10)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        worker.join(20)
        assert not worker.is_alive()
        assert not failures, failures


@contextlib.contextmanager
def listening(federation: Federation) -> Iterator[Federation]:
    """Gateway, joining port and the stand-in for the SuperLink."""
    table = federation.settings.gateway
    superlink = SuperLink(federation.directory, federation.settings)

    async def main(stop: asyncio.Event) -> None:
        directory, settings = federation.directory, federation.settings
        with Registry(directory.registry, federation.clock) as registry:
            async with upstream_session(superlink.client_context()) as session:
                enrollment = Enrollment(
                    registry, settings, Authority.load(directory),
                    directory.operator[0].read_text(), federation.clock,
                )  # fmt: skip
                gateway = Gateway(
                    registry, settings, session, superlink.url, enrollment.renew,
                    bells=Bells.of(federation.directory.runs),
                )  # fmt: skip
                served: list[tuple[Listener, socket.socket]] = [
                    (listener(app, certificate, ca, 100), sock)
                    for (app, certificate, ca), sock in zip(
                        (
                            (gateway, directory.server, directory.ca[0]),
                            (enrollment, directory.server, None),
                            (federation.upstream, directory.superlink, None),
                        ),
                        sockets,
                        strict=True,
                    )
                ]
                tasks = [asyncio.create_task(one.serve([sock])) for one, sock in served]
                await stop.wait()
                for one, _ in served:
                    one.should_exit = True
                await asyncio.gather(*tasks)

    ports = (table.port, table.join_port, settings_port(federation))
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(bind("127.0.0.1", port)) for port in ports]
        for one in sockets:
            one.listen()  # connections wait until the loop takes them
        stack.enter_context(in_thread(main))
        yield federation


def settings_port(federation: Federation) -> int:
    """The stand-in's."""
    return federation.settings.superlink.port


@pytest.fixture(scope="session")
def new_federation() -> Callable[[Path], Federation]:
    """Makes a server directory; nothing runs."""
    return make_federation


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """Listening, with small limits, and no SuperLink behind it but a stand-in."""
    limits = {"max_request_bytes": 2**20, "requests_per_second": 50.0, "burst": 60}
    with listening(make_federation(tmp_path, limits)) as running:
        yield running
