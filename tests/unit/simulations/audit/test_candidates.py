"""Who an attacker asks about: the truth, random halves, and units of several records."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fedgraft_client.data import Records
from fedgraft_client.head import LinearHead
from fedgraft_simulations.audit.candidates import Candidates, log_probability, together
from fedgraft_simulations.audit.part import AuditContext


def test_members_are_the_records_that_were_trained_on(
    candidates: list[Candidates], context: AuditContext
) -> None:
    for site, share in zip(candidates, context.rehearsal.shares, strict=True):
        assert site.members.sum() == len(share.train)
        assert len(site.members) == len(share.train) + len(share.test)
        taken = site.taken(site.members)
        assert isinstance(taken.inputs, torch.Tensor)
        assert isinstance(share.train.inputs, torch.Tensor)
        assert torch.equal(taken.inputs, share.train.inputs)
        assert torch.equal(taken.labels, share.train.labels)
        assert taken.units is None


def test_random_choices_have_as_many_units_and_differ(candidates: list[Candidates]) -> None:
    random = np.random.default_rng(0)
    first, second = (candidates[0].choose(random) for _ in range(2))
    assert first.sum() == second.sum() == candidates[0].members.sum()
    assert (first != second).any()


def test_a_unit_is_the_mean_of_its_records_and_stays_whole(context: AuditContext) -> None:
    run = context.rehearsal
    bench, share = run.sites[0].bench(run.plan), run.shares[0]
    paired = replace(
        share,
        train=Records(share.train.inputs, share.train.labels, torch.arange(len(share.train)) // 2),
        test=Records(share.test.inputs, share.test.labels, torch.arange(len(share.test)) // 2),
    )
    site = Candidates.of(paired, bench)
    assert len(site.members) == paired.train.unit_count + paired.test.unit_count
    values = np.arange(len(site.labels), dtype=float)
    assert site.per_unit(values)[:2].tolist() == [0.5, 2.5]
    taken = site.taken(site.choose(np.random.default_rng(0)))
    assert taken.units is not None
    assert taken.unit_count == paired.train.unit_count
    assert torch.equal(taken.units.unique(), torch.arange(taken.unit_count))
    assert (torch.bincount(taken.units) <= 2).all()


def test_log_probability_is_the_softmax_of_the_label() -> None:
    head = LinearHead(3, 2)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
    features = torch.tensor([[2.0, 0, 0], [0, 0, 5.0]])
    found = log_probability(head, features, torch.tensor([0, 1]))
    assert np.allclose(np.exp(found), [np.e / (np.e + 1), 0.5])


def test_records_of_any_modality_are_put_together() -> None:
    image = torch.zeros(1, 1, 2, 2)
    assert together(["a"], ["b", "c"]) == ["a", "b", "c"]
    images, texts = together((image, ["a"]), (image, ["b"]))
    assert isinstance(images, torch.Tensor)
    assert len(images) == 2
    assert texts == ["a", "b"]
