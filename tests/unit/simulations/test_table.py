from __future__ import annotations

import io
import math

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from fedgraft_common.plan import parse_plan
from fedgraft_simulations.comparison import Comparison, Row, SiteFacts, Study
from fedgraft_simulations.table import (
    accuracy_words,
    delta_words,
    epsilon_words,
    promise,
    range_words,
    site_lines,
    site_table,
    summary_table,
    summary_text,
)

TITLES = {
    "alone-head": "alone, head only",
    "alone-adapter": "alone, adapter + head",
    "local": "federated, local mechanism",
    "distributed": "federated, distributed mechanism",
    "none": "federated, no DP",
}
POOL = {"central": "pooled, DP", "central-none": "pooled, no DP"}


def make_study(
    seeds: int = 1,
    sites: tuple[str, ...] = ("branch-00", "branch-01"),
    mechanism: str = "distributed",
    pool: bool = False,
) -> Study:
    lost = {"tolerated_dropouts": 1, "tolerated_colluders": 1}
    promised = math.inf if mechanism == "none" else 7.991
    comparisons = []
    for seed in range(seeds):
        document = {
            "seed": seed,
            "privacy": {"mechanism": mechanism, "delta": 1e-5, **lost},
            "training": {"sample_rate": 0.5},
            "rounds": {"count": 3},
        }
        facts = tuple(
            SiteFacts(name, 90 + 10 * number + seed, 22, ("a", "b"), 0.5, 4.1234, promised)
            for number, name in enumerate(sites)
        )
        rows = tuple(
            Row(
                key, title, {"alone": 0.0, "none": math.inf}.get(key.split("-")[0], 7.991),
                tuple(0.7 + 0.01 * number + 0.02 * seed for number in range(len(sites))),
                () if key.startswith("alone") else (0.5,) * len(sites),
            )
            for key, title in {**TITLES, **(POOL if pool else {})}.items()
        )  # fmt: skip
        plan = parse_plan(document, origin="test")
        comparisons.append(Comparison(plan, facts, rows, (), (), 1.0))
    return Study(tuple(comparisons))


def rendered(table: Table, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.mark.parametrize("seeds", [1, 3])
def test_summary_fits_80_columns_and_wraps_no_row(seeds: int) -> None:
    lines = summary_text(make_study(seeds)).splitlines()
    assert max(map(cell_len, lines)) <= 80
    for title in TITLES.values():
        assert any(title in line for line in lines), title


def test_summary_marks_the_plans_mechanism_without_colour() -> None:
    text = summary_text(make_study())
    assert "\x1b" not in text
    marked = [line for line in text.splitlines() if line.startswith("> federated")]
    assert len(marked) == 1 and "distributed" in marked[0]


def test_summary_has_epsilon_delta_and_verdict() -> None:
    study = make_study()
    lines = summary_text(study).splitlines()
    own, alone, none = (
        next(line for line in lines if TITLES[key] in line)
        for key in ("distributed", "alone-head", "none")
    )
    assert own.split()[-2:] == ["8.00", "1e-5"]
    assert alone.endswith("nothing leaves      –")
    assert none.split()[-3:] == ["no", "DP", "–"]
    assert " ".join(" ".join(lines).split()).endswith(study.verdict)


def test_summary_follows_the_width() -> None:
    assert max(map(cell_len, summary_text(make_study(), width=60).splitlines())) <= 60


def test_site_table_fits_80_columns_and_has_every_site() -> None:
    names = tuple(f"branch-{number:02d}" for number in range(16))
    lines = rendered(site_table(make_study(seeds=2, sites=names)))
    assert max(map(cell_len, lines)) <= 80
    for name in names:
        assert any(line.startswith(name + " ") for line in lines), name
    heading = next(line for line in lines if line.startswith("site"))
    assert heading.split() == [
        "site", "records", "q", "sigma", "epsilon", "head", "adapter", "local", "distributed",
        "no", "DP",
    ]  # fmt: skip
    assert "delta 1e-5" in " ".join(lines)


def test_site_table_with_the_pool_says_the_noise_below_and_folds_no_heading() -> None:
    study = make_study(pool=True, sites=("cleveland", "switzerland"))
    lines = rendered(site_table(study))
    assert max(map(cell_len, lines)) <= 80
    heading = next(line for line in lines if line.startswith("site"))
    assert heading.split()[:2] == ["site", "records"] and "sigma" not in heading
    assert any(line.startswith("switzerland ") for line in lines)
    said = " ".join(" ".join(lines).split())
    assert "the plan's mechanism: q 0.5, sigma 4.12, epsilon 8.00 at delta 1e-5." in said


def test_long_site_names_are_folded_not_cut() -> None:
    name = "a-hospital-with-a-rather-long-name-in-a-small-town"
    lines = rendered(site_table(make_study(sites=(name, "b"))))
    assert max(map(cell_len, lines)) <= 80
    assert name in "".join(line.split(" ")[0] for line in lines)


def test_names_are_text_not_markup() -> None:
    assert any("[red]x" in line for line in rendered(site_table(make_study(sites=("[red]x", "y")))))


def test_no_colour_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    file = io.StringIO()
    Console(file=file, width=80).print(summary_table(make_study()))
    assert "\x1b" not in file.getvalue()


def test_site_lines_average_seeds_and_put_large_sites_first() -> None:
    first, second = site_lines(make_study(seeds=2))
    assert (first.name, second.name) == ("branch-01", "branch-00")
    assert first.train == (100, 101) and first.test == (22, 22)
    assert first.accuracy["local"] == pytest.approx((0.71 + 0.73) / 2)


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [
        (0.0, "nothing leaves"),
        (math.inf, "no DP"),
        (8.0, "8.00"),
        (6.4412, "6.45"),  # up: 6.44 would promise more than was accounted
        (0.001, "0.01"),
        (0.1 + 0.2, "0.30"),  # 0.30000000000000004 is 0.3, not 0.31
    ],
)
def test_epsilon_words(epsilon: float, words: str) -> None:
    assert epsilon_words(epsilon) == words


