"""What a site says, never says and remembers. Long, as all that a site does is in one file."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedgraft_client import site as site_module
from fedgraft_client.data import Records
from fedgraft_client.entry import Kind
from fedgraft_client.ledger import Finished
from fedgraft_client.policy import Policy
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.runtime import Runtime
from fedgraft_client.site import Site, SiteConfig
from fedgraft_client.store import SiteStore, load_sealed
from fedgraft_client.training import train_round
from fedgraft_common.errors import (
    CheckpointError,
    DataError,
    EgressError,
    FedgraftError,
    MessageError,
)
from fedgraft_common.messages import Status, Tensors, from_record, to_record
from fedgraft_common.plan import Plan
from fedgraft_common.signing import sign_plan

RECORDS = Records(
    torch.rand(12, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2
)
PRIVATE = "patient 4711, born 1950"


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime("cpu")


@pytest.fixture(scope="module")
def plan(vit_directory: Path) -> Plan:
    return Plan().replace(
        {
            "backbone.source": f"dir:{vit_directory}",
            "backbone.sha256": sha256(
                (vit_directory / "model.safetensors").read_bytes()
            ).hexdigest(),
            "backbone.frozen_dtype": "float32",
            "adapter.layers": "last:1",
            "adapter.rank": 2,
            "head.training": "private",
            "training.expected_batch": 6.0,
            "privacy.delta": 1e-3,
            "rounds.count": 3,
            "training.schedule": "constant",
        }
    )


MakeSite = Callable[..., Site]


@pytest.fixture
def make_site(runtime: Runtime, tmp_path: Path) -> Iterator[MakeSite]:
    stores: dict[str, SiteStore] = {}

    def make(
        folder: str = "site", simulated: bool = True, name: str = "north", **rules: Any
    ) -> Site:
        if folder in stores:  # a restart: the process before is gone
            stores[folder].close()
        stores[folder] = SiteStore(tmp_path / folder, durable=not simulated)
        config = SiteConfig(name, ("a", "b"), nominal_size=12, simulated=simulated)
        policy = None if simulated else Policy(maximum_delta=1e-3, **rules)
        return Site(config, RECORDS, runtime, stores[folder], policy)

    yield make
    for store in stores.values():
        store.close()


def request(
    plan: Plan | str, number: object, adapter: ArrayRecord | Tensors, extra: bool = False
) -> Message:
    """What a server sends, as Flower hands it over."""
    TaskIdentity.run_id = TaskIdentity.task_id = 1
    TaskIdentity.node_id = 0
    text = plan if isinstance(plan, str) else plan.canonical
    record = adapter if isinstance(adapter, ArrayRecord) else to_record(adapter)
    config: Any = ConfigRecord({"plan": text, "round": number})  # type: ignore[dict-item]
    content = RecordDict({"adapter": record, "plan": config})
    if extra:
        content["more"] = ConfigRecord({})
    message = Message(content, dst_node_id=7, message_type="train")
    message.metadata.__dict__["_message_id"] = "request"
    if isinstance(plan, Plan):
        message.metadata.__dict__["_run_id"] = int(plan.hash[:8], 16)  # one run, one plan
    return message


def initial(site: Site, plan: Plan) -> Tensors:
    return site.bench(plan).initial


def status(reply: Message) -> str:
    return str(reply.content.config_records["status"]["status"])


def tensors(reply: Message, site: Site, plan: Plan) -> Tensors:
    schema = site.bench(plan).adapted.schema
    return from_record(reply.content.array_records["adapter"], schema)


def raw(reply: Message) -> dict[str, bytes]:
    return {name: array.data for name, array in reply.content.array_records["adapter"].items()}


def assert_says_only(reply: Message, number: int, expected: Status) -> None:
    """Everything that Flower would put on the wire, walked record by record."""
    assert not reply.has_error()
    content = reply.content
    assert set(content) == {"adapter", "status"}
    assert set(content.array_records) == {"adapter"}
    assert set(content.config_records) == {"status"}
    assert len(content.metric_records) == 0
    assert dict(content.config_records["status"]) == {"round": number, "status": expected.value}
    if expected is not Status.OK:
        assert len(content.array_records["adapter"]) == 0
    metadata = reply.metadata
    assert metadata.message_type == "train"
    assert metadata.reply_to_message_id == "request"
    assert (metadata.src_node_id, metadata.dst_node_id) == (7, 0)
    assert metadata.group_id == ""
    known = {
        "run_id", "message_id", "src_node_id", "dst_node_id", "src_task_id", "dst_task_id",
        "reply_to_message_id", "group_id", "created_at", "ttl", "message_type", "delivered_at",
    }  # fmt: skip
    assert {name.removeprefix("_") for name in vars(metadata)} == known
    assert PRIVATE not in repr(content) + repr(vars(metadata))


def kept(site: Site, plan: Plan) -> Finished | None:
    return site.store.ledger.finished(plan.hash)


def untouched(site: Site) -> bool:
    """Nothing was spent and nothing is stored."""
    with sqlite3.connect(site.store.ledger.path) as connection:
        rounds = connection.execute("SELECT count(*) FROM rounds").fetchone()[0]
    connection.close()
    return site.store.ledger.spent() == [] and rounds == 0


@pytest.mark.parametrize("mechanism", ["local", "distributed", "none"])
@pytest.mark.parametrize("head", ["private", "fixed"])
def test_what_leaves_in_a_round(make_site: MakeSite, plan: Plan, mechanism: str, head: str) -> None:
    plan = plan.replace(
        {
            "privacy.mechanism": mechanism,
            "privacy.secure_aggregation": "summed",  # masked: test_secure_member.py
            "head.training": head,
            "training.sample_rate": 0.5,
            "aggregation.sites": 4,
        }
    )
    site = make_site()
    reply = site.answer(request(plan, 1, initial(site, plan)))
    assert site.last_error is None
    assert_says_only(reply, 1, Status.OK)
    schema = site.bench(plan).adapted.schema
    arrays = reply.content.array_records["adapter"]
    assert set(arrays) == {spec.name for spec in schema}
    for spec in schema:
        array = arrays[spec.name]
        assert (array.dtype, tuple(array.shape), array.stype) == (
            "float32", spec.shape, "numpy.ndarray",
        )  # fmt: skip
    zero_head = head == "private" and mechanism == "none"  # passes no gradient to the adapter
    assert any(bool(t.any()) for t in tensors(reply, site, plan).values()) is not zero_head
    assert kept(site, plan) is not None
    assert [e.steps for e in site.store.ledger.spent()] == ([] if mechanism == "none" else [1])
    trained = site.trained_head(plan)
    assert trained.linear.weight.any()
    if head == "fixed":
        assert torch.equal(trained.linear.weight, make_site("new").trained_head(plan).linear.weight)


class Count:
    """Counts the rounds that are really trained."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rounds = 0

        def counted(*arguments: Any, **options: Any) -> Tensors:
            self.rounds += 1
            return train_round(*arguments, **options)

        monkeypatch.setattr(site_module, "train_round", counted)


