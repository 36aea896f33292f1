"""How updates become the next adapter: the plan's Flower strategy, fed with adapters only.

A Flower strategy expects every reply to carry a model and a MetricRecord with its weight. Sites
send neither metrics nor counts, so the weight is put in here: a public constant, 1 for everyone.

With the distributed mechanism the server may use nothing but the sum of the sites' noisy
gradients. One step along that sum is handed to the strategy as if it were the only reply, so
that FedAvg is plain SGD, FedAvgM is SGD with momentum, and FedAdam, FedYogi and FedAdagrad are
themselves: post-processing, which costs no privacy.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, strategy
from flwr.serverapp.strategy import Strategy

from fedgraft_common.errors import CheckpointError, PlanError
from fedgraft_common.messages import (
    ADAPTER,
    PLAN,
    ROUND,
    SIGNATURE,
    Tensors,
    TensorSpec,
    from_record,
    to_record,
)
from fedgraft_common.plan import STRATEGIES, Plan

# Arguments of Flower's strategies that Fedgraft sets: who is asked, and what records are called.
_PROTOCOL = (
    "fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes",
    "min_available_nodes", "weighted_by_key", "arrayrecord_key", "configrecord_key",
    "train_metrics_aggr_fn", "evaluate_metrics_aggr_fn",
)  # fmt: skip
_WEIGHT = "weight"
_PUBLIC_WEIGHT = 1.0


def build_strategy(plan: Plan) -> Strategy:
    """The strategy a plan names, with its options.

    Raises:
        PlanError: no such strategy, an option it does not take, or one that cannot work without
            metrics from sites.
    """
    name, options = plan.aggregation.strategy, plan.aggregation.options
    if name not in STRATEGIES:
        raise PlanError(
            "aggregation.strategy", name, ", ".join(STRATEGIES),
            "Choose one of these; others of Flower's need losses or models that sites do not send.",
        )  # fmt: skip
    kind: Any = getattr(strategy, name)
    own = [p for p in inspect.signature(kind).parameters if p not in _PROTOCOL]
    for option in sorted(set(options) - set(own)):
        raise _bad_options(plan, f"{', '.join(own) or 'no options'}; not {option!r}")
    settings: dict[str, Any] = {
        "fraction_train": 1.0,
        "fraction_evaluate": 0.0,
        "min_train_nodes": plan.aggregation.minimum_sites,
        "min_evaluate_nodes": 0,
        "min_available_nodes": plan.aggregation.minimum_sites,
        "weighted_by_key": _WEIGHT,
        "arrayrecord_key": ADAPTER,
        "configrecord_key": PLAN,
        **options,
    }
    try:
        built: Strategy = kind(**settings)
    except (TypeError, ValueError) as error:
        raise _bad_options(plan, str(error)) from None
    return built


def _bad_options(plan: Plan, reason: str) -> PlanError:
    return PlanError(
        "aggregation.options", plan.aggregation.options,
        f"what {plan.aggregation.strategy} takes ({reason})",
        "Correct the options or choose another strategy.",
    )  # fmt: skip


class Aggregator:
    """One run's aggregation: asks the strategy for messages, feeds it replies.

    Args:
        plan: the run.
        schema: the tensors that travel.
        signature: the operator's, on the plan; empty in a simulation.
        initial: the adapter that the run started with, which weight decay draws back to.
    """

    def __init__(
        self,
        plan: Plan,
        schema: tuple[TensorSpec, ...],
        signature: str = "",
        initial: Tensors | None = None,
    ) -> None:
        self.plan = plan
        self._initial = initial
        self.signature = signature
        self.schema = schema
        self.strategy = build_strategy(plan)

    def requests(self, number: int, adapter: Tensors, grid: Grid) -> list[Message]:
        """One request per connected site."""
        arrays = to_record(adapter)
        requests = list(self.strategy.configure_train(number, arrays, self.config(number), grid))
        for request in requests:  # Flower's own round number would say the same thing twice
            request.content.config_records[PLAN].pop("server-round", None)
        return requests

    def config(self, number: int) -> ConfigRecord:
        """Plan, round and signature, as every request holds them."""
        config = ConfigRecord({PLAN: self.plan.canonical, ROUND: number})
        if self.signature:
            config[SIGNATURE] = self.signature
        return config

    def next_adapter(self, number: int, adapter: Tensors, updates: Sequence[Tensors]) -> Tensors:
        """The adapter after this round.

        Args:
            number: the round.
            adapter: where the round started.
            updates: one per site, in a fixed order of sites: floating-point sums depend on it.

        Raises:
            PlanError: the strategy did not return an adapter.
        """
        if self.plan.privacy.mechanism == "distributed":
            updates = [self._step(number, adapter, updates)]
        replies = [_as_reply(update) for update in updates]
        try:
            arrays, _ = self.strategy.aggregate_train(number, replies)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise _bad_options(self.plan, str(error)) from None
        if arrays is None:
            raise PlanError(
                "aggregation.strategy", self.plan.aggregation.strategy, "a strategy that averages",
                f"It returned nothing for {len(updates)} updates; choose another.",
            )  # fmt: skip
        plain = {name: array.numpy().astype(np.float32) for name, array in arrays.items()}
        return from_record(ArrayRecord({n: Array(a) for n, a in plain.items()}), self.schema)

    def _step(self, number: int, adapter: Tensors, sums: Sequence[Tensors]) -> Tensors:
        """One SGD step along the sum of the sites' noisy gradient sums.

        The denominator is public and fixed: sites in the plan times the expected batch.
        """
        sites = self.plan.aggregation.sites or len(sums)
        rate = self.plan.training.learning_rate * self.plan.step_scale(number)
        rate /= sites * self.plan.training.expected_batch
        pull = self.plan.training.weight_decay * self.plan.training.learning_rate
        pull *= self.plan.step_scale(number)
        start = self._initial or adapter
        return {
            name: value
            - rate * torch.stack([s[name] for s in sums]).double().sum(dim=0).float()
            - pull * (value - start[name])
            for name, value in adapter.items()
        }

    def state(self) -> Tensors:
        """What the strategy remembers between rounds (momentum and the like), as tensors."""
        tensors: Tensors = {}
        for key, value in sorted(vars(self.strategy).items()):
            if isinstance(value, ArrayRecord):
                tensors |= {f"{key}/record/{n}": torch.tensor(a.numpy()) for n, a in value.items()}
            elif _arrays(value):
                pairs = value.items() if isinstance(value, dict) else enumerate(value)
                kind = type(value).__name__
                tensors |= {f"{key}/{kind}/{n}": torch.tensor(a) for n, a in pairs}
        return tensors

    def restore(self, state: Tensors) -> None:
        """Puts back what `state` returned.

        Raises:
            CheckpointError: it is from another strategy.
        """
        found: dict[tuple[str, str], dict[str, np.ndarray[Any, Any]]] = {}
        for path, tensor in state.items():
            key, kind, name = path.split("/", 2)
            found.setdefault((key, kind), {})[name] = tensor.numpy()
        for (key, kind), arrays in found.items():
            if not hasattr(self.strategy, key):
                raise CheckpointError(
                    "strategy state", key, f"the state of {self.plan.aggregation.strategy}",
                    "The checkpoint is from a run with another strategy; start a new run.",
                )  # fmt: skip
            value: object = arrays
            if kind == "record":
                value = ArrayRecord({n: Array(a) for n, a in arrays.items()})
            elif kind == "list":
                value = [arrays[str(i)] for i in range(len(arrays))]
            setattr(self.strategy, key, value)


class _Parsed(Array):
    """An Array for a strategy in this process: it holds values and never becomes bytes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__("float32", tuple(tensor.shape), "numpy.ndarray", b"")
        self.__dict__["_values"] = tensor.numpy()

    def numpy(self) -> np.ndarray[Any, Any]:
        """The values themselves."""
        values: np.ndarray[Any, Any] = self.__dict__["_values"]
        return values


def _as_reply(update: Tensors) -> Message:
    arrays = ArrayRecord()
    for name in sorted(update):  # FedAvgM pairs tensors by position
        arrays[name] = _Parsed(update[name])
    content = RecordDict({ADAPTER: arrays, "metrics": MetricRecord({_WEIGHT: _PUBLIC_WEIGHT})})
    return Message(content, dst_node_id=0, message_type="train")


def _arrays(value: object) -> bool:
    members = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    )
    return bool(members) and all(isinstance(member, np.ndarray) for member in members)
