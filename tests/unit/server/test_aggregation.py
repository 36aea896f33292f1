from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy
from flwr.serverapp.strategy import Strategy

from fedgraft_common.errors import CheckpointError, PlanError
from fedgraft_common.messages import PLAN, Tensors, TensorSpec
from fedgraft_common.plan import Plan
from fedgraft_server.aggregation import Aggregator, build_strategy
from fedgraft_simulations.local_grid import LocalGrid

SCHEMA = (TensorSpec("a", (3,)), TensorSpec("b", (2, 2)))
SITES = 7

# Every strategy that Flower has, by what it needs from a site.
AVERAGING = {
    "Bulyan",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedMedian",
    "FedTrimmedAvg",
    "FedYogi",
    "Krum",
    "MultiKrum",
}
NEEDS_MORE: dict[str, dict[str, float]] = {
    "FedProx": {"proximal_mu": 0.1},  # sites would have to add the proximal term
    "QFedAvg": {"client_learning_rate": 0.1},  # every site's loss
    "FedXgbBagging": {},  # trees, not tensors
    "FedXgbCyclic": {},
    "DifferentialPrivacyClientSideAdaptiveClipping": {},  # wrap another strategy
    "DifferentialPrivacyClientSideFixedClipping": {},
    "DifferentialPrivacyServerSideAdaptiveClipping": {},
    "DifferentialPrivacyServerSideFixedClipping": {},
}


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No log lines; and Flower's Bulyan collects garbage for every reply, half a second each."""
    monkeypatch.setattr("gc.collect", lambda: 0)
    with caplog.at_level(logging.ERROR, "flwr"):
        yield


def plan(name: str, options: Mapping[str, object] | None = None, mechanism: str = "local") -> Plan:
    return Plan().replace(
        {
            "aggregation.strategy": name,
            "aggregation.options": dict(options or {}),
            "aggregation.sites": SITES,
            "privacy.mechanism": mechanism,
            "training.sample_rate": 0.5,
            "training.expected_batch": 10,
            "training.learning_rate": 0.5,
            "training.schedule": "constant",
        }
    )


def grid() -> LocalGrid:
    return LocalGrid(ClientApp(), SITES)


def start() -> Tensors:
    return {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.eye(2)}


def updates(round_number: int, count: int = SITES) -> list[Tensors]:
    generator = torch.Generator().manual_seed(round_number)
    return [
        {s.name: torch.randn(s.shape, generator=generator) for s in SCHEMA} for _ in range(count)
    ]


def run(
    aggregator: Aggregator, rounds: Sequence[int], adapter: Tensors, count: int = SITES
) -> Tensors:
    for number in rounds:
        aggregator.requests(number, adapter, grid())
        adapter = aggregator.next_adapter(number, adapter, updates(number, count))
    return adapter


def assert_close(found: Tensors, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.float(), rtol=tolerance, atol=tolerance)


# --- requests


def test_one_request_for_each_site_with_plan_adapter_and_round() -> None:
    requests = Aggregator(plan("FedAvg"), SCHEMA).requests(3, start(), grid())
    assert sorted(r.metadata.dst_node_id for r in requests) == list(range(1, SITES + 1))
    for request in requests:
        assert sorted(request.content) == ["adapter", "plan"]
        config = dict(request.content.config_records[PLAN])
        assert config == {"plan": plan("FedAvg").canonical, "round": 3}
        assert request.metadata.message_type == "train"


# --- the maths


@pytest.mark.parametrize("count", [1, 2, 7])
def test_local_fedavg_is_the_uniform_mean(count: int) -> None:
    found = run(Aggregator(plan("FedAvg"), SCHEMA), [1], start(), count)
    stacked = {s.name: torch.stack([u[s.name].double() for u in updates(1, count)]) for s in SCHEMA}
    assert_close(found, {name: values.mean(dim=0) for name, values in stacked.items()}, 1e-6)


@pytest.mark.parametrize(
    ("name", "options", "momentum", "rate"),
    [
        ("FedAvg", {}, 0.0, 1.0),
        ("FedAvgM", {}, 0.0, 1.0),
        ("FedAvgM", {"server_momentum": 0.9}, 0.9, 1.0),
        ("FedAvgM", {"server_momentum": 0.5, "server_learning_rate": 0.3}, 0.5, 0.3),
        ("FedAvgM", {"server_learning_rate": 0.3}, 0.0, 0.3),
    ],
)
def test_distributed_is_torch_s_sgd_on_the_sum(
    name: str, options: dict[str, float], momentum: float, rate: float
) -> None:
    """Against torch.optim.SGD in float64, over several rounds; denominator: sites times batch."""
    rounds = [1, 2, 3, 4, 5]
    found = run(Aggregator(plan(name, options, "distributed"), SCHEMA), rounds, start())
    parameters = {n: torch.nn.Parameter(v.double()) for n, v in start().items()}
    # A pseudo-gradient is learning_rate * mean gradient; the server's own rate comes on top.
    sgd = torch.optim.SGD(parameters.values(), lr=rate, momentum=momentum)
    for number in rounds:
        for tensor_name, parameter in parameters.items():
            total = torch.stack([u[tensor_name].double() for u in updates(number)]).sum(dim=0)
            parameter.grad = 0.5 * total / (SITES * 10)
        sgd.step()
    assert_close(found, {n: p.detach() for n, p in parameters.items()}, 1e-5)


