"""The plans on real data: whole in themselves and, where the data lies beside them, run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedgraft_common.plan import Plan, load_plan
from fedgraft_simulations.partition import partition
from fedgraft_simulations.real_data import main
from fedgraft_simulations.simulate import simulate

PLANS = Path(__file__).parents[2] / "simulations/fedgraft_simulations/plans"
TABLES = ("heart", "bank-by-job", "credit-by-school")
FLAMBY = {"cleveland": (199, 104), "hungarian": (172, 89), "switzerland": (30, 16), "va": (85, 45)}


def plan(name: str, *changes: str) -> Plan:
    return load_plan(PLANS / f"{name}.toml", changes)


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory where the plans find their data at runs/real."""
    directory = tmp_path_factory.mktemp("real")
    main([str(shared_data), "--to", str(directory / "runs/real")])
    return directory


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_as_wide_as_its_network(name: str) -> None:
    found = plan(name)
    width = sum(column.width for column in found.data.columns.values())
    assert found.backbone.options["columns"] == width


def test_every_intent_belongs_to_one_branch() -> None:
    data = plan("banking77").data
    listed = [intent for groups in data.label_sets.values() for group in groups for intent in group]
    assert len(listed) == 77
    assert sorted(map(str, listed)) == sorted(data.classes)


def test_the_hospitals_of_heart_are_flambys_in_size(
    real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(real)
    shares = partition(plan("heart"))
    assert {share.name: (len(share.train), len(share.test)) for share in shares} == FLAMBY
    ill = next(share for share in shares if share.name == "switzerland").train.labels
    assert ill.eq(1).all()


def test_preparing_twice_gives_the_same_files(shared_data: Path, real: Path) -> None:
    files = sorted(file for file in (real / "runs/real").iterdir() if file.suffix != ".npz")
    before = [file.read_bytes() for file in files]
    main([str(shared_data), "--to", str(real / "runs/real")])
    assert len(files) > 4 and [file.read_bytes() for file in files] == before


def test_heart_runs_from_its_files_to_a_table(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Switzerland, whose training patients are all ill, takes part like the others."""
    monkeypatch.chdir(real)
    few = plan("heart", "rounds.count=3", "privacy.secure_aggregation=summed")
    found = simulate(few, tmp_path, ("alone-head", "distributed"))
    assert [site.name for site in found.sites] == list(FLAMBY)
    alone, together = (np.array(row.refit) for row in found.rows)
    assert np.isfinite([alone, together]).all()
    assert alone[2] == together[2] == 15 / 16  # everybody is ill: the only answer it can learn
    assert 0 < together.mean() < 1 and alone.mean() > 0.6
    assert found.rows[1].epsilon == pytest.approx(8, abs=0.05)
