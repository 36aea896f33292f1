from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedgraft_common.adapted import adapted_backbone
from fedgraft_common.errors import CheckpointError, MessageError
from fedgraft_common.messages import (
    ADAPTER,
    STATUS,
    Status,
    Tensors,
    TensorSpec,
    from_record,
    read_request,
    to_record,
    write_reply,
)
from fedgraft_common.plan import Plan, parse_plan
from fedgraft_server.federation import RoundSummary, run_federation, server_app, usable_updates
from fedgraft_simulations.local_grid import LocalGrid, local_context

SITES = 4
SCHEMA = (TensorSpec("a", (2,)),)
Answer = Callable[[Message, int], Message]


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.ERROR, "flwr"):
        yield


@pytest.fixture
def plan(resnet_directory: Path) -> Plan:
    return Plan().replace(
        {
            "backbone.source": f"dir:{resnet_directory}",
            "adapter.method": "film",
            "adapter.layers": "last:1",
            "training.sample_rate": 0.5,
            "aggregation.strategy": "FedAvgM",
            "aggregation.options": {"server_momentum": 0.9},
            "aggregation.sites": SITES,
            "rounds.count": 5,
        }
    )


def distributed(plan: Plan, **lost: int) -> Plan:
    changes: dict[str, object] = {f"privacy.tolerated_{name}": n for name, n in lost.items()}
    summed = {"privacy.mechanism": "distributed", "privacy.secure_aggregation": "summed"}
    return plan.replace(summed | changes)


def echo(message: Message, site: int) -> Message:
    """The adapter, moved by what depends on site and round only."""
    request = read_request(message)
    update = {}
    for name, array in request.adapter.items():
        generator = torch.Generator().manual_seed(1000 * site + request.round)
        value = torch.tensor(array.numpy())
        update[name] = value + torch.randn(value.shape, generator=generator) / 10
    return write_reply(message, request.round, Status.OK, to_record(update))


def grid_of(answer: Answer = echo, sites: int = SITES) -> LocalGrid:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, int(context.node_config["partition-id"]))

    @app.query()
    def keep_final(message: Message, context: Context) -> Message:
        delivered.append(read_request(message).adapter)
        return write_reply(message, 1, Status.KEPT)

    delivered.clear()
    return LocalGrid(app, sites)


delivered: list[ArrayRecord] = []
"""What the sites of the last grid got after the last round."""


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], t) for n, t in other.items())


# --- whole runs


def test_run_reports_every_round_and_exports_the_adapter(plan: Plan, tmp_path: Path) -> None:
    summaries: list[RoundSummary] = []
    final = run_federation(plan, grid_of(), tmp_path, summaries.append, durable=False)
    assert [s.number for s in summaries] == [1, 2, 3, 4, 5]
    assert {s.sites for s in summaries} == {SITES}
    size = sum(t.nbytes for t in final.values())
    assert {s.bytes_received for s in summaries} == {SITES * size}
    assert same(summaries[-1].adapter, final)
    exported = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(exported)
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in exported)


def test_sites_get_the_plan_and_the_round_s_adapter(plan: Plan, tmp_path: Path) -> None:
    seen: list[tuple[int, str, Tensors]] = []
    summaries: list[RoundSummary] = []
    start = adapted_backbone(plan)

    def note(message: Message, site: int) -> Message:
        request = read_request(message)
        if site == 0:
            tensors = from_record(request.adapter, start.schema)
            seen.append((request.round, request.plan, tensors))
        return echo(message, site)

    run_federation(plan, grid_of(note), tmp_path, summaries.append, durable=False)
    assert [number for number, _, _ in seen] == [1, 2, 3, 4, 5]
    assert {parse_plan_hash(text) for _, text, _ in seen} == {plan.hash}
    assert same(seen[0][2], start.state())
    assert all(same(seen[i + 1][2], summaries[i].adapter) for i in range(4))


def parse_plan_hash(text: str) -> str:
    return parse_plan(json.loads(text), origin="request").hash


def test_finished_run_asks_nobody_again(plan: Plan, tmp_path: Path) -> None:
    final = run_federation(plan, grid_of(), tmp_path, durable=False)

    def never(message: Message, site: int) -> Message:
        raise AssertionError("a finished run asked a site")

    assert same(run_federation(plan, grid_of(never), tmp_path, durable=False), final)


@pytest.mark.parametrize("mechanism", ["local", "distributed"])
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_cut_and_resumed_run_equals_the_uninterrupted_one(
    plan: Plan, tmp_path: Path, cut: int, mechanism: str
) -> None:
    plan = distributed(plan) if mechanism == "distributed" else plan
    whole: list[RoundSummary] = []
    expected = run_federation(plan, grid_of(), tmp_path / "whole", whole.append, durable=False)

    def power_cut(summary: RoundSummary) -> None:
        if summary.number == cut:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_federation(plan, grid_of(), tmp_path / "cut", power_cut, durable=False)
    rest: list[RoundSummary] = []
    found = run_federation(plan, grid_of(), tmp_path / "cut", rest.append, durable=False)
    assert [s.number for s in rest] == list(range(cut + 1, 6))
    assert same(found, expected)
    assert all(same(s.adapter, whole[s.number - 1].adapter) for s in rest)


