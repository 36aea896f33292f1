"""The resident site: one warm process that asks, answers, and comes back after every failure.

    connect -> ask -> answer in this process -> send -> ask ...
       ^                                          |
       +------ wait (exponential, full jitter) <--+  whenever the connection fails

A site asks; nobody calls it. While a run is active its server holds each question open until there
is an answer. Questions are further apart the longer nothing came: an idle site costs next to
nothing, a busy one loses about a hundredth of a round's time. A reply that could not be sent is
kept and sent again, the same bytes, before anything else is asked.

SIGTERM and the first SIGINT let the round under way finish and its reply leave; a second SIGINT
abandons it. An abandoned round counts as spent in the ledger.
"""

from __future__ import annotations

import logging
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Final, Protocol

from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp

from fedgraft_client.connection import Outgoing, RunOver
from fedgraft_client.health import Health, State
from fedgraft_common.errors import FedgraftError, MessageError
from fedgraft_common.logs import about
from fedgraft_common.messages import PLAN, ROUND, STATUS, Status, read_status, write_reply

log = logging.getLogger(__name__)

_SLICE: Final = 0.25  # seconds; a signal is noticed at the latest after this long


class Connection(Protocol):
    """What the daemon needs of `connection.FleetConnection`."""

    @property
    def node_id(self) -> int:
        """The server's number for this site."""
        ...

    def receive(self, wait: float = 0.0) -> Message | None:
        """The next message, or None; the server may hold the question so many seconds."""
        ...

    def prepare(self, reply: Message) -> Outgoing:
        """Turns a reply into what is sent."""
        ...

    def send(self, reply: Outgoing) -> None:
        """Sends a reply."""
        ...

    def close(self) -> None:
        """Says goodbye."""
        ...


@dataclass(frozen=True, slots=True)
class Pace:
    """How often the daemon asks, in seconds.

    Attributes:
        hold: how long the server may hold a question, while a run is active. A signal is noticed
            at the latest after this long.
        poll: between two questions while a run is active, with a server that holds none.
        idle: between two questions at most.
        share: part of the time since the last message that may pass between two questions: a
            round that took ten minutes can wait a few seconds for its successor.
        first_retry: upper bound of the first wait after a failure; it doubles from there.
        last_retry: upper bound of any wait after a failure.
        drain: how long a draining daemon tries to deliver its last reply.
    """

    hold: float = 2.0
    poll: float = 0.1
    idle: float = 5.0
    share: float = 0.01
    first_retry: float = 1.0
    last_retry: float = 60.0
    drain: float = 30.0

    def question(self, quiet: float) -> float:
        """Seconds until the next question, when nothing came for `quiet` seconds."""
        return min(max(self.share * quiet, self.poll), self.idle)

    def retry(self, failures: int, draw: float) -> float:
        """Seconds until the next attempt.

        Args:
            failures: attempts that failed in a row, from 1.
            draw: uniform in [0, 1): full jitter keeps sites apart that lost the server together.
        """
        return draw * min(self.first_retry * 2.0 ** min(failures - 1, 60), self.last_retry)


class Abandoned(BaseException):
    """The operator does not want to wait for the round under way."""


