"""All sites' steps in one call, against the sites one by one over messages."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fedgraft_common.plan import Plan, load_plan
from fedgraft_simulations.benchmarks.pooled import pooled
from fedgraft_simulations.simulate import simulate
from fedgraft_simulations.sites import SimulatedSites

PLANS = Path(__file__).parents[3] / "simulations/fedgraft_simulations/plans"


def small(**changes: object) -> Plan:
    """Three sites with twelve records each; every record in every batch."""
    few: dict[str, object] = {
        "adapter.layers": "last:1",
        "training.sample_rate": 1.0,
        "training.expected_batch": 12,
        "rounds.count": 4,
        "data.test_fraction": 0.98,
        "sites.count": 3,
        "sites.partitioner": "IidPartitioner",
        "sites.options": {},
        "aggregation.sites": 3,
    }
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return load_plan(PLANS / "digits.toml").replace(few | named)


@pytest.mark.parametrize("training", ["fixed", "private"])
def test_without_noise_the_pool_is_the_federation(training: str, tmp_path: Path) -> None:
    plan = small(privacy__mechanism="none", head__training=training)
    sites = SimulatedSites(plan, tmp_path / "sites").all()
    simulate(plan, tmp_path, rows=("none",))
    single = SimulatedSites(plan, tmp_path / "sites").all()
    bench = single[0].bench(plan)
    wanted = bench.adapted.read(tmp_path / "none" / "adapter")
    adapter, heads = pooled(plan, sites)
    moved = max(float((wanted[n] - t).abs().max()) for n, t in bench.initial.items())
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, wanted[name], atol=2e-3 * moved, rtol=1e-4)
    for site, head in zip(single, heads, strict=True):
        left = site.trained_head(plan)
        torch.testing.assert_close(
            head.linear.weight.data, left.linear.weight.data, atol=1e-4, rtol=1e-3
        )


def test_the_noise_is_that_of_all_sites_together(tmp_path: Path) -> None:
    """One round without step: the adapter's noise is of n shares, a head's of its own site."""
    plan = small(
        privacy__mechanism="local", head__training="private", rounds__count=1,
        training__sample_rate=0.01, privacy__epsilon=1.0, aggregation__options={},
        aggregation__strategy="FedAvg",
    )  # fmt: skip
    sites = SimulatedSites(plan, tmp_path / "sites").all()
    step, bench = sites[0].step(plan), sites[0].bench(plan)
    adapter, heads = pooled(plan, sites)
    values = torch.cat([(adapter[n] - bench.initial[n]).flatten() for n in sorted(adapter)])
    rate = plan.training.learning_rate / (3 * plan.training.expected_batch)
    expected = rate * math.sqrt(3) * step.adapter_std
    assert float(values.std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * len(values)))
    rate = plan.training.head_learning_rate / plan.training.expected_batch
    whole = torch.cat([head.linear.weight.data.flatten() for head in heads])
    assert float(whole.std()) == pytest.approx(rate * step.head_std, rel=0.1)
    first, second = (head.linear.weight.data.flatten() for head in heads[:2])
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4 / math.sqrt(
        len(first)
    )


def test_what_a_pool_cannot_do_is_refused(tmp_path: Path) -> None:
    plan = small(privacy__mechanism="local", training__local_steps=2)
    with pytest.raises(ValueError, match="one step in a round"):
        pooled(plan, SimulatedSites(plan, tmp_path).all())
