"""Sites of one run that predict different kinds of things of real digits, over one adapter."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fedgraft_client.entry import spent
from fedgraft_client.ledger import Ledger
from fedgraft_client.store import load_sealed
from fedgraft_common.accounting import epsilon
from fedgraft_common.adapted import adapted_backbone
from fedgraft_common.plan import Plan, load_plan
from fedgraft_simulations.comparison import Study
from fedgraft_simulations.simulate import simulate

PLAN = """
name = "mixed"
[adapter]
method = "film"
layers = "last:1"
[training]
sample_rate = 0.5
expected_batch = 15
[privacy]
mechanism = "distributed"
delta = 1e-3
[rounds]
count = 3
[data]
source = "npz:FILE"
[data.tasks.digit]
classes = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
label = "digit"
[data.tasks.properties]
kind = "multi-label"
classes = ["odd", "small", "round"]
label = "properties"
[data.tasks.ink]
kind = "regression"
targets = ["ink"]
low = [0.0]
high = [1.0]
label = "ink"
[data.tasks.weight]
kind = "ordinal"
classes = ["light", "medium", "heavy"]
label = "weight"
[data.tasks.strokes]
kind = "segmentation"
classes = ["paper", "stroke"]
label = "strokes"
[data.tasks.decay]
kind = "survival"
cuts = [2.0, 4.0, 8.0]
label = "decay"
[sites]
count = 6
tasks = ["digit", "properties", "ink", "weight", "strokes", "decay"]
"""
KINDS = ("single-label", "multi-label", "regression", "ordinal", "segmentation", "survival")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """300 digits, and what the sites want to know of them."""
    directory = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    images, digit = (digits.images[:300] / 16).astype(np.float32), digits.target[:300]
    ink = images.mean(axis=(1, 2))
    times = (10 * ink).astype(np.float32)  # until a page of this ink has faded
    watched = np.arange(300) % 4 > 0
    np.savez(
        directory / "digits.npz",
        images=images,
        digit=digit,
        properties=np.stack([digit % 2, digit < 5, np.isin(digit, (0, 6, 8, 9))], axis=1),
        ink=ink[:, None],
        weight=np.digitize(ink, (0.28, 0.34)),
        strokes=(images > 0.5).astype(np.int64),
        decay=np.stack([times, watched], axis=1),
    )
    (directory / "plan.toml").write_text(PLAN.replace("FILE", str(directory / "digits.npz")))
    return load_plan(directory / "plan.toml")


def test_six_kinds_of_task_share_an_adapter(plan: Plan, tmp_path: Path) -> None:
    comparison = simulate(plan, tmp_path, ("distributed",), device="cpu")
    plan = comparison.plan
    scores = comparison.rows[0].refit
    assert len(scores) == 6
    assert all(math.isfinite(score) for score in scores)
    model = adapted_backbone(plan)
    ended = model.read(tmp_path / "distributed" / "adapter")
    assert all(not torch.equal(ended[name], tensor) for name, tensor in model.state().items())
    for site, kind in zip(comparison.sites, KINDS, strict=True):
        folder = tmp_path / "sites" / site.name
        head = load_sealed(folder / plan.hash / "sealed.safetensors").head
        assert head.task.spec.kind == kind
        ledger = Ledger(folder, "data", "record", durable=False)
        events = spent(ledger.entries(), plan.hash)
        ledger.close()
        assert epsilon(events, plan.privacy.delta) <= plan.privacy.epsilon
    json.dumps(Study((comparison,)).document(), allow_nan=False)  # the report can be written
