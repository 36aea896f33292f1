"""The demo does what the README prints: the table's numbers, and the two gates behind them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from fedgraft_client.predict import predict
from fedgraft_common.plan import load_plan
from fedgraft_common.plan_cli import check
from fedgraft_simulations.cli import PLANS
from fedgraft_simulations.comparison import Study
from fedgraft_simulations.simulate import DEFAULT_ROWS, TITLES, simulate

README = Path(__file__).parents[2] / "README.md"
MACHINES = 1.0  # points of accuracy that another processor's rounding may move a row


def printed_rows() -> dict[str, tuple[float, str]]:
    """Accuracy after the refit and the privacy columns of each row of the README's table."""
    block = README.read_text(encoding="utf-8").split("<!-- demo -->")[1].split("<!-- /demo -->")[0]
    rows = {}
    for key in DEFAULT_ROWS:
        title = TITLES[key]
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
    check_predictions(study, tmp_path)


def check_predictions(study: Study, directory: Path) -> None:
    """The README's `fedgraft predict`, with what this run left behind."""
    images = torch.tensor(load_digits().images[:3] / 16, dtype=torch.float32).unsqueeze(1)
    hash_ = study.comparisons[0].plan.hash
    sealed = directory / "sites" / "branch-00" / hash_ / "sealed.safetensors"
    found = predict(directory / "distributed" / "adapter", sealed, images)
    text = README.read_text(encoding="utf-8")
    assert f"branch-00/{hash_}/sealed.safetensors" in text
    printed = re.findall(r"^\d,(\d),([\d.]+)$", text, re.MULTILINE)
    assert [label for label, _ in printed] == found.labels
    for (_, probability), row in zip(printed, found.probabilities, strict=True):
        assert float(row.max()) == pytest.approx(float(probability), abs=0.05)


def test_plan_check_prints_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = README.read_text(encoding="utf-8")
    command, _, rest = text[text.index("$ fedgraft plan check") :].partition("\n")
    check(README.parent / command.split()[-1])
    assert capsys.readouterr().out.strip() == rest.partition("```")[0].strip()


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
