from __future__ import annotations

import datetime as dt
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedgraft_common.errors import ServerError
from fedgraft_common.plan import Plan
from fedgraft_server.authority import Authority, create
from fedgraft_server.continuation import ATTEMPTS, Continuation, standing
from fedgraft_server.registry import Registry, utc_now
from fedgraft_server.run_folder import COMPLETED, FAILED, Outcome, RunFacts, RunFolder
from fedgraft_server.runs import Runs, RunState
from fedgraft_server.settings import FederationTable, ServerDirectory, Settings

PLAN = Plan().replace({"aggregation.sites": 2, "aggregation.minimum_sites": 1})
EARLY, LATE = "2030-01-01T00:00:00+00:00", "2030-01-01T01:00:00+00:00"
NOON = dt.datetime.fromisoformat(EARLY).timestamp() + 1800


def state(number: int, status: str = "running", claimed: str = LATE, name: str = "") -> RunState:
    outcome = "failed" if status == "finished" else ""
    return RunState(number, name, status, outcome, "", claimed, claimed, "")


@dataclass
class Link:
    """Stands in for the SuperLink's Control API."""

    states: list[RunState] = field(default_factory=list)
    started: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)
    error: Exception | None = None
    asked: int = 0

    def all(self) -> list[RunState]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.states

    def of(self, folder: str) -> list[RunState]:
        return [state for state in self.all() if state.folder == folder]

    def stop(self, number: int) -> None:
        self.stopped.append(number)
        self.states = [
            s if s.id != number else state(number, "finished", name=s.folder) for s in self.states
        ]

    def start(self, plan: Plan, folder: Path, sites: list[int], *_: Any) -> int:
        number = 100 + len(self.started)
        self.started.append((number, tuple(sorted(sites))))
        self.states = [*self.states, state(number, "pending", "", folder.name)]
        return number


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> ServerDirectory:
    """Of a server with two sites, nodes 11 and 12."""
    made = ServerDirectory(tmp_path_factory.mktemp("server") / "dir")
    create(made, Settings(federation=FederationTable(name="t", host="localhost")), utc_now())
    authority = Authority.load(made)
    with Registry(made.registry) as registry:
        for name in ("north", "south"):
            key = ec.generate_private_key(ec.SECP256R1()).public_key()
            issued = authority.issue_site(name, key, dt.timedelta(1), utc_now())
            secret = registry.invite(name, (), dt.timedelta(hours=1))
            registry.join(secret, f"key of {name}", {name: issued}.__getitem__)
        registry.set_node_ids({"key of north": 11, "key of south": 12})
    return made


@pytest.fixture
def folder(directory: ServerDirectory, request: pytest.FixtureRequest) -> RunFolder:
    """A run that was started and that nobody works on."""
    for other in RunFolder.all(directory.runs):
        other.forget()
    made = RunFolder(directory.runs / request.node.name.replace("[", "-").strip("]"))
    made.write(RunFacts(json.loads(PLAN.canonical), "signed", ("north", "south")))
    return made


Look = Callable[[], None]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def link(folder: RunFolder) -> Link:
    """Flower has a process for the run, begun by the SuperExec that is alive."""
    return Link([state(1, name=folder.name)])


@pytest.fixture
def alive() -> list[int]:
    """How many processes the SuperExec has: one, that of the run."""
    return [1]


@pytest.fixture
def look(directory: ServerDirectory, link: Link, clock: Clock, alive: list[int]) -> Look:
    return Continuation(directory, cast(Runs, link), lambda: NOON, lambda: alive[0], clock).look


def test_a_run_that_is_worked_on_is_left_alone(folder: RunFolder, link: Link, look: Look) -> None:
    lock = folder.take(1)
    look()
    assert link.asked == 0  # nor is Flower asked, all the time it runs
    lock.release()
    look()
    assert link.stopped == [1]
    assert link.started == [(100, (11, 12))]


@pytest.mark.parametrize("how", ["completed", "failed", "stopped"])
def test_a_run_that_is_over_is_left_alone(
    folder: RunFolder, link: Link, look: Look, how: str
) -> None:
    if how == "stopped":
        folder.set_stopped(True)
    else:
        folder.end(Outcome(how))
    link.states = [state(1, "finished", name=folder.name)]
    look()
    assert (link.asked, link.started) == (0, [])


@pytest.mark.parametrize(("processes", "patience"), [(1, 300), (0, 3)])
def test_a_process_gets_time_to_begin_while_it_is_alive(
    folder: RunFolder, link: Link, look: Look, clock: Clock, alive: list[int],
    processes: int, patience: int,
) -> None:  # fmt: skip
    alive[0] = processes
    look()
    clock.now += patience - 1
    look()
    assert link.started == []
    clock.now += 2
    look()
    assert link.stopped == [1]
    assert len(link.started) == 1


def test_the_process_of_another_run_does_not_count(
    directory: ServerDirectory, folder: RunFolder, link: Link, look: Look, clock: Clock
) -> None:
    other = RunFolder(directory.runs / "other")
    other.write(folder.facts)
    lock = other.take(77)
    look()
    clock.now += 4
    look()
    assert len(link.started) == 1
    lock.release()
    other.forget()