def test_directory_of_another_plan(plan: Plan, tmp_path: Path) -> None:
    run_federation(plan, grid_of(), tmp_path, durable=False)
    with pytest.raises(CheckpointError, match="choose another directory"):
        run_federation(plan.replace({"seed": 5}), grid_of(), tmp_path, durable=False)


def test_as_a_server_app(plan: Plan, tmp_path: Path) -> None:
    summaries: list[RoundSummary] = []
    server_app(plan, tmp_path, summaries.append, durable=False)(grid_of(), local_context(0, 1))
    assert len(summaries) == 5


# --- replies that cannot be used


def reply_with(
    round_number: int, status: str, adapter: ArrayRecord | None
) -> Callable[[Message], Message]:
    def answer(message: Message) -> Message:
        content = RecordDict({STATUS: ConfigRecord({"round": round_number, STATUS: status})})
        if adapter is not None:
            content[ADAPTER] = adapter
        return Message(content, reply_to=message)

    return answer


def forged(data: bytes) -> ArrayRecord:
    return ArrayRecord({"a": Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=data)})


GOOD = to_record({"a": torch.ones(2)})
BAD: dict[str, Callable[[Message], Message]] = {
    "refused": reply_with(3, "refused", ArrayRecord()),
    "refused but with a tensor": reply_with(3, "refused", GOOD),
    "failed": reply_with(3, "failed", ArrayRecord()),
    "made-up status": reply_with(3, "great", GOOD),
    "earlier round": reply_with(2, "ok", GOOD),
    "later round": reply_with(4, "ok", GOOD),
    "NaN": reply_with(3, "ok", to_record({"a": torch.tensor([1.0, float("nan")])})),
    "infinity": reply_with(3, "ok", to_record({"a": torch.tensor([1.0, float("inf")])})),
    "another shape": reply_with(3, "ok", to_record({"a": torch.ones(3)})),
    "another type": reply_with(3, "ok", to_record({"a": torch.ones(2).double()})),
    "one tensor too many": reply_with(3, "ok", to_record({"a": torch.ones(2), "b": torch.ones(2)})),
    "empty adapter": reply_with(3, "ok", ArrayRecord()),
    "no adapter": reply_with(3, "ok", None),
    "damaged bytes": reply_with(3, "ok", forged(b"rubbish")),
    "an archive": reply_with(3, "ok", forged(b"PK\x03\x04rubbish")),
    "no content": lambda message: Message(RecordDict(), reply_to=message),
    "Flower's error": lambda message: Message(Error(0, "it crashed"), reply_to=message),
}


def replies(
    plan: Plan, *answers: Callable[[Message], Message], first_node: int = 1
) -> list[Message]:
    LocalGrid(ClientApp(), 1)  # Flower builds messages inside a run only
    found = []
    for node, answer in enumerate(answers, start=first_node):
        request = Message(RecordDict(), node, "train")
        request.metadata.__dict__["_message_id"] = str(node)
        found.append(answer(request))
    return found


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_reply_is_dropped_and_the_round_goes_on(plan: Plan, kind: str) -> None:
    good = reply_with(3, "ok", GOOD)
    found = usable_updates(plan, SCHEMA, 3, replies(plan, good, BAD[kind], good))
    assert len(found) == 2
    assert all(torch.equal(update["a"], torch.ones(2)) for update in found)


@pytest.mark.parametrize("kind", ["refused", "NaN", "earlier round", "Flower's error"])
def test_too_few_updates(plan: Plan, kind: str) -> None:
    good = reply_with(3, "ok", GOOD)
    with pytest.raises(MessageError) as caught:
        usable_updates(plan, SCHEMA, 3, replies(plan, good, BAD[kind]))
    text = str(caught.value)
    assert text.startswith("round 3: found '1 usable updates, 1 without one")
    assert "at least 2" in text
    assert "it crashed" not in text


@pytest.mark.parametrize(("minimum", "arrive"), [(1, 1), (2, 2), (3, 3), (4, 4)])
def test_minimum_sites(plan: Plan, minimum: int, arrive: int) -> None:
    plan = plan.replace({"aggregation.minimum_sites": minimum})
    good = [reply_with(3, "ok", GOOD)] * arrive
    assert len(usable_updates(plan, SCHEMA, 3, replies(plan, *good))) == arrive
    with pytest.raises(MessageError, match=f"at least {minimum}"):
        usable_updates(plan, SCHEMA, 3, replies(plan, *good[1:]))


