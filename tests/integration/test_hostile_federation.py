"""A malicious server over real processes: mutual TLS, SuperLink, `fedgraft site up`."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedgraft_common.plan import load_plan
from fedgraft_simulations.audit.hostile_federation import attack_processes
from fedgraft_simulations.cli import PLANS
from fedgraft_simulations.partition import partition


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_site_refuses_a_hostile_server_over_real_processes(tmp_path: Path) -> None:
    plan = load_plan(PLANS / "digits.toml", ["aggregation.sites=16"])
    answers, account = attack_processes(plan, partition(plan)[0], tmp_path / "federation")
    assert (answers.verdict, account.verdict) == ("pass", "pass"), (answers, account)
    assert account.measured.startswith("2 reservations and 2 commits for 2 honest rounds")
