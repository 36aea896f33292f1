"""Counts that may leave: what they count, how far a unit moves them, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgraft_client.data import Records
from fedgraft_client.evaluation import SENSITIVITY, exact_counts, noised
from fedgraft_client.head import LinearHead
from fedgraft_client.policy import Policy
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.runtime import Runtime
from fedgraft_client.site import Site, SiteConfig
from fedgraft_client.store import SiteStore
from fedgraft_common.accounting import SamplingEvent, epsilon
from fedgraft_common.errors import EgressError, MessageError, PolicyError
from fedgraft_common.messages import Counts, Status, read_counts, to_record
from fedgraft_common.plan import Plan

HEAD = LinearHead(2, 2)
torch.nn.init.eye_(HEAD.linear.weight)
torch.nn.init.zeros_(HEAD.linear.bias)


def records(labels: list[int], units: list[int] | None = None) -> Records:
    return Records(
        torch.zeros(len(labels), 1, 2, 2),
        torch.tensor(labels),
        None if units is None else torch.tensor(units),
    )


def features(predictions: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predictions), 2).float()


def test_records_are_counted() -> None:
    assert exact_counts(features([0, 1, 1]), HEAD, records([0, 1, 0])) == Counts(2.0, 3.0)


def test_units_count_once_however_many_records_they_have() -> None:
    held = records([0, 0, 0, 0, 1], [0, 0, 0, 0, 1])
    assert exact_counts(features([0, 0, 0, 1, 1]), HEAD, held) == Counts(1.75, 2.0)


@settings(max_examples=50, deadline=None)
@given(
    units=st.lists(
        st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=6),
        min_size=2,
        max_size=8,
    ),
    gone=st.integers(0, 7),
)
def test_a_unit_moves_the_counts_by_at_most_the_sensitivity(
    units: list[list[tuple[int, int]]], gone: int
) -> None:
    def count(members: list[list[tuple[int, int]]]) -> Counts:
        flat = [(label, guess, u) for u, rows in enumerate(members) for label, guess in rows]
        held = records([f[0] for f in flat], [f[2] for f in flat])
        return exact_counts(features([f[1] for f in flat]), HEAD, held)

    rest = [rows for number, rows in enumerate(units) if number != gone % len(units)]
    with_, without = count(units), count(rest)
    distance = math.hypot(with_.correct - without.correct, with_.total - without.total)
    assert distance <= SENSITIVITY + 1e-9


def test_the_noise_has_the_planned_size() -> None:
    noise = NoiseSource.for_simulation("evaluate")
    draws = [noised(Counts(10.0, 20.0), 3.0, noise) for _ in range(4000)]
    for values, centre in (([d.correct for d in draws], 10), ([d.total for d in draws], 20)):
        found = torch.tensor(values, dtype=torch.float64)
        assert abs(float(found.mean()) - centre) < 0.3
        assert abs(float(found.std()) / (3 * math.sqrt(2)) - 1) < 0.05
    pairs = torch.tensor([(d.correct, d.total) for d in draws]).T
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.06


TRAIN = Records(
    torch.rand(12, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2
)
HELD_OUT = Records(
    torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 2
)


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime("cpu")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan().replace(
        {
            "adapter.method": "film",
            "adapter.layers": "last:1",
            "training.expected_batch": 6.0,
            "rounds.count": 3,
            "evaluation.every": 2,
            "evaluation.noise_multiplier": 5.0,
        }
    )


class Place:
    def __init__(self, directory: Path, runtime: Runtime) -> None:
        self._directory, self._runtime = directory, runtime
        self.store = SiteStore(directory)

    def site(self, held_out: Records | None = HELD_OUT, **rules: Any) -> Site:
        self.store.close()
        self.store = SiteStore(self._directory)
        policy = Policy(**{"release_evaluation": True, **rules})
        config = SiteConfig("north", ("a", "b"), 12)
        return Site(config, TRAIN, self._runtime, self.store, policy, held_out=held_out)


@pytest.fixture
def place(tmp_path: Path, runtime: Runtime) -> Iterator[Place]:
    made = Place(tmp_path, runtime)
    yield made
    made.store.close()


def request(site: Site, plan: Plan, number: int, kind: str = "evaluate") -> Message:
    TaskIdentity.run_id = TaskIdentity.task_id = 1
    TaskIdentity.node_id = 0
    adapter = to_record(site.bench(plan).initial)
    config = ConfigRecord({"plan": plan.canonical, "round": number})
    message = Message(RecordDict({"adapter": adapter, "plan": config}), 7, kind)
    message.metadata.__dict__["_message_id"] = "request"
    return message


def said(reply: Message) -> tuple[str, dict[str, object]]:
    assert set(reply.content) == {"counts", "status"}
    assert set(reply.content.config_records["status"]) == {"round", "status"}
    return str(reply.content.config_records["status"]["status"]), dict(
        reply.content.metric_records["counts"]
    )


def test_counts_leave_with_noise_and_are_charged(place: Place, plan: Plan) -> None:
    site = place.site()
    status, counts = said(site.evaluate(request(site, plan, 2)))
    assert status == Status.OK
    assert set(counts) == {"correct", "total"}
    assert counts["total"] != 8.0
    assert place.store.ledger.spent() == [SamplingEvent(1.0, 5.0, 1)]
    body = place.store.ledger.entries()[2].body
    assert (body["purpose"], body["mechanism"], body["round"]) == ("evaluate", "local", 2)


def test_asked_again_it_says_the_same(place: Place, plan: Plan) -> None:
    site = place.site()
    first = said(site.evaluate(request(site, plan, 2)))
    assert said(site.evaluate(request(site, plan, 2))) == first
    site = place.site()
    assert said(site.evaluate(request(site, plan, 2))) == first
    assert place.store.ledger.spent() == [SamplingEvent(1.0, 5.0, 1)]


def test_the_whole_run_keeps_its_promise(place: Place, plan: Plan) -> None:
    site = place.site()
    assert plan.evaluations == 2  # after rounds 2 and 3
    for number in (1, 2, 3):
        reply = site.answer(request(site, plan, number, "train"))
        assert reply.content.config_records["status"]["status"] == "ok"
        if plan.evaluates(number):
            assert said(site.evaluate(request(site, plan, number)))[0] == Status.OK
    assert epsilon(place.store.ledger.spent(), plan.privacy.delta) <= plan.privacy.epsilon
    assert sum(e.steps for e in place.store.ledger.spent()) == 5


@pytest.mark.parametrize("number", [1, 4])
def test_a_round_that_the_plan_does_not_evaluate(place: Place, plan: Plan, number: int) -> None:
    site = place.site()
    assert said(site.evaluate(request(site, plan, number))) == (Status.MESSAGE, {})
    assert place.store.ledger.spent() == []


def test_the_policy_must_agree(place: Place, plan: Plan) -> None:
    site = place.site(release_evaluation=False)
    assert said(site.evaluate(request(site, plan, 2))) == (Status.POLICY, {})
    assert "policy.release_evaluation" in str(site.last_error)
    assert place.store.ledger.spent() == []


def test_the_plan_must_ask(place: Place, plan: Plan) -> None:
    site = place.site()
    quiet = plan.replace({"evaluation.every": 0})
    assert said(site.evaluate(request(site, quiet, 2))) == (Status.MESSAGE, {})
    assert place.store.ledger.spent() == []


def test_records_must_be_held_out(place: Place, plan: Plan) -> None:
    site = place.site(held_out=None)
    assert said(site.evaluate(request(site, plan, 2))) == (Status.POLICY, {})
    assert isinstance(site.last_error, PolicyError)
    assert "data.held_out" in str(site.last_error)


def test_other_numbers_do_not_leave(
    place: Place, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedgraft_client import site as site_module

    site = place.site()

    write = site_module.write_counts  # type: ignore[attr-defined]

    def exact(
        message: Message, number: int, status: Status, counts: Counts | None = None
    ) -> Message:
        made: Message = write(message, number, status, Counts(7.0, 8.0) if counts else None)
        return made

    def chatty(
        message: Message, number: int, status: Status, counts: Counts | None = None
    ) -> Message:
        made: Message = write(message, number, status, counts)
        if status is Status.OK:
            made.content.metric_records["counts"]["loss"] = 0.25
        return made

    for leak in (exact, chatty):
        with monkeypatch.context() as patch:
            patch.setattr(site_module, "write_counts", leak)
            assert said(site.evaluate(request(site, plan, 2))) == (Status.FAILED, {})
        assert isinstance(site.last_error, EgressError)


@pytest.mark.parametrize(
    "record",
    [
        None,
        MetricRecord({"correct": 1.0}),
        MetricRecord({"correct": 1.0, "total": 2.0, "loss": 0.5}),
        MetricRecord({"correct": 1, "total": 2}),
        MetricRecord({"correct": math.nan, "total": 2.0}),
        MetricRecord({"correct": [1.0], "total": 2.0}),
    ],
)
def test_malformed_counts_are_refused(record: MetricRecord | None) -> None:
    with pytest.raises(MessageError, match="counts"):
        read_counts(record)


def test_the_cost_is_part_of_the_plans_epsilon(place: Place, plan: Plan) -> None:
    site = place.site()
    quiet = site.step(plan.replace({"evaluation.every": 0}))
    step = site.step(plan)
    assert step.event is not None and quiet.event is not None
    assert step.event.noise_multiplier > quiet.event.noise_multiplier
    assert 0.98 * 8 <= step.epsilon(1e-5) <= 8
