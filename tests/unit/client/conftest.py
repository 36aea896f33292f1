"""A plan whose steps can be worked out by hand: all records in the batch, a head that moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedgraft_common.plan import Plan


@pytest.fixture
def plan(vit_directory: Path) -> Plan:
    return Plan().replace(
        {
            "backbone.source": f"dir:{vit_directory}",
            "adapter.layers": "last:1",
            "head.training": "private",
            "training.sample_rate": 1.0,
            "training.expected_batch": 6.0,
            "training.schedule": "constant",
        }
    )
