"""The demo does what the README prints: the table's numbers, and the two gates behind them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedgraft_common.plan import load_plan
from fedgraft_simulations.cli import PLANS
from fedgraft_simulations.comparison import Study
from fedgraft_simulations.simulate import TITLES, simulate

README = Path(__file__).parents[2] / "README.md"
MACHINES = 1.0  # points of accuracy that another processor's rounding may move a row


def printed_rows() -> dict[str, tuple[float, str]]:
    """Accuracy after the refit and the privacy columns of each row of the README's table."""
    block = README.read_text(encoding="utf-8").split("<!-- demo -->")[1].split("<!-- /demo -->")[0]
    rows = {}
    for key, title in TITLES.items():
        found = re.search(rf"{re.escape(title)} +([\d.]+) +[\d.–]+ +(.+)$", block, re.MULTILINE)
        assert found, f"the README's demo table has no row {title!r}"
        rows[key] = (float(found[1]), found[2].strip())
    return rows


def check_gates(study: Study) -> None:
    """At least 4 points above staying alone, within 3 of no DP, at epsilon of at most 8."""
    refit = {s.key: s.refit for s in study.summaries}
    alone = max(refit["alone-head"], refit["alone-adapter"])
    assert refit["distributed"] >= alone + 0.04
    assert refit["distributed"] >= refit["none"] - 0.03
    promised = study.summary("distributed")
    assert promised is not None
    assert 7.9 < promised.epsilon <= 8.0
    assert promised.delta == 1e-5


def test_the_demo_prints_what_the_readme_says(tmp_path: Path) -> None:
    rows = ("alone-head", "alone-adapter", "distributed", "none")
    study = Study((simulate(load_plan(PLANS / "digits.toml"), tmp_path, rows),))
    check_gates(study)
    printed = printed_rows()
    for summary in study.summaries:
        assert 100 * summary.refit == pytest.approx(printed[summary.key][0], abs=MACHINES)
    assert printed["distributed"][1].split() == ["7.99", "1e-5"]
    assert printed["none"][1].startswith("no DP")


@pytest.mark.slow
def test_the_gates_hold_on_average_over_three_seeds(tmp_path: Path) -> None:
    plan = load_plan(PLANS / "digits.toml")
    comparisons = [
        simulate(plan.replace({"seed": seed}), tmp_path / str(seed)) for seed in range(3)
    ]
    check_gates(Study(tuple(comparisons)))


@pytest.mark.parametrize("file", sorted(PLANS.glob("*.toml")), ids=lambda file: file.stem)
def test_every_plan_file_is_valid(file: Path) -> None:
    assert load_plan(file).name == file.stem


def test_branches_with_different_tasks_share_an_adapter(tmp_path: Path) -> None:
    plan = load_plan(PLANS / "digits-three-tasks.toml", ["rounds.count=2", "sites.count=3"])
    comparison = simulate(plan, tmp_path, ("distributed",))
    assert [len(site.classes) for site in comparison.sites] == [10, 2, 2]
    assert len(comparison.rows[0].refit) == 3