def test_the_schedule_scales_the_server_s_step() -> None:
    changes = {"training.schedule": "cosine", "rounds.count": 4}
    scheduled = plan("FedAvg", mechanism="distributed").replace(changes)
    for number in (1, 3):
        found = run(Aggregator(scheduled, SCHEMA), [number], start())
        rate = 0.5 * scheduled.step_scale(number) / (SITES * 10)
        total = {s.name: torch.stack([u[s.name] for u in updates(number)]).sum(0) for s in SCHEMA}
        assert_close(found, {n: start()[n] - rate * t for n, t in total.items()}, 1e-6)


def test_a_missing_share_does_not_change_the_denominator() -> None:
    """The number of replies is not public beforehand; the denominator is."""
    found = run(
        Aggregator(plan("FedAvg", mechanism="distributed"), SCHEMA), [1], start(), SITES - 2
    )
    total = {s.name: torch.stack([u[s.name] for u in updates(1, SITES - 2)]).sum(0) for s in SCHEMA}
    assert_close(found, {n: start()[n] - 0.5 * t / (SITES * 10) for n, t in total.items()}, 1e-6)


@pytest.mark.parametrize("name", ["FedAdagrad", "FedAdam", "FedYogi"])
def test_distributed_adaptive_optimizers_see_only_the_sum(name: str) -> None:
    """The same sum from other summands gives the same adapter, and it moves downhill."""
    found = run(Aggregator(plan(name, mechanism="distributed"), SCHEMA), [1, 2, 3], start())
    aggregator, adapter = Aggregator(plan(name, mechanism="distributed"), SCHEMA), start()
    for number in (1, 2, 3):
        aggregator.requests(number, adapter, grid())
        sums = {s.name: torch.stack([u[s.name] for u in updates(number)]).sum(0) for s in SCHEMA}
        zeros = {n: torch.zeros_like(v) for n, v in sums.items()}
        adapter = aggregator.next_adapter(number, adapter, [sums] + [zeros] * (SITES - 1))
        if number == 1:
            assert all(((start()[n] - adapter[n]) * sums[n]).min() > 0 for n in sums)
    assert_close(found, adapter, 1e-5)


# --- every strategy of Flower


def test_the_two_lists_name_every_strategy() -> None:
    found = {
        name
        for name, value in vars(strategy).items()
        if isinstance(value, type) and issubclass(value, Strategy) and value is not Strategy
    }
    assert found == AVERAGING | NEEDS_MORE.keys()


@pytest.mark.parametrize("name", sorted(AVERAGING))
def test_strategy_that_averages_works_without_metrics(name: str) -> None:
    found = run(Aggregator(plan(name), SCHEMA), [1, 2], start())
    assert {n: (tuple(t.shape), t.dtype) for n, t in found.items()} == {
        s.name: (s.shape, torch.float32) for s in SCHEMA
    }
    assert all(torch.isfinite(t).all() for t in found.values())
    assert not torch.equal(found["a"], start()["a"])


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("FedMedian", {}, 0.5),
        ("FedTrimmedAvg", {"beta": 0.2}, 0.5),
        ("Krum", {"num_malicious_nodes": 1}, 0.5),
        ("MultiKrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 3}, 0.5),
        ("Bulyan", {"num_malicious_nodes": 1}, 0.5),
    ],
)
def test_robust_strategy_withstands_one_site(
    name: str, options: dict[str, float], tolerance: float
) -> None:
    aggregator = Aggregator(plan(name, options), SCHEMA)
    honest = [{n: t / 10 for n, t in u.items()} for u in updates(1)]
    poisoned = [*honest[:-1], {n: torch.full_like(t, 1e6) for n, t in honest[-1].items()}]
    aggregator.requests(1, start(), grid())
    found = aggregator.next_adapter(1, start(), poisoned)
    assert all(t.abs().max() < tolerance for t in found.values())


