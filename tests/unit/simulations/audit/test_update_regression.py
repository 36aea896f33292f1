"""The server's attack on updates: exact without noise, and noise hides what it should."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from fedgraft_client.dp import JointOptimizer
from fedgraft_client.randomness import NoiseSource
from fedgraft_common.accounting import SamplingEvent
from fedgraft_common.mechanism import StepNoise
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan
from fedgraft_simulations.audit import update_regression
from fedgraft_simulations.audit.candidates import Candidates
from fedgraft_simulations.audit.part import AuditContext
from fedgraft_simulations.audit.update_regression import UpdateRegression, unit_gradients

Q = 0.5


def noise_of(std: float, clip: float = math.inf) -> StepNoise:
    event = SamplingEvent(Q, std, 4) if std else None
    return StepNoise(Q, clip, std, std, event)


def attack(
    context: AuditContext, sites: Sequence[Candidates], plan: Plan, step: StepNoise, shares: int
) -> UpdateRegression:
    run = context.rehearsal
    heads = [run.sites[0].trained_head(run.plan)] * len(sites)
    return UpdateRegression(plan, sites, heads, step, shares, context.random("values"))


def sums(
    context: AuditContext, site: Candidates, step: StepNoise, batch: np.ndarray, seed: int
) -> Tensors:
    """What a site's trainer makes of a batch."""
    run = context.rehearsal
    bench = run.sites[0].bench(run.plan)
    _, engine = bench.trainer(run.sites[0].trained_head(run.plan))
    bench.adapted.load(bench.initial)
    parameters = list(bench.adapted.adapter.values())
    groups = [{"params": parameters, "noise_std": step.adapter_std}]
    noise = NoiseSource.for_simulation("test", seed)
    joint = JointOptimizer(torch.optim.SGD(groups, lr=1.0), step.clipping_norm, noise)
    rows = np.flatnonzero(batch)
    joint.noisy_sum(engine, tuple(t[rows] for t in site.cached), site.labels[rows], 64)
    found = {n: p.grad.clone() for n, p in bench.adapted.adapter.items() if p.grad is not None}
    joint.zero_grad(set_to_none=True)
    return found


def rounds(
    context: AuditContext, site: Candidates, step: StepNoise, count: int, members: np.ndarray
) -> tuple[UpdateRegression, np.ndarray]:
    """Poisson batches of `members`; the attack after them, and who was ever sampled."""
    bench = context.rehearsal.sites[0].bench(context.rehearsal.plan)
    found = attack(context, [site], context.rehearsal.plan, step, 1)
    random = np.random.default_rng(5)
    sampled = np.zeros(len(members), dtype=bool)
    for number in range(1, count + 1):
        batch = members & (random.random(len(members)) < Q)
        sampled |= batch
        found.add(number, bench.initial, sums(context, site, step, batch, number))
    return found, sampled


def test_the_attackers_gradients_are_the_trainers(
    context: AuditContext, candidates: list[Candidates]
) -> None:
    """The clipped sum over a batch, by the trainer, is the sum of the attacker's rows."""
    run, site = context.rehearsal, candidates[0]
    bench = run.sites[0].bench(run.plan)
    step = noise_of(0.0, clip=0.7)
    head = run.sites[0].trained_head(run.plan)
    rows = unit_gradients(bench.initial, head, site, step.clipping_norm)
    assert float(rows.norm(dim=1).max()) <= 0.7 * (1 + 1e-5)
    total = sums(context, site, step, site.members, 0)
    flat = torch.cat([total[name].flatten() for name in bench.adapted.adapter])
    torch.testing.assert_close(rows[torch.from_numpy(site.members)].sum(0), flat, atol=1e-4, rtol=0)


def test_without_noise_every_batch_is_read_off(
    context: AuditContext, candidates: list[Candidates]
) -> None:
    site = candidates[0]
    found, sampled = rounds(context, site, noise_of(0.0), 3, site.members)
    (weights,) = found.solve()
    assert roc_auc_score(sampled, weights) > 0.99
    assert weights[sampled].mean() > weights[~sampled].mean() + 0.1


