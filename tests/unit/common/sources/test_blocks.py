"""The blocks of a model are found by looking."""

from __future__ import annotations

from torch import nn

from fedgraft_common.sources.blocks import find_blocks


def test_blocks_of_nested_lists_are_the_innermost() -> None:
    stages = nn.Sequential(
        nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))), nn.Sequential(nn.Linear(2, 2))
    )
    assert find_blocks(stages) == ("0.0", "0.1", "0.2", "1.0")


def test_a_model_without_lists_has_no_blocks() -> None:
    assert find_blocks(nn.Linear(2, 2)) == ()