@pytest.mark.parametrize("name", sorted(NEEDS_MORE))
def test_strategy_that_needs_more_than_sites_send(name: str) -> None:
    """Refused when the plan is read, not after the sites have spent their first round."""
    with pytest.raises(PlanError, match=name):
        build_strategy(plan(name, NEEDS_MORE[name]))


# --- what is refused


def test_unknown_strategy() -> None:
    with pytest.raises(PlanError) as caught:
        build_strategy(plan("FedMagic"))
    assert str(caught.value).startswith("aggregation.strategy: found 'FedMagic'; allowed: ")
    for name in AVERAGING:
        assert name in caught.value.allowed


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("FedAvg", {"server_momentum": 0.9}, "what FedAvg takes .*'server_momentum'"),
        ("FedTrimmedAvg", {"beta": 0.6}, "what FedTrimmedAvg takes .*beta"),
    ],
)
def test_bad_option(name: str, options: dict[str, object], text: str) -> None:
    with pytest.raises(PlanError, match=text) as caught:
        build_strategy(plan(name, options))
    assert caught.value.field == "aggregation.options"
    assert caught.value.value == options


@pytest.mark.parametrize(
    "options",
    [
        {"arrayrecord_key": "x"},
        {"configrecord_key": "x"},
        {"weighted_by_key": "num-examples"},
        {"train_metrics_aggr_fn": 1},
        {"fraction_train": 0.5},
        {"min_train_nodes": 100},
    ],
)
def test_options_cannot_change_the_protocol(options: dict[str, object]) -> None:
    """The names of records, the weights and who is asked are not a plan's to choose."""
    with pytest.raises(PlanError, match=r"aggregation\.options"):
        build_strategy(plan("FedAvg", options))


def test_option_of_the_wrong_type() -> None:
    with pytest.raises(PlanError, match=r"aggregation\.options"):
        run(Aggregator(plan("FedAvgM", {"server_momentum": "high"}), SCHEMA), [1], start())


# --- state


@pytest.mark.parametrize("mechanism", ["local", "distributed"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FedAvg", {}),
        ("FedAvgM", {"server_momentum": 0.9}),
        ("FedAdagrad", {}),
        ("FedAdam", {}),
        ("FedYogi", {}),
    ],
)
def test_continuing_after_restore_equals_not_having_stopped(
    mechanism: str, name: str, options: dict[str, float]
) -> None:
    chosen = plan(name, options, mechanism)
    whole = run(Aggregator(chosen, SCHEMA), range(1, 7), start())
    first = Aggregator(chosen, SCHEMA)
    half = run(first, range(1, 4), start())
    saved = {key: value.clone() for key, value in first.state().items()}
    run(first, [4], half)  # what happens later does not change what was saved
    second = Aggregator(chosen, SCHEMA)
    second.restore(saved)
    resumed = run(second, range(4, 7), half)
    assert all(torch.equal(resumed[n], t) for n, t in whole.items())
    if name != "FedAvg":
        forgetful = run(Aggregator(chosen, SCHEMA), range(4, 7), half)
        assert any(not torch.equal(forgetful[n], t) for n, t in whole.items())


def test_fedavg_has_no_state() -> None:
    aggregator = Aggregator(plan("FedAvg"), SCHEMA)
    run(aggregator, [1], start())
    assert aggregator.state() == {}


def test_state_of_another_strategy() -> None:
    aggregator = Aggregator(plan("FedAvgM", {"server_momentum": 0.9}), SCHEMA)
    run(aggregator, [1], start())
    with pytest.raises(CheckpointError, match="the state of FedAvg"):
        Aggregator(plan("FedAvg"), SCHEMA).restore(aggregator.state())


def test_requests_can_be_answered() -> None:
    """A reply is made from a request; Flower refuses one without an id."""
    (request, *_) = Aggregator(plan("FedAvg"), SCHEMA).requests(1, start(), grid())
    request.metadata.__dict__["_message_id"] = "1"
    assert Message(RecordDict(), reply_to=request).metadata.reply_to_message_id == "1"


def test_weight_decay_draws_a_distributed_adapter_back_to_where_the_run_started() -> None:
    decayed = plan("FedAvg", mechanism="distributed").replace(
        {"training.weight_decay": 0.5, "training.learning_rate": 1.0}
    )
    away = {name: tensor + 2 for name, tensor in start().items()}
    nothing = [{name: torch.zeros_like(tensor) for name, tensor in away.items()}] * SITES
    found = Aggregator(decayed, SCHEMA, initial=start()).next_adapter(1, away, nothing)
    for name, tensor in found.items():
        assert torch.allclose(tensor, start()[name] + 1, atol=1e-6)