def test_clipping_alone_hides_nobody(context: AuditContext, candidates: list[Candidates]) -> None:
    site = candidates[0]
    found, sampled = rounds(context, site, noise_of(0.0, clip=0.1), 3, site.members)
    assert roc_auc_score(sampled, found.solve()[0]) > 0.99


def test_much_noise_hides_everybody(context: AuditContext, candidates: list[Candidates]) -> None:
    """Sigma 200: a twentieth of an epsilon; the area is that of a coin, +- 0.06 for 48 records."""
    site = candidates[0]
    found, _ = rounds(context, site, noise_of(200.0, clip=1.0), 4, site.members)
    assert abs(roc_auc_score(site.members, found.solve()[0]) - 0.5) < 0.2


def test_more_noise_hides_more(context: AuditContext, candidates: list[Candidates]) -> None:
    site = candidates[0]
    areas = []
    for std in (0.02, 0.5, 20.0):
        found, _ = rounds(context, site, noise_of(std, clip=1.0), 6, site.members)
        areas.append(roc_auc_score(site.members, found.solve()[0]))
    assert areas[0] > areas[1] > areas[2]
    assert areas[0] > 0.9


def test_an_update_is_read_as_a_gradient_whatever_the_mechanism(
    context: AuditContext, candidates: list[Candidates]
) -> None:
    """`local` sends the adapter after a step; the step size is public."""
    run, site = context.rehearsal, candidates[0]
    bench = run.sites[0].bench(run.plan)
    step = noise_of(0.0)
    total = sums(context, site, step, site.members, 0)
    local = run.plan.replace({"privacy.mechanism": "local"})
    rate = local.training.learning_rate / local.training.expected_batch
    after = {name: bench.initial[name] - rate * total[name] for name in total}
    one, other = (attack(context, [site], plan, step, 1) for plan in (run.plan, local))
    one.add(1, bench.initial, total)
    other.add(1, bench.initial, after)
    np.testing.assert_allclose(one.solve(), other.solve(), atol=0.02)


def test_sites_together_are_one_system(context: AuditContext, candidates: list[Candidates]) -> None:
    step = noise_of(0.0)
    found = attack(context, candidates, context.rehearsal.plan, step, 2)
    bench = context.rehearsal.sites[0].bench(context.rehearsal.plan)
    every = [sums(context, site, step, site.members, 0) for site in candidates]
    found.add(
        1, bench.initial, {n: torch.stack([one[n] for one in every]).sum(0) for n in every[0]}
    )
    members = np.concatenate([site.members for site in candidates])
    (weights,) = found.solve()
    assert weights.shape == members.shape
    assert roc_auc_score(members, weights) > 0.9


def test_only_some_values_of_a_large_adapter_are_looked_at(
    context: AuditContext, candidates: list[Candidates], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_regression, "VALUES", 120)
    site = replace(candidates[0])
    found, sampled = rounds(context, site, noise_of(0.0), 2, site.members)
    assert len(found._chosen) == 120
    assert roc_auc_score(sampled, found.solve()[0]) > 0.9


def test_noise_that_is_claimed_and_missing_is_not_believed_in(
    context: AuditContext, candidates: list[Candidates]
) -> None:
    """Updates without noise, under a claim of much: the second belief reads them off."""
    site = candidates[0]
    bench = context.rehearsal.sites[0].bench(context.rehearsal.plan)
    found = attack(context, [site], context.rehearsal.plan, noise_of(5.0, clip=1.0), 1)
    random, sampled = np.random.default_rng(5), np.zeros(len(site.members), dtype=bool)
    for number in (1, 2, 3):
        batch = site.members & (random.random(len(site.members)) < Q)
        sampled |= batch
        found.add(number, bench.initial, sums(context, site, noise_of(0.0, 1.0), batch, number))
    believing, doubting = found.solve()
    assert roc_auc_score(sampled, doubting) > 0.9
    assert roc_auc_score(sampled, doubting) > roc_auc_score(sampled, believing)
