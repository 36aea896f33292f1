"""What a plan can switch on beside plain DP-SGD, on real digits: one line each, and charged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from fedgraft_client.entry import spent
from fedgraft_client.ledger import Ledger
from fedgraft_client.store import load_sealed
from fedgraft_common.accounting import epsilon
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan
from fedgraft_simulations.simulate import simulate

OPTIONS: dict[str, dict[str, object]] = {
    "views": {"augmentation.views": 2},
    "weight decay": {"training.weight_decay": 0.2},
    "proximal": {"training.proximal": 0.2},
    "dropout": {"training.dropout": 0.3},
    "alignment": {"training.alignment": 0.1},
    "affine": {"head.local_affine": True},
    "class means": {"head.training": "prototype"},
}
MECHANISMS: dict[str, dict[str, object]] = {
    "local": {"training.local_steps": 2},
    "summed": {"privacy.mechanism": "distributed", "privacy.secure_aggregation": "summed"},
    "real": {"privacy.mechanism": "distributed"},
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """300 digits at three branches; a customer wrote up to four of them and is protected whole."""
    digits = load_digits()
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    images = (digits.images[:300] / 16).astype(np.float32)
    np.savez(path, images=images, labels=digits.target[:300], customer_id=np.arange(300) // 4)
    return Plan().replace(
        {
            "adapter.method": "film", "adapter.layers": "last:1", "privacy.unit": "customer_id",
            "privacy.delta": 1e-3, "training.sample_rate": 0.5, "training.expected_batch": 10.0,
            "training.schedule": "constant", "rounds.count": 2, "data.source": f"npz:{path}",
            "data.test_fraction": 0.3, "sites.count": 3,
        }
    )  # fmt: skip


def run(plan: Plan, directory: Path) -> Tensors:
    """The adapter that a simulation ends with, once what it was charged has been looked at."""
    mechanism = plan.privacy.mechanism
    comparison = simulate(plan, directory, (mechanism,), device="cpu")
    plan = comparison.plan
    for site in comparison.sites:
        ledger = Ledger(directory / "sites" / site.name, "data", plan.privacy.unit, durable=False)
        events = spent(ledger.entries(), plan.hash)
        ledger.close()
        means = plan.head.training == "prototype"
        assert sum(event.steps for event in events) == plan.steps + means
        assert 0.95 * plan.privacy.epsilon < epsilon(events, plan.privacy.delta)
        assert epsilon(events, plan.privacy.delta) <= plan.privacy.epsilon
        sealed = directory / "sites" / site.name / plan.hash / "sealed.safetensors"
        assert (load_sealed(sealed).head.affine is not None) == plan.head.local_affine
    sent = {tensor.name for tensor in comparison.sent}
    assert not any("affine" in name or "head" in name for name in sent)
    return load_file(directory / mechanism / "adapter" / "adapter_model.safetensors")


def moved(one: Tensors, other: Tensors) -> float:
    assert all(tensor.isfinite().all() for tensor in one.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def plain(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return run(plan.replace(MECHANISMS["local"]), tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("option", OPTIONS)
def test_one_line_turns_it_on(plan: Plan, plain: Tensors, option: str, tmp_path: Path) -> None:
    found = run(plan.replace({**MECHANISMS["local"], **OPTIONS[option]}), tmp_path)
    assert moved(found, plain) > 1e-4


@pytest.mark.parametrize("mechanism", ["summed", "real"])
def test_all_of_them_together(plan: Plan, mechanism: str, tmp_path: Path) -> None:
    every = {key: value for option in OPTIONS.values() for key, value in option.items()}
    del every["training.proximal"]  # there is one step in a round
    found = run(plan.replace({**MECHANISMS[mechanism], **every}), tmp_path)
    assert moved(found, {name: torch.zeros_like(value) for name, value in found.items()}) > 1e-4