@dataclass(slots=True)
class Daemon:
    """One site's daemon. `run` returns when it was told to stop.

    Attributes:
        name: the site, for the log.
        connect: makes a connection, or raises `LinkError`.
        app: answers messages; `fedgraft_client.app.client_app`.
        pace: how often it asks.
        health: its account of itself.
        on_change: called after `health` changed; writes the status file.
        on_answer: told about each answer: Flower's message type, status and seconds it took.
        is_outdated: whether the connection is to be made anew; asked when there is nothing to do.
        clock: monotonic seconds.
        wall: seconds since the epoch.
        sleep: waits.
        draw: uniform in [0, 1).
    """

    name: str
    connect: Callable[[], Connection]
    app: ClientApp
    pace: Pace = field(default_factory=Pace)
    health: Health = field(default_factory=Health)
    on_change: Callable[[Health], None] = lambda _: None
    on_answer: Callable[[str, Status, float], None] = lambda *_: None
    is_outdated: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = random.random
    _stopping: float | None = None  # when it was asked to stop
    _pending: Outgoing | None = None
    _failures: int = 0

    def stop(self) -> None:
        """Finish the round under way, send its reply, then return from `run`."""
        if self._stopping is None:
            self._stopping = self.clock()
            self.health.draining = True

    def run(self) -> None:
        """Asks and answers until told to stop. It never gives up by itself.

        Raises:
            Abandoned: a second SIGINT interrupted a round (only inside `signals`).
        """
        try:
            while not self._done():
                try:
                    self._session()
                except Exception as error:  # a site that gave up would have to be visited
                    self._failed(error)
        finally:
            self._enter(State.STOPPED, connected=False)
            log.info("stopped", extra={"action": "stop", "site": self.name})

    def _session(self) -> None:
        """One connection, from activation until it fails, is outdated, or the daemon stops."""
        self._enter(State.CONNECTING, connected=False)
        connection = self.connect()
        try:
            self.health.connections += 1
            self._enter(State.WAITING, connected=True)
            log.info("connected", extra={"action": "connect", "site": self.name})
            heard = self.clock()
            while True:
                if self._pending is not None:
                    self._deliver(connection)
                if self._stopping is not None:
                    return
                pause = self.pace.question(self.clock() - heard)
                due = self.clock() + pause
                if self._ask(connection, self.pace.hold if pause <= self.pace.hold else 0.0):
                    heard = self.clock()
                elif self.is_outdated():
                    return
                else:
                    self._wait(due - self.clock())  # a question that was held was the pause
                self._failures = 0
        finally:
            connection.close()

    def _ask(self, connection: Connection, hold: float) -> bool:
        """Whether there was a message; its reply is then pending."""
        try:
            message = connection.receive(hold)
        except MessageError as error:
            self._note(error, "refuse")
            return True
        except RunOver:
            return True
        if message is None:
            return False
        run = str(message.metadata.run_id)
        self.health.run = run
        self._enter(State.WORKING)
        facts = {"run": run, "round": _asked_round(message), "site": self.name}
        log.info("received a request", extra={"action": "receive", **facts})
        began = self.clock()
        with about(**facts):
            reply = self._answer(message, connection.node_id)
        self._pending = connection.prepare(reply)
        status = read_status(reply)
        self.health.status = status.value
        self.on_answer(message.metadata.message_type, status, self.clock() - began)
        if status is Status.OK:
            self.health.round = _number(reply, STATUS)
        log.info("answered: %s", status, extra={"action": "answer", **facts})
        return True

    def _answer(self, message: Message, node: int) -> Message:
        context = Context(message.metadata.run_id, node, UserConfig(), RecordDict(), UserConfig())
        try:
            return self.app(message, context)
        except Exception as error:  # its text stays here
            self._note(error, "fail")
            return write_reply(message, 0, Status.FAILED)

    def _deliver(self, connection: Connection) -> None:
        """Sends the pending reply; it stays pending if the connection fails."""
        if self._pending is None:
            return
        self._enter(State.SENDING)
        facts = {"run": str(self._pending.run), "site": self.name}
        try:
            connection.send(self._pending)
            self.health.answered += 1
            self.health.last_answer = self.wall()
            log.info("sent the reply", extra={"action": "send", **facts})
        except RunOver:
            log.info("the run is over; the reply was not sent", extra={"action": "drop", **facts})
        except MessageError as error:  # an answer of the server that is too large to be one
            self._note(error, "drop")
        self._pending = None
        self._enter(State.WAITING, connected=True)

    def _done(self) -> bool:
        if self._stopping is None:
            return False
        return self._pending is None or self.clock() - self._stopping >= self.pace.drain

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        wait = self.pace.retry(self._failures, self.draw())
        self._enter(State.CONNECTING, connected=False)
        self._note(error, "disconnect")
        log.info("next attempt in %.1f s", wait, extra={"action": "wait", "site": self.name})
        self._wait(wait)

    def _wait(self, seconds: float) -> None:
        """Sleeps in slices: after a signal, Python goes on sleeping."""
        end = self.clock() + seconds
        while (left := end - self.clock()) > 0 and not self._done():
            self.sleep(min(left, _SLICE))

    def _note(self, error: Exception, action: str) -> None:
        self.health.last_error = str(error) if isinstance(error, FedgraftError) else repr(error)
        level = logging.WARNING if isinstance(error, FedgraftError) else logging.ERROR
        log.log(
            level, "%s", self.health.last_error, extra={"action": action, "site": self.name},
            exc_info=None if isinstance(error, FedgraftError) else error,
        )  # fmt: skip
        self.on_change(self.health)

    def _enter(self, state: State, connected: bool | None = None) -> None:
        if connected is not None:
            self.health.connected = connected
        if state is not self.health.state or not self.health.since:
            self.health.state, self.health.since = state, self.wall()
        self.on_change(self.health)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop the daemon; a second SIGINT abandons. The main thread only."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("signals can only be handled in the main thread")
        interrupts = 0

        def terminate(number: int, frame: FrameType | None) -> None:
            self.stop()

        def interrupt(number: int, frame: FrameType | None) -> None:
            nonlocal interrupts
            interrupts += 1
            self.stop()
            if interrupts > 1:
                raise Abandoned

        before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, terminate),
            signal.SIGINT: signal.signal(signal.SIGINT, interrupt),
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _asked_round(message: Message) -> int | None:
    return _number(message, PLAN) or None


def _number(message: Message, record: str) -> int:
    config = message.content.config_records.get(record) if message.has_content() else None
    number = config.get(ROUND, 0) if config is not None else 0
    return number if isinstance(number, int) else 0
