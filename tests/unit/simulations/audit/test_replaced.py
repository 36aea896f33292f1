from __future__ import annotations

import math

import pytest

from fedgraft_client.dp import JointOptimizer
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.site import Site
from fedgraft_common.plan import Plan
from fedgraft_simulations.audit.plants import BUGS, Bug
from fedgraft_simulations.audit.replaced import replaced


def test_what_was_there_comes_back_also_after_an_error() -> None:
    with pytest.raises(ValueError, match="x"), replaced(math, "pi", 3):
        assert math.pi == 3
        raise ValueError("x")
    assert math.pi > 3


def test_an_inherited_method_is_inherited_again() -> None:
    inherited = JointOptimizer.clip_and_accumulate
    with replaced(JointOptimizer, "clip_and_accumulate", None):
        assert JointOptimizer.clip_and_accumulate is None
    assert JointOptimizer.clip_and_accumulate is inherited
    assert "clip_and_accumulate" not in vars(JointOptimizer)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_planted_into_the_production_code_and_taken_out_again(bug: Bug) -> None:
    owners = (JointOptimizer, NoiseSource, Site)
    before = [dict(vars(owner)) for owner in owners]
    with bug.plant(Plan()):
        assert [dict(vars(owner)) for owner in owners] != before
    assert [dict(vars(owner)) for owner in owners] == before
