"""The loop that asks and answers, with a connection and a clock that exist in memory only."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import ObjectTree

from fedgraft_client.connection import Outgoing, RunOver
from fedgraft_client.daemon import Abandoned, Daemon, Pace
from fedgraft_client.health import Health, State, read_health
from fedgraft_common.errors import LinkError, MessageError
from fedgraft_common.messages import Status, read_status, write_reply

LOST = LinkError("server", "nothing", "a connection", "Wait.")


def request(number: int = 1, kind: str = "train") -> Message:
    metadata = Metadata(
        run_id=7, message_id=f"m{number}", src_node_id=1, dst_node_id=5, reply_to_message_id="",
        group_id="", created_at=0.0, ttl=1e9, message_type=kind,
    )  # fmt: skip
    plan = ConfigRecord({"plan": "{}", "round": number})
    return make_message(
        metadata=metadata, content=RecordDict({"adapter": ArrayRecord(), "plan": plan})
    )


class World:
    """A server, a network and a clock: what happens next is a list."""

    def __init__(self, *events: object) -> None:
        self.events = list(events)
        self.now = 0.0
        self.slept: list[float] = []
        self.sent: list[Message] = []
        self.connections = 0
        self.closed = 0
        self.connect_errors: list[Exception] = []
        self.send_errors: list[Exception] = []
        self.idle: Callable[[], None] = lambda: None
        self.questions: list[float] = []
        self.node_id = 5

    def connect(self) -> World:
        if self.connect_errors:
            raise self.connect_errors.pop(0)
        self.connections += 1
        return self

    def receive(self, wait: float = 0.0) -> Message | None:
        self.questions.append(self.now)
        event = self.events.pop(0) if self.events else None
        if isinstance(event, Exception):
            raise event
        if event is None and not self.events:
            self.idle()
        assert event is None or isinstance(event, Message)
        return event

    def prepare(self, reply: Message) -> Outgoing:
        return Outgoing(message_to_proto(reply), reply.metadata.run_id, ObjectTree(), {})

    def send(self, reply: Outgoing) -> None:
        if self.send_errors:
            raise self.send_errors.pop(0)
        self.sent.append(message_from_proto(reply.message))

    def close(self) -> None:
        self.closed += 1

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def echo(message: Message) -> Message:
    number = message.content.config_records["plan"]["round"]
    assert isinstance(number, int)
    return write_reply(message, number, Status.OK)


def daemon(
    world: World, answer: Callable[[Message], Message] = echo, pace: Pace | None = None
) -> Daemon:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        assert (context.run_id, context.node_id, dict(context.run_config)) == (7, 5, {})
        return answer(message)

    return Daemon(
        "ward 3", world.connect, app, pace or Pace(), clock=lambda: world.now,
        wall=lambda: 1000.0 + world.now, sleep=world.sleep, draw=lambda: 0.5,
    )  # fmt: skip


def stop_and_echo(made: Daemon, message: Message) -> Message:
    made.stop()
    return echo(message)


def also(*actions: Callable[[float], None]) -> Callable[[float], None]:
    def act(seconds: float) -> None:
        for action in actions:
            action(seconds)

    return act


def run(world: World, **options: object) -> Daemon:
    """Runs until nothing is left to happen."""
    made = daemon(world, **options)  # type: ignore[arg-type]
    world.idle = made.stop
    made.run()
    return made


def test_requests_are_answered_one_by_one_over_one_connection() -> None:
    world = World(request(1), request(2), request(3))
    made = run(world)
    assert [m.metadata.reply_to_message_id for m in world.sent] == ["m1", "m2", "m3"]
    assert {read_status(m) for m in world.sent} == {Status.OK}
    assert (world.connections, world.closed) == (1, 1)
    assert (made.health.answered, made.health.round, made.health.run) == (3, 3, "7")
    assert made.health.state is State.STOPPED
    assert not made.health.connected


def test_questions_are_close_together_and_grow_apart_in_silence() -> None:
    pace = Pace(poll=0.1, idle=5.0, share=0.01)
    assert pace.question(0) == pace.question(10) == 0.1
    assert pace.question(100) == 1.0
    assert pace.question(1e6) == 5.0
    world = World(*[None] * 400, request(1), *[None] * 3)
    run(world)
    gaps = [later - earlier for earlier, later in pairwise(world.questions)]
    assert gaps[0] == pytest.approx(0.1)
    assert max(gaps) > 0.3
    assert gaps[-1] == pytest.approx(0.1)  # a run is active again


def test_waits_after_failures_double_and_have_a_bound() -> None:
    pace = Pace(first_retry=1.0, last_retry=60.0)
    assert [pace.retry(n, 1.0) for n in (1, 2, 3, 6, 7, 5000)] == [1, 2, 4, 32, 60, 60]
    assert pace.retry(5, 0.0) == 0.0
    assert pace.retry(5, 0.25) == 4.0


def test_it_comes_back_however_often_it_fails() -> None:
    world = World(request(1))
    world.connect_errors = [LOST, RuntimeError("a bug below"), LOST] * 300
    made = run(world)
    assert [read_status(m) for m in world.sent] == [Status.OK]
    assert made.health.connections == 1
    assert world.now > 0.5 * 800 * 60
    assert max(world.slept) <= 0.25  # a signal is noticed soon


def test_a_site_that_was_cut_off_for_hours_is_back_within_a_minute() -> None:
    """With the longest draws: by then every wait is as long as it gets."""

    class CutOff(World):
        def connect(self) -> World:
            if self.now < 8 * 3600.0:
                self.attempts = getattr(self, "attempts", 0) + 1
                raise LOST
            return super().connect()

    world = CutOff(request(1))
    made = daemon(world)
    made.draw = lambda: 0.999
    world.idle = made.stop
    made.run()
    assert 8 * 3600.0 <= world.questions[0] <= 8 * 3600.0 + 60.0
    assert world.attempts < 8 * 60 + 10
    assert len(world.sent) == 1


def test_an_outdated_connection_is_made_anew_when_there_is_nothing_to_do() -> None:
    """For a renewed certificate: a connection lasts as long as the server does."""
    world = World(request(1), None, request(2))
    made = daemon(world)
    due = [False, True]
    made.is_outdated = lambda: due.pop(0) if due and world.sent else False
    world.events.insert(2, None)
    world.idle = made.stop
    made.run()
    assert (world.connections, world.closed) == (2, 2)
    assert [m.metadata.reply_to_message_id for m in world.sent] == ["m1", "m2"]
    assert max(world.slept) <= 0.25  # it was no failure
    assert made.health.last_error == ""


def test_a_success_makes_the_next_wait_short_again() -> None:
    world = World(request(1), LOST, request(2))
    world.connect_errors = [LOST] * 8
    made = daemon(world)
    waits: list[float] = []
    made.sleep = also(lambda s: waits.append(world.now), world.sleep)
    world.idle = made.stop
    made.run()
    assert world.connections == 2
    lost_again = [q for q in world.questions if q > 0][1]
    assert world.questions[-1] - lost_again < 2.0


def test_a_reply_that_could_not_be_sent_is_sent_again_before_anything_is_asked() -> None:
    answered: list[str] = []

    def answer(message: Message) -> Message:
        answered.append(message.metadata.message_id)
        return echo(message)

    world = World(request(1), request(2))
    world.send_errors = [LOST, LOST]
    run(world, answer=answer)
    assert answered == ["m1", "m2"]  # one look at the data each
    assert [m.metadata.reply_to_message_id for m in world.sent] == ["m1", "m2"]
    assert world.connections == 3


def test_a_reply_that_nobody_waits_for_is_dropped() -> None:
    world = World(request(1), request(2))
    world.send_errors = [RunOver()]
    run(world)
    assert [m.metadata.reply_to_message_id for m in world.sent] == ["m2"]
    assert world.connections == 1


def test_a_damaged_message_is_noted_and_the_next_one_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    error = MessageError("message", "too much", "less", "It was ignored.")
    world = World(error, RunOver(), request(2))
    made = run(world)
    assert len(world.sent) == 1
    assert world.connections == 1
    assert made.health.last_error == str(error)
    [line] = [r.getMessage() for r in caplog.records if vars(r).get("action") == "refuse"]
    assert line == str(error)


@pytest.mark.parametrize("kind", ["train", "query", "evaluate", "train.other", "system"])
def test_what_goes_wrong_in_the_app_stays_here(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    def stumble(message: Message) -> Message:
        raise ValueError("patient 4711")

    world = World(request(1, kind))
    with caplog.at_level(logging.CRITICAL):
        run(world, answer=stumble)
    [reply] = world.sent
    assert read_status(reply) is Status.FAILED
    assert not reply.has_error()
    assert "4711" not in str(reply.content)


def test_it_finishes_the_round_and_sends_the_reply_when_told_to_stop() -> None:
    world = World(request(1), request(2))
    made = daemon(world, lambda message: stop_and_echo(made, message))
    made.run()
    assert [m.metadata.reply_to_message_id for m in world.sent] == ["m1"]
    assert world.questions == [0.0]
    assert world.closed == 1


def test_draining_gives_up_on_a_server_that_is_gone() -> None:
    world = World(request(1))
    world.send_errors = [LOST] * 1000
    made = daemon(world, lambda message: stop_and_echo(made, message), Pace(drain=30.0))
    made.run()
    assert not world.sent
    assert 30.0 <= world.now < 31.0


def test_it_stops_at_once_while_it_waits_for_a_server() -> None:
    world = World()
    world.connect_errors = [LOST] * 1000
    made = daemon(world)
    made.sleep = also(world.sleep, lambda s: made.stop())
    made.run()
    assert world.connections == 0
    assert world.now <= 0.25


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def answer(message: Message) -> Message:
        signal.raise_signal(number)
        return echo(message)

    world = World(request(1), request(2))
    made = daemon(world, answer)
    with made.signals():
        made.run()
    assert len(world.sent) == 1
    assert made.health.draining
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_interrupt_abandons_the_round() -> None:
    before = signal.getsignal(signal.SIGINT)

    def answer(message: Message) -> Message:
        signal.raise_signal(signal.SIGINT)
        try:
            signal.raise_signal(signal.SIGINT)
        except Exception:  # what `Site.answer` does with everything that goes wrong
            return echo(message)
        return echo(message)

    world = World(request(1))
    made = daemon(world, answer)
    with pytest.raises(Abandoned), made.signals():
        made.run()
    assert not world.sent
    assert world.closed == 1
    assert made.health.state is State.STOPPED
    assert signal.getsignal(signal.SIGINT) is before


def test_log_lines_say_action_run_round_and_site(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fedgraft_client"):
        run(World(request(3)))
    lines = {getattr(r, "action", None): r for r in caplog.records}
    assert list(lines) == ["connect", "receive", "answer", "send", "stop"]
    assert {getattr(r, "site", None) for r in lines.values()} == {"ward 3"}
    answered = lines["answer"]
    assert (getattr(answered, "run", None), getattr(answered, "round", None)) == ("7", 3)


def test_the_status_file_tells_what_the_daemon_does(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    seen: list[State] = []

    def write(health: Health) -> None:
        health.write(path)
        seen.append(read_health(path).state)

    world = World(request(1), LOST, request(2))
    made = daemon(world)
    made.on_change = write
    world.idle = made.stop
    made.run()
    assert [s for s, before in zip(seen, [None, *seen], strict=False) if s is not before] == [
        State.CONNECTING, State.WAITING, State.WORKING, State.SENDING, State.WAITING,
        State.CONNECTING, State.WAITING, State.WORKING, State.SENDING, State.WAITING,
        State.STOPPED,
    ]  # fmt: skip
    found = read_health(path)
    assert found == made.health
    assert found.last_error == str(LOST)
    assert found.connections == 2
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="not a status file"):
        read_health(path)