def test_a_pending_run_waits_for_the_superexec(
    folder: RunFolder, link: Link, look: Look, clock: Clock
) -> None:
    link.states = [state(1, "pending", "", folder.name)]
    look()
    clock.now += 1000
    look()
    assert link.started == []


def test_what_an_earlier_superexec_began_is_dead(folder: RunFolder, link: Link, look: Look) -> None:
    link.states = [state(1, "running", EARLY, folder.name)]
    look()
    assert link.stopped == [1]
    assert len(link.started) == 1


@pytest.mark.parametrize("known", ["finished", "unknown"])
def test_a_run_that_ended_without_saying_how_goes_on(
    folder: RunFolder, link: Link, look: Look, known: str
) -> None:
    """Flower's word for it may be `failed` or `stopped`; or Flower never heard of it."""
    link.states = [state(1, "finished", name=folder.name)] if known == "finished" else []
    look()
    assert (link.stopped, len(link.started)) == ([], 1)
    look()
    assert len(link.started) == 1  # pending now


def test_another_runs_process_says_nothing(folder: RunFolder, link: Link, look: Look) -> None:
    link.states = [state(1, name="another")]
    look()
    assert link.stopped == []
    assert len(link.started) == 1


def test_attempts_are_further_apart_and_have_an_end(
    folder: RunFolder, link: Link, look: Look, clock: Clock
) -> None:
    def die() -> None:
        link.states = [state(1, "finished", name=folder.name)]

    waits = []
    for _ in range(ATTEMPTS):
        die()
        before, count = clock.now, len(link.started)
        while len(link.started) == count:
            look()
            clock.now += 0.5
        waits.append(clock.now - before)
    assert waits[0] < waits[3] < waits[5]
    assert max(waits) <= 61
    die()
    clock.now += 61
    look()
    assert len(link.started) == ATTEMPTS
    assert folder.outcome is not None and folder.outcome.word == FAILED
    assert f"died {ATTEMPTS} times in a row before it had finished round 1" in folder.outcome.reason


def test_a_finished_round_makes_attempts_count_anew(
    folder: RunFolder, link: Link, look: Look, clock: Clock
) -> None:
    for number in range(1, 2 * ATTEMPTS):
        (folder.path / f"round-{number:06d}.safetensors").touch()
        link.states = [state(1, "finished", name=folder.name)]
        clock.now += 2
        look()
        assert len(link.started) == number


def test_a_superlink_that_is_away_is_no_attempt(
    folder: RunFolder, link: Link, look: Look, clock: Clock
) -> None:
    folder.take(1).release()
    link.error = ServerError("SuperLink", "away", "an answer", "Wait.")
    for _ in range(3 * ATTEMPTS):
        with pytest.raises(ServerError):
            look()
    link.error = None
    look()
    assert len(link.started) == 1
    assert folder.outcome is None


def test_one_damaged_run_does_not_hold_up_the_others(
    directory: ServerDirectory, folder: RunFolder, link: Link, look: Look
) -> None:
    damaged = RunFolder(directory.runs / "a-damaged")
    damaged.path.mkdir(exist_ok=True)
    (damaged.path / "run.json").write_text("{")
    folder.take(1).release()
    look()
    assert len(link.started) == 1
    damaged.forget()


def test_a_run_goes_on_without_a_revoked_site_if_enough_are_left(
    directory: ServerDirectory, folder: RunFolder, link: Link, look: Look, clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder.take(1).release()
    facts = RunFacts(json.loads(PLAN.canonical), "signed", ("north", "gone"))
    folder.write(facts)
    look()
    assert link.started == [(100, (11,))]
    assert "without gone" in caplog.text
    needy = Plan().replace({"aggregation.sites": 2, "aggregation.minimum_sites": 2})
    folder.write(RunFacts(json.loads(needy.canonical), "signed", ("north", "gone")))
    link.states = [state(1, "finished", name=folder.name)]
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            clock.now += 1
            look()
    assert len(link.started) == 1
    assert caplog.text.count("at least 2 (aggregation.minimum_sites)") == 1  # said once


def test_a_command_that_starts_it_is_not_disturbed(
    folder: RunFolder, link: Link, look: Look
) -> None:
    link.states = []
    with folder.changing():
        look()
    assert link.started == []


@pytest.mark.parametrize(
    ("newest", "word"),
    [(None, "interrupted"), ("finished", "interrupted"), ("pending", "pending"),
     ("starting", "starting"), ("running", "running")],
)  # fmt: skip
def test_standing(folder: RunFolder, newest: str | None, word: str) -> None:
    known = None if newest is None else state(1, newest, name=folder.name)
    assert standing(folder, known) == word
    lock = folder.take(1)
    assert standing(folder, known) == "running"
    lock.release()
    folder.set_stopped(True)
    assert standing(folder, known) == "stopped"
    folder.end(Outcome(COMPLETED))
    assert standing(folder, known) == "completed"
