"""A small plan on real digits, and one audit's context of it, shared by the tests of attacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedgraft_common.plan import Plan
from fedgraft_simulations.audit.candidates import Candidates
from fedgraft_simulations.audit.membership import candidates_of
from fedgraft_simulations.audit.part import AuditContext

SITES, RECORDS = 3, 144


@pytest.fixture(scope="package")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of scikit-learn's digits, each of two pages for tests of units."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    file = tmp_path_factory.mktemp("digits") / "digits.npz"
    images = (digits.images[:RECORDS] * (255 / 16)).astype(np.uint8)
    pages = np.arange(RECORDS) // 2
    np.savez(file, images=images, labels=digits.target[:RECORDS], page=pages)
    return file


@pytest.fixture(scope="package")
def attacked_plan(digits_file: Path) -> Plan:
    """Three sites, three rounds, the demo's backbone and adapter."""
    return Plan().replace(
        {
            "name": "attacked",
            "adapter.method": "film",
            "adapter.layers": "last:2",
            "head.scale": 16.0,
            "training.sample_rate": 0.5,
            "training.expected_batch": 12,
            "training.learning_rate": 2.0,
            "training.schedule": "constant",
            "privacy.mechanism": "distributed",
            "privacy.secure_aggregation": "summed",
            "privacy.delta": 1e-3,
            "rounds.count": 3,
            "aggregation.sites": SITES,
            "data.source": f"npz:{digits_file}",
            "data.test_fraction": 0.5,
            "sites.count": SITES,
        }
    )


@pytest.fixture(scope="package")
def context(attacked_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> AuditContext:
    """An audit of it; its rehearsal runs at the first use."""
    return AuditContext(attacked_plan, tmp_path_factory.mktemp("audit"), seed=1, effort="quick")


@pytest.fixture(scope="package")
def candidates(context: AuditContext) -> list[Candidates]:
    """Of both sites."""
    return candidates_of(context.rehearsal)