@pytest.mark.parametrize(
    ("delta", "words"), [(1e-5, "1e-5"), (0.0001, "1e-4"), (2.5e-6, "2.5e-6"), (0.0, "–")]
)
def test_delta_words(delta: float, words: str) -> None:
    assert delta_words(delta) == words


def test_range_words() -> None:
    assert range_words((90, 90)) == "90"
    assert range_words((12345, 12346)) == "12,345–12,346"
    assert range_words((0.25, 0.5)) == "0.25–0.5"
    assert range_words((4.1234, 4.1235)) == "4.12"


def test_one_seed_has_no_deviation() -> None:
    assert "±" not in summary_text(make_study(1))
    study = make_study(3)
    own = study.summary("distributed")
    assert own is not None
    assert accuracy_words(own, 3) == f"72.5 ± {own.deviation * 100:.1f}"


def test_promise_of_the_distributed_mechanism() -> None:
    items = dict(promise(make_study(sites=("a", "b", "c", "d"))))
    trusts = items["Mechanism and what it trusts"]
    assert "h = 2 of 4 sites" in trusts and "dropouts: 1, colluders: 1" in trusts
    assert "secure aggregation" in trusts
    assert "Here it ran as in a federation, with throwaway keys." in trusts
    assert items["Unit"] == "one record"
    assert items["Neighbouring relation"] == "add or remove one unit"
    assert items["Epsilon"].startswith("at most 8.00")
    assert items["Delta"].startswith("1e-5")
    assert "Poisson" in items["Sampling"] and "q = 0.5" in items["Sampling"]
    assert "sigma = 4.123" in items["Sampling"]
    assert "PLD" in items["Accountant"] and "dp-accounting" in items["Accountant"]
    assert "3 rounds of 1 step, T = 3 steps; runs included: 1" in items["Rounds and runs"]
    assert "head or caches" in items["Not promised"] and "nominal size" in items["Not promised"]
    assert "existence of the site" in items["Not promised"]
    assert "promise nothing to anybody" in items["Simulated noise"]


def test_promise_of_the_local_mechanism_trusts_nobody() -> None:
    items = dict(promise(make_study(mechanism="local")))
    assert items["Mechanism and what it trusts"].endswith("It trusts nobody.")
    assert "secure aggregation" not in " ".join(items.values())


def test_without_dp_nothing_is_promised() -> None:
    items = dict(promise(make_study(mechanism="none")))
    assert items["Promise"].startswith("None.")
    assert not {"Epsilon", "Delta", "Accountant"} & set(items)


def test_several_seeds_are_separate_runs() -> None:
    assert (
        "Each of the 3 seeds is a run by itself" in dict(promise(make_study(3)))["Rounds and runs"]
    )
    assert "seeds" not in dict(promise(make_study(1)))["Rounds and runs"]