@pytest.mark.parametrize("simulated", [True, False])
def test_the_same_request_again_gets_the_same_bytes(
    make_site: MakeSite, plan: Plan, monkeypatch: pytest.MonkeyPatch, simulated: bool
) -> None:
    count = Count(monkeypatch)
    site = make_site(simulated=simulated)
    first = site.answer(request(plan, 1, initial(site, plan)))
    again = site.answer(request(plan, 1, initial(site, plan)))
    restarted = make_site(simulated=simulated).answer(request(plan, 1, initial(site, plan)))
    other = {name: tensor + 1 for name, tensor in initial(site, plan).items()}
    another_adapter = make_site(simulated=simulated).answer(request(plan, 1, other))
    assert raw(first)
    assert raw(first) == raw(again) == raw(restarted) == raw(another_adapter)
    assert count.rounds == 1
    assert_says_only(again, 1, Status.OK)


@pytest.mark.parametrize("number", [1, 4, 1000])
def test_an_earlier_or_too_late_round_is_refused(
    make_site: MakeSite, plan: Plan, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    site = make_site()
    for done in (1, 2):
        site.answer(request(plan, done, initial(site, plan)))
    before = kept(site, plan), site.store.ledger.spent()
    count = Count(monkeypatch)
    reply = site.answer(request(plan, number, initial(site, plan)))
    assert_says_only(reply, number, Status.MESSAGE)
    assert isinstance(site.last_error, MessageError)
    assert count.rounds == 0
    assert (kept(site, plan), site.store.ledger.spent()) == before


def test_another_start_than_the_seeds_is_refused(make_site: MakeSite, plan: Plan) -> None:
    site = make_site()
    altered = {name: tensor.clone() for name, tensor in initial(site, plan).items()}
    next(iter(altered.values())).view(-1)[0] += 1e-6
    reply = site.answer(request(plan, 1, altered))
    assert_says_only(reply, 1, Status.MESSAGE)
    assert "plan's seed" in str(site.last_error)
    assert untouched(site)


def spoilt(kind: str, start: Tensors) -> ArrayRecord:
    record = to_record(start)
    name = next(iter(record))
    values = record[name].numpy().copy()
    if kind == "NaN":
        values.flat[0] = np.nan
    elif kind == "infinity":
        values.flat[0] = np.inf
    elif kind == "misshapen":
        values = values.T if values.shape[0] != values.shape[1] else values[:-1]
    elif kind == "oversized":
        values = np.zeros((4096, 1024), dtype=np.float32)
    elif kind == "float64":
        values = values.astype(np.float64)
    if kind == "missing":
        del record[name]
    elif kind == "extra":
        record["more"] = Array(values)
    else:
        record[name] = Array(np.ascontiguousarray(values))
    if kind == "not numpy":
        record[name] = Array(
            dtype="float32", shape=values.shape, stype="numpy.ndarray", data=b"not numpy"
        )
    return record


@pytest.mark.parametrize(
    "kind",
    [
        "NaN", "infinity", "misshapen", "oversized", "float64", "missing", "extra", "not numpy",
    ],
)  # fmt: skip
def test_a_malformed_adapter_is_refused(
    make_site: MakeSite, plan: Plan, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site()
    reply = site.answer(request(plan, 2, spoilt(kind, initial(site, plan))))
    assert_says_only(reply, 2, Status.MESSAGE)
    assert untouched(site)
    [line] = refusals(caplog)
    assert line.startswith("refused-message: adapter")


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the site's own log says."""
    return [r.getMessage() for r in caplog.records if getattr(r, "action", "") == "refuse"]


@pytest.mark.parametrize("value", [1e18, 1e38])
def test_a_huge_adapter_does_not_make_records_speak(
    make_site: MakeSite, plan: Plan, value: float
) -> None:
    """Finite values may overflow in some records only; then NaN in the reply tells which."""
    site = make_site()
    huge = {name: torch.full_like(t, value) for name, t in initial(site, plan).items()}
    reply = site.answer(request(plan, 2, huge))
    if status(reply) == Status.OK:
        assert all(bool(t.isfinite().all()) for t in tensors(reply, site, plan).values())
    else:
        assert_says_only(reply, 2, Status.MESSAGE)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FedgraftError("records", PRIVATE, "x", "y"), Status.FAILED),
        (CheckpointError("store", PRIVATE, "x", "y"), Status.FAILED),
        (MessageError("adapter", PRIVATE, "x", "y"), Status.MESSAGE),
        (RuntimeError(PRIVATE), Status.FAILED),
        (KeyError(PRIVATE), Status.FAILED),
        (MemoryError(PRIVATE), Status.FAILED),
        (AssertionError(PRIVATE), Status.FAILED),
        (RecursionError(PRIVATE), Status.FAILED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_no_exception_leaves(
    make_site: MakeSite,
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    expected: Status,
) -> None:
    site = make_site()

    def fail(*_: object, **__: object) -> Tensors:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(site_module, "train_round", fail)
        reply = site.answer(request(plan, 1, initial(site, plan)))
    assert_says_only(reply, 1, expected)
    assert site.last_error is error
    assert untouched(site)
    reply = site.answer(request(plan, 1, initial(site, plan)))  # and the site goes on
    assert_says_only(reply, 1, Status.OK)
    assert site.last_error is None


@pytest.mark.parametrize("where", ["workbench", "cached", "save_round", "last_round"])
def test_no_exception_leaves_from_anywhere(
    make_site: MakeSite, plan: Plan, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    site = make_site()
    message = request(plan, 1, initial(site, plan))

    def fail(*_: object, **__: object) -> Any:
        raise OSError(PRIVATE)

    owners: dict[str, object] = {"workbench": site.runtime, "cached": site}
    with monkeypatch.context() as patch:
        patch.setattr(owners.get(where, site.store), where, fail)
        assert_says_only(site.answer(message), 1, Status.FAILED)


def unmet(plan: Plan, kind: str) -> str:
    changes: dict[str, dict[str, object]] = {
        "batch beyond the records": {"training.expected_batch": 13.0},
        "delta above 1/N": {"privacy.delta": 0.2},
        "no adapter and a fixed head": {"adapter.method": "none", "head.training": "fixed"},
        "number of sites unknown": {
            "privacy.mechanism": "distributed", "training.sample_rate": 0.5,
        },
    }  # fmt: skip
    if kind in changes:
        return plan.replace(changes[kind]).canonical
    document = json.loads(plan.canonical)
    if kind == "unknown key":
        document["extra"] = 1
    elif kind == "negative epsilon":
        document["privacy"]["epsilon"] = -1
    return "{" if kind == "not JSON" else json.dumps(document)


@pytest.mark.parametrize(
    "kind",
    [
        "batch beyond the records", "delta above 1/N", "no adapter and a fixed head",
        "number of sites unknown", "unknown key", "negative epsilon", "not JSON",
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_met_is_refused(
    make_site: MakeSite, plan: Plan, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    count = Count(monkeypatch)
    site = make_site()
    try:
        text = unmet(plan, kind)
    except FedgraftError:
        return  # no such plan can be written: better still
    headless = kind == "no adapter and a fixed head"
    adapter = ArrayRecord() if headless else to_record(initial(site, plan))
    reply = site.answer(request(text, 1, adapter))
    assert_says_only(reply, 1, Status.MESSAGE if kind == "not JSON" else Status.PLAN)
    assert count.rounds == 0
    assert untouched(site)


def test_a_real_site_never_answers_without_noise(make_site: MakeSite, plan: Plan) -> None:
    """The server writes the plan; `none` is for simulations."""
    site = make_site(simulated=False)
    bare = plan.replace({"privacy.mechanism": "none"})
    reply = site.answer(request(bare, 1, initial(site, bare)))
    assert_says_only(reply, 1, Status.PLAN)
    assert untouched(site)


@pytest.mark.parametrize("number", [0, -1, "1", 1.0])
def test_a_request_of_another_protocol_is_refused(
    make_site: MakeSite, plan: Plan, number: object
) -> None:
    site = make_site()
    assert_says_only(site.answer(request(plan, number, initial(site, plan))), 0, Status.MESSAGE)
    message = request(plan, 1, initial(site, plan), extra=True)
    assert_says_only(site.answer(message), 0, Status.MESSAGE)


def update(site: Site, plan: Plan, number: int = 1) -> torch.Tensor:
    reply = site.answer(request(plan, number, initial(site, plan)))
    assert status(reply) == Status.OK
    return torch.cat([t.flatten() for t in tensors(reply, site, plan).values()])


def test_the_plans_weights_of_classes_reach_the_loss(make_site: MakeSite, plan: Plan) -> None:
    """Without clipping or noise a step is linear in the weights of the two classes' losses."""
    plan = plan.replace(
        {
            "privacy.mechanism": "none",
            "head.training": "fixed",
            "training.sample_rate": 1.0,
            "training.learning_rate": 0.1,  # far from the range that an adapter is held in
        }
    )

    def moved(number: int, **weights: float) -> torch.Tensor:
        site = make_site(f"site-{number}")
        start = torch.cat([t.flatten() for t in initial(site, plan).values()])
        return update(site, plan.replace({"training.class_weights": weights})) - start

    plain, first, second = moved(0), moved(1, a=3.0), moved(2, b=3.0)
    assert plain.abs().max() > 1e-3
    assert not torch.allclose(first, second, atol=1e-4)
    assert torch.allclose(first + second, 4 * plain, atol=1e-5)


def test_simulated_noise_is_reproducible_and_differs_by_site_round_and_plan(
    make_site: MakeSite, plan: Plan
) -> None:
    first = update(make_site("one"), plan)
    assert torch.equal(first, update(make_site("two"), plan))
    others = [
        update(make_site("three", name="south"), plan),
        update(make_site("four"), plan.replace({"name": "another-run"})),
        update(make_site("five"), plan, number=2),
    ]
    for other in others:
        assert not torch.isclose(first, other).any()


def test_noise_of_the_operating_system_differs(make_site: MakeSite, plan: Plan) -> None:
    first = update(make_site("one", simulated=False), plan)
    assert not torch.isclose(first, update(make_site("two", simulated=False), plan)).any()


def test_a_real_site_draws_from_the_operating_system(
    make_site: MakeSite, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> NoiseSource:
        raise AssertionError("a reproducible source at a real site")

    monkeypatch.setattr(NoiseSource, "for_simulation", never)
    update(make_site(simulated=False), plan)


def test_heads_and_rounds_outlive_the_process(make_site: MakeSite, plan: Plan) -> None:
    whole, halves = make_site("whole"), make_site("halves")
    for number in (1, 2, 3):
        update(whole, plan, number)
    update(halves, plan, 1)
    restarted = make_site("halves")
    head = restarted.trained_head(plan)
    assert torch.equal(head.linear.weight, halves.trained_head(plan).linear.weight)
    assert head.linear.weight.any()
    update(restarted, plan, 2)
    last = update(make_site("halves"), plan, 3)
    assert torch.equal(last, update(whole, plan, 3))  # `whole` sends its stored reply
    weights = [s.trained_head(plan).linear.weight for s in (whole, restarted)]
    assert torch.equal(*weights)


def test_sites_that_share_a_runtime_do_not_share_heads(make_site: MakeSite, plan: Plan) -> None:
    north, south = make_site("n", name="north"), make_site("s", name="south")
    alone = [update(make_site("alone", name="north"), plan, k) for k in (1, 2)]
    together = []
    for number in (1, 2):
        together.append(update(north, plan, number))
        update(south, plan, number)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_the_refitted_head_is_sealed_and_takes_no_part_in_rounds(
    make_site: MakeSite, plan: Plan
) -> None:
    site = make_site()
    update(site, plan, 1)
    before = site.trained_head(plan).linear.weight.clone()
    head = site.refit(plan, initial(site, plan))
    assert not torch.equal(head.linear.weight, before)
    assert torch.equal(site.trained_head(plan).linear.weight, before)
    sealed = load_sealed(site.store.directory / plan.hash / "sealed.safetensors")
    assert sealed.classes == ("a", "b")
    assert torch.equal(sealed.head.linear.weight, head.linear.weight)
    for again in (site, make_site()):
        for number in (1, 2):
            reply = again.answer(request(plan, number, initial(site, plan)))
            assert_says_only(reply, number, Status.SEALED)
    assert "never takes part again" in str(again.last_error)


def test_records_are_checked_when_a_site_is_made(runtime: Runtime, tmp_path: Path) -> None:
    broken = Records(torch.full((len(RECORDS), 1, 8, 8), 255.0), RECORDS.labels)
    with pytest.raises(DataError, match="site north"):
        Site(SiteConfig("north", ("a", "b"), 12), broken, runtime, SiteStore(tmp_path))


def test_what_is_cached_is_computed_once(make_site: MakeSite, plan: Plan) -> None:
    site = make_site()
    bench = site.bench(plan)
    assert site.cached(bench) is site.cached(bench)
    other = site.bench(plan.replace({"seed": 5}))
    assert site.cached(other) is not site.cached(bench)


def test_the_ledger_says_what_a_round_cost(make_site: MakeSite, plan: Plan) -> None:
    site = make_site(simulated=False)
    update(site, plan, 1)
    step = site.step(plan)
    assert step.event is not None
    _, agreed, reservation, _ = site.store.ledger.entries()
    assert agreed.body == {"plan": plan.hash, "run": plan.name, "by": "policy"}
    assert {k: v for k, v in reservation.body.items() if k != "nonce"} == {
        "run": plan.name, "plan": plan.hash, "round": 1, "purpose": "train",
        "mechanism": "local", "unit": "record", "shares": 1, "colluders": 0,
        "sample_rate": 0.5, "noise_multiplier": step.event.noise_multiplier,
        "steps": plan.training.local_steps,
    }  # fmt: skip
    text = repr([entry.document() for entry in site.store.ledger.entries()])
    assert "north" not in text


def test_it_is_reserved_before_the_first_gradient(
    make_site: MakeSite, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(simulated=False)
    seen: list[tuple[int, object]] = []

    def look(*arguments: Any, **options: Any) -> Tensors:
        seen.append((sum(e.steps for e in site.store.ledger.spent()), kept(site, plan)))
        result = train_round(*arguments, **options)
        seen.append((sum(e.steps for e in site.store.ledger.spent()), kept(site, plan)))
        return result

    monkeypatch.setattr(site_module, "train_round", look)
    update(site, plan, 1)
    assert seen == [(1, None), (1, None)]
    assert kept(site, plan) is not None


def test_a_round_that_breaks_after_sampling_stays_spent(
    make_site: MakeSite, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(simulated=False)

    def fail(*arguments: Any, **options: Any) -> Tensors:
        train_round(*arguments, **options)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(site_module, "train_round", fail)
        assert status(site.answer(request(plan, 1, initial(site, plan)))) == Status.FAILED
    assert sum(e.steps for e in site.store.ledger.spent()) == 1
    update(site, plan, 1)
    assert sum(e.steps for e in site.store.ledger.spent()) == 2


@pytest.mark.parametrize(
    ("rules", "expected", "words"),
    [
        ({"maximum_epsilon": 2.0}, Status.POLICY, "policy.maximum_epsilon"),
        ({"adapters": ("film",)}, Status.POLICY, "policy.adapters"),
        ({"approval": "manual"}, Status.APPROVAL, "fedgraft site approve"),
        ({"hours": "20:00-06:00"}, Status.HOURS, "policy.hours"),
    ],
)
def test_the_policy_is_asked_first(
    make_site: MakeSite, plan: Plan, rules: dict[str, Any], expected: Status, words: str
) -> None:
    site = make_site(simulated=False, **rules)
    site._clock = lambda: datetime(2026, 11, 24, 12, 0)
    assert_says_only(site.answer(request(plan, 1, initial(site, plan))), 1, expected)
    assert words in str(site.last_error)
    assert untouched(site)


def test_an_approved_plan_is_answered(make_site: MakeSite, plan: Plan) -> None:
    site = make_site(simulated=False, approval="manual")
    message = request(plan, 1, initial(site, plan))
    assert status(site.answer(message)) == Status.APPROVAL
    waiting = site.store.directory / "plans" / f"{plan.hash}.json"
    waiting.with_suffix(".approved").touch()
    assert status(site.answer(message)) == Status.OK
    said = [e.body["by"] for e in site.store.ledger.entries() if e.kind is Kind.APPROVE]
    assert said == ["operator"]
    changed = plan.replace({"training.learning_rate": 2.0})
    message = request(changed, 2, initial(site, changed))
    assert status(site.answer(message)) == Status.APPROVAL


def test_a_run_the_budget_does_not_pay_is_refused_before_it_starts(
    make_site: MakeSite, plan: Plan
) -> None:
    used = plan.replace({"name": "earlier"})
    site = make_site(simulated=False)
    update(site, used, 1)
    reply = site.answer(request(plan, 1, initial(site, plan)))
    assert_says_only(reply, 1, Status.BUDGET)
    assert "found '3 rounds'; allowed: 2" in str(site.last_error)
    assert sum(e.steps for e in site.store.ledger.spent()) == 1


def test_a_site_leaves_in_order(make_site: MakeSite, plan: Plan) -> None:
    used = plan.replace({"name": "earlier"})
    site = make_site(simulated=False, partial_runs=True)
    update(site, used, 1)
    update(site, plan, 1)
    second = update(site, plan, 2)
    before = site.store.ledger.spent()
    reply = site.answer(request(plan, 3, initial(site, plan)))
    assert_says_only(reply, 3, Status.RETIRED)
    assert site.store.ledger.spent() == before
    assert torch.equal(update(site, plan, 2), second)  # what it has paid for may still leave
    site.refit(plan, initial(site, plan))


def test_what_the_ledger_did_not_commit_does_not_leave(
    make_site: MakeSite, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(simulated=False)

    def another(record: Tensors) -> ArrayRecord:
        return to_record({name: tensor + 1 for name, tensor in record.items()})

    with monkeypatch.context() as patch:
        patch.setattr(site_module, "to_record", another)
        assert_says_only(site.answer(request(plan, 1, initial(site, plan))), 1, Status.FAILED)
    assert isinstance(site.last_error, EgressError)
    update(site, plan, 1)


def test_what_a_plan_would_cost(make_site: MakeSite, plan: Plan) -> None:
    site = make_site(simulated=False)
    found = site.cost(plan)
    assert (found.before, found.rounds, found.asked) == (0.0, 3, 3)
    assert 7.9 < found.run <= 8
    update(site, plan, 1)
    assert 0 < site.cost(plan).before < found.run


def signed(plan: Plan, number: int, site: Site, key: Ed25519PrivateKey, run: int = 1) -> Message:
    message = request(plan, number, initial(site, plan))
    message.content.config_records["plan"]["signature"] = sign_plan(plan.canonical, key)
    message.metadata.__dict__["_run_id"] = run
    return message


def test_a_plan_without_the_operators_signature_is_refused(
    make_site: MakeSite, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    key = Ed25519PrivateKey.generate()
    site = make_site(simulated=False)
    site.operator_key = key.public_key()
    for message in (
        request(plan, 1, initial(site, plan)),
        signed(plan, 1, site, Ed25519PrivateKey.generate()),
    ):
        assert_says_only(site.answer(message), 1, Status.PLAN)
        assert "signature" in str(site.last_error)
    assert untouched(site)
    assert all(line.startswith("refused-plan: plan: signature") for line in refusals(caplog))
    assert len(refusals(caplog)) == 2
    assert status(site.answer(signed(plan, 1, site, key))) == Status.OK
    unsigned = request(plan, 2, initial(site, plan))  # an accepted plan stays signed
    assert_says_only(site.answer(unsigned), 2, Status.PLAN)


def test_a_running_plan_is_never_changed(make_site: MakeSite, plan: Plan) -> None:
    key = Ed25519PrivateKey.generate()
    site = make_site(simulated=False, maximum_epsilon=100.0)
    changed = plan.replace({"training.learning_rate": 3.0})
    assert status(site.answer(signed(plan, 1, site, key, run=5))) == Status.OK
    assert_says_only(site.answer(signed(changed, 1, site, key, run=5)), 1, Status.PLAN)
    assert "never changed" in str(site.last_error)
    assert status(site.answer(signed(changed, 1, site, key, run=6))) == Status.OK
    assert status(site.answer(signed(plan, 2, site, key, run=5))) == Status.OK


def test_the_final_adapter_is_kept_for_the_refit(make_site: MakeSite, plan: Plan) -> None:
    site = make_site(simulated=False)
    update(site, plan, 1)
    before = site.store.ledger.spent()
    final = {name: tensor + 1 for name, tensor in initial(site, plan).items()}
    assert_says_only(site.keep_final(request(plan, 3, final)), 3, Status.KEPT)
    kept_ = site.store.final(plan)
    assert all(torch.equal(kept_[name], tensor) for name, tensor in final.items())
    assert site.store.ledger.spent() == before
    site.refit(plan, kept_)
    bad = request(plan, 3, spoilt("NaN", initial(site, plan)))
    assert_says_only(site.keep_final(bad), 3, Status.SEALED)
