"""Mislabelled canaries are whole units."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedgraft_common.plan import Plan
from fedgraft_simulations.audit.blackbox import _plant
from fedgraft_simulations.partition import partition


@pytest.mark.parametrize("unit", ["record", "page"])
def test_a_site_takes_all_of_a_canary_or_nothing(attacked_plan: Plan, unit: str) -> None:
    share = partition(attacked_plan.replace({"privacy.unit": unit}))[0]
    canaries, included, mixed = _plant(share, 6, np.random.default_rng(0))
    assert canaries.units is not None
    assert len(included) == canaries.unit_count == 6
    records = {"record": 6, "page": 12}[unit]  # a page has two
    assert len(canaries) == records
    taken = torch.from_numpy(included)[canaries.units]
    new = len(mixed) - len(share.train)
    assert 0 < new == int(taken.sum()) < records
    assert isinstance(mixed.inputs, torch.Tensor)
    assert isinstance(canaries.inputs, torch.Tensor)
    assert torch.equal(mixed.inputs[-new:], canaries.inputs[taken])
    assert torch.equal(mixed.labels[-new:], canaries.labels[taken])
    assert mixed.unit_count == share.train.unit_count + int(included.sum())
    for image, label in zip(canaries.inputs, canaries.labels, strict=True):
        assert isinstance(share.test.inputs, torch.Tensor)
        own = (share.test.inputs == image).flatten(1).all(dim=1)
        assert label not in share.test.labels[own]  # the label is wrong
