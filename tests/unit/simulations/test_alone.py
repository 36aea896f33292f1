"""Staying alone: the baseline must be honest, and leave the shared model as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch.nn import functional

from fedgraft_client.data import Records
from fedgraft_client.head import LinearHead
from fedgraft_client.refit import refit_head
from fedgraft_client.runtime import Runtime
from fedgraft_client.site import Site, SiteConfig
from fedgraft_client.store import SiteStore
from fedgraft_common.messages import Tensors, from_record, to_record
from fedgraft_common.plan import Plan
from fedgraft_simulations import alone
from fedgraft_simulations.alone import train_alone


@pytest.fixture(params=["lora", "film"])
def plan(request: pytest.FixtureRequest, vit_directory: Path) -> Plan:
    return Plan().replace(
        {
            "backbone.source": f"dir:{vit_directory}",
            "backbone.frozen_dtype": "float32",
            "adapter.method": request.param,
            "adapter.layers": "last:1",
            "head.training": "private",
            "training.expected_batch": 6.0,
            "privacy.delta": 1e-3,
            "rounds.count": 2,
        }
    )


def make_site(directory: Path, runtime: Runtime | None = None) -> Site:
    generator = torch.Generator().manual_seed(0)
    records = Records(torch.rand(12, 1, 16, 16, generator=generator), torch.arange(12) % 2)
    config = SiteConfig("north", ("a", "b"), 12, simulated=True)
    return Site(config, records, runtime or Runtime("cpu"), SiteStore(directory, durable=False))


def dp_round(site: Site, plan: Plan, number: int = 1) -> Tensors:
    TaskIdentity.run_id = TaskIdentity.task_id = 1
    TaskIdentity.node_id = 0
    bench = site.bench(plan)
    config = ConfigRecord({"plan": plan.canonical, "round": number})
    content = RecordDict({"adapter": to_record(bench.initial), "plan": config})
    reply = site.answer(Message(content, dst_node_id=1, message_type="train"))
    assert site.last_error is None
    return from_record(reply.content.array_records["adapter"], bench.adapted.schema)


def equal(first: Tensors, second: Tensors) -> bool:
    return set(first) == set(second) and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("batch", [256, 5])
def test_the_adapter_is_trained_and_fits_better(
    plan: Plan, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone, "BATCH", batch)
    site = make_site(tmp_path)
    bench = site.bench(plan)
    adapter = train_alone(site, plan)
    assert set(adapter) == set(bench.initial)
    assert all(not torch.equal(adapter[n], bench.initial[n]) for n in adapter)
    losses = []
    for state in (bench.initial, adapter):
        features = bench.features(state, site.cached(bench))
        head = refit_head(features, site.records.labels, LinearHead(bench.adapted.feature_dim, 2))
        losses.append(float(functional.cross_entropy(head(features), site.records.labels)))
    assert losses[1] < losses[0]


@pytest.mark.parametrize(("records", "passes"), [(257, 30), (5000, 10)])
def test_many_records_are_taken_in_parts(records: int, passes: int) -> None:
    parts = list(alone._parts(records))
    assert len(parts) >= alone.STEPS
    assert max(map(len, parts)) <= alone.BATCH
    assert torch.cat(parts).bincount().tolist() == [passes] * records


def test_the_same_records_give_the_same_adapter(plan: Plan, tmp_path: Path) -> None:
    site = make_site(tmp_path)
    first = train_alone(site, plan)
    dp_round(site, plan)
    with_hooks_attached = train_alone(site, plan)
    assert equal(first, with_hooks_attached)
    assert equal(first, train_alone(make_site(tmp_path / "other"), plan))


@pytest.mark.parametrize("hooks_attached", [False, True])
def test_no_gradients_are_left_behind(plan: Plan, tmp_path: Path, hooks_attached: bool) -> None:
    site = make_site(tmp_path)
    if hooks_attached:
        dp_round(site, plan)
    train_alone(site, plan)
    model = site.bench(plan).adapted
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, name
        for attribute in ("grad_sample", "summed_grad"):
            assert getattr(parameter, attribute, None) is None, name


def test_a_federated_round_afterwards_is_not_disturbed(plan: Plan, tmp_path: Path) -> None:
    runtime = Runtime("cpu")
    untouched, disturbed = make_site(tmp_path / "a", runtime), make_site(tmp_path / "b", runtime)
    expected = [dp_round(untouched, plan, 1), dp_round(untouched, plan, 2)]
    train_alone(disturbed, plan)
    assert equal(dp_round(disturbed, plan, 1), expected[0])
    train_alone(disturbed, plan)
    assert equal(dp_round(disturbed, plan, 2), expected[1])