@pytest.mark.parametrize(("dropouts", "needed"), [(0, 4), (1, 3), (2, 2)])
def test_distributed_needs_every_noise_share(plan: Plan, dropouts: int, needed: int) -> None:
    plan = distributed(plan, dropouts=dropouts)
    good = [reply_with(3, "ok", GOOD)] * needed
    assert len(usable_updates(plan, SCHEMA, 3, replies(plan, *good))) == needed
    with pytest.raises(MessageError, match=f"at least {needed}"):
        usable_updates(plan, SCHEMA, 3, replies(plan, *good[1:]))


def test_distributed_does_not_count_colluders_as_noise(plan: Plan) -> None:
    """With one colluder tolerated, h = 3 shares of sigma C / sqrt(3) must come from honest sites.

    Three updates that include the colluder's hold two unknown shares: too little noise.
    """
    good = [reply_with(3, "ok", GOOD)] * 3
    with pytest.raises(MessageError, match="at least 4"):
        usable_updates(distributed(plan, colluders=1), SCHEMA, 3, replies(plan, *good))


def test_one_site_counts_once(plan: Plan) -> None:
    """A site that answers twice must not stand in for another's noise."""
    good = reply_with(3, "ok", GOOD)
    twice = replies(plan, good) + replies(plan, good)
    with pytest.raises(MessageError, match="1 usable update"):
        usable_updates(plan, SCHEMA, 3, twice)


def test_the_order_of_updates_is_that_of_their_bytes(plan: Plan) -> None:
    """Floating-point sums depend on the order; replies arrive in any, from nodes of any number."""
    answers = [reply_with(3, "ok", to_record({"a": torch.full((2,), float(i))})) for i in range(4)]
    first = [float(u["a"][0]) for u in usable_updates(plan, SCHEMA, 3, replies(plan, *answers))]
    for order in ((2, 0, 3, 1), (3, 2, 1, 0)):
        arrived = replies(plan, *(answers[i] for i in order))
        found = usable_updates(plan, SCHEMA, 3, arrived)
        assert [float(update["a"][0]) for update in found] == first


def test_the_final_adapter_reaches_every_site(plan: Plan, tmp_path: Path) -> None:
    final = run_federation(plan, grid_of(), tmp_path, durable=False)
    schema = adapted_backbone(plan).schema
    assert len(delivered) == SITES
    assert all(same(from_record(record, schema), final) for record in delivered)


def test_the_operators_signature_goes_with_the_plan(plan: Plan, tmp_path: Path) -> None:
    seen: set[str] = set()

    def note(message: Message, site: int) -> Message:
        seen.add(read_request(message).signature)
        return echo(message, site)

    run_federation(plan, grid_of(note), tmp_path, durable=False, signature="ab12")
    assert seen == {"ab12"}


# --- rounds that fail, in a run


def test_failing_round_leaves_the_checkpoint_of_the_one_before(plan: Plan, tmp_path: Path) -> None:
    def ill(message: Message, site: int) -> Message:
        if read_request(message).round == 3 and site > 0:
            return write_reply(message, 3, Status.FAILED)
        return echo(message, site)

    with pytest.raises(MessageError, match="round 3"):
        run_federation(plan, grid_of(ill), tmp_path, durable=False)
    assert max(path.name for path in tmp_path.glob("round-*")) == "round-000002.safetensors"
    expected = run_federation(plan, grid_of(), tmp_path / "healthy", durable=False)
    assert same(run_federation(plan, grid_of(), tmp_path, durable=False), expected)


def test_a_site_that_drops_out_is_left_out_of_the_mean(plan: Plan, tmp_path: Path) -> None:
    plan = plan.replace({"aggregation.options": {}, "rounds.count": 1})
    updates: list[Tensors] = []
    schema = adapted_backbone(plan).schema

    def partly(message: Message, site: int) -> Message:
        if site == 2:
            return write_reply(message, 1, Status.POLICY)
        reply = echo(message, site)
        updates.append(from_record(reply.content.array_records[ADAPTER], schema))
        return reply

    summaries: list[RoundSummary] = []
    found = run_federation(plan, grid_of(partly), tmp_path, summaries.append, durable=False)
    assert summaries[0].sites == 3
    for name, value in found.items():
        mean = torch.stack([u[name].double() for u in updates]).mean(dim=0).float()
        torch.testing.assert_close(value, mean, rtol=1e-6, atol=1e-6)


def test_deadline_goes_to_the_grid(plan: Plan, tmp_path: Path) -> None:
    seen: list[float | None] = []

    class Watching(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):  # type: ignore[no-untyped-def]
            seen.append(timeout)
            return super().send_and_receive(messages, timeout=timeout)

    plan = plan.replace({"rounds.deadline": 12.5, "rounds.count": 2})
    grid: Grid = Watching(grid_of()._app, SITES)
    run_federation(plan, grid, tmp_path, durable=False)
    assert seen == [12.5, 12.5, 12.5]  # two rounds and the delivery of the final adapter
