from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from fedgraft_common.plan import parse_plan
from fedgraft_simulations.comparison import Comparison, Point, Row, SiteFacts, Study, Tensor
from fedgraft_simulations.report import (
    MOST_SITES_DRAWN,
    NARROW,
    WIDE,
    accuracy_chart,
    bytes_chart,
    bytes_words,
    epsilon_chart,
    sites_chart,
    write_report,
)
from fedgraft_simulations.report import (
    _moved_apart as moved_apart,
)
from fedgraft_simulations.table import promise

TITLES = {
    "alone-head": "alone, head only",
    "alone-adapter": "alone, adapter + head",
    "local": "federated, local mechanism",
    "distributed": "federated, distributed mechanism",
    "none": "federated, no DP",
}
HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "br"}


def make_comparison(
    mechanism: str = "distributed", seed: int = 0, sites: int = 4, curves: bool = True,
    classes: tuple[str, ...] = ("a", "b"), site: str = "branch",
) -> Comparison:  # fmt: skip
    document = {
        "name": "wards", "seed": seed, "rounds": {"count": 3}, "training": {"sample_rate": 0.5},
        "privacy": {"mechanism": mechanism, "tolerated_dropouts": 1, "tolerated_colluders": 1},
        "aggregation": {"sites": sites},
    }  # fmt: skip
    facts = tuple(
        SiteFacts(
            f"{site}-{number:02d}", 60 + 10 * number, 20, classes, 0.5, 4.1234,
            math.inf if mechanism == "none" else 7.991,
        )
        for number in range(sites)
    )  # fmt: skip
    rows = []
    for place, (key, title) in enumerate(TITLES.items()):
        epsilon = {"alone": 0.0, "none": math.inf}.get(key.split("-")[0], 7.991)
        refit = tuple(0.6 + 0.05 * place + 0.01 * n + 0.02 * seed for n in range(sites))
        if key.startswith("alone"):
            rows.append(Row(key, title, epsilon, refit))
            continue
        curve = tuple(
            Point(r, 0.2 * r + 0.02 * place + 0.04 * seed, epsilon * r / 3) for r in (1, 2, 3)
        )
        rows.append(Row(key, title, epsilon, refit, refit, curve if curves else (), 4096))
    sent = (Tensor("block.0.scale", (64, 8), "float32", 2048), Tensor("gain", (), "float32", 4))
    notes = ("Summed in place.", f"Seed {seed} & more.")
    return Comparison(parse_plan(document, "test"), facts, tuple(rows), sent, notes, 1.0)


def page_of(study: Study, directory: Path) -> str:
    path = directory / "new" / "report.html"
    write_report(study, path)
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects what a browser would act on, and checks that tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data + " "


def test_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    html = page_of(Study((make_comparison(),)), tmp_path)
    assert "http://" not in html and "https://" not in html and "@import" not in html
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on") and name not in {"src", "srcset", "data"}, (tag, name)
        if name.endswith("href"):
            assert value.startswith("#"), value
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", html))


def test_ids_are_unique_and_references_resolve(tmp_path: Path) -> None:
    html = page_of(Study((make_comparison(),)), tmp_path)
    page = Page(html)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {v for _, name, v in page.attributes if name in {"aria-labelledby", "aria-describedby"}}
    used |= {v.removeprefix("#") for _, name, v in page.attributes if name.endswith("href")}
    used |= set(re.findall(r"url\(#([^)]*)\)", html))
    assert used and used <= set(ids)


def test_equal_studies_give_equal_bytes(tmp_path: Path) -> None:
    first = page_of(Study((make_comparison(), make_comparison(seed=1))), tmp_path / "a")
    second = page_of(Study((make_comparison(), make_comparison(seed=1))), tmp_path / "b")
    assert first == second
    assert first != page_of(Study((make_comparison(),)), tmp_path / "c")


def test_names_are_escaped(tmp_path: Path) -> None:
    hostile = make_comparison(classes=("a", HOSTILE), site=f"{HOSTILE}&$x_1$")
    html = page_of(Study((hostile,)), tmp_path)
    assert "<script" not in html.lower()
    page = Page(html)
    assert f"the same 2 classes: a, {HOSTILE}." in page.text
    assert f"{HOSTILE}&$x_1$-00" in page.text  # in the table; the chart shortens it


def test_classes_that_differ_are_listed_per_site(tmp_path: Path) -> None:
    comparison = make_comparison()
    facts = (*comparison.sites[:-1], SiteFacts("odd", 9, 3, ("x", HOSTILE), 0.5, 4.1, 7.9))
    mixed = Comparison(comparison.plan, facts, comparison.rows, (), (), 1.0)
    page = Page(page_of(Study((mixed,)), tmp_path))
    assert f"x, {HOSTILE}" in page.text and "Every site predicts" not in page.text


def test_any_script_of_the_world_may_name_a_site(tmp_path: Path) -> None:
    for name in ("病院", "$x^2$"):  # the second is not a formula
        text = Page(page_of(Study((make_comparison(site=name),)), tmp_path)).text
        assert text.count(f"{name}-00") == 3  # the chart in two widths, and the table


def test_every_row_site_and_tensor_appears(tmp_path: Path) -> None:
    study = Study((make_comparison(),))
    page = Page(page_of(study, tmp_path))
    assert page.text.index(study.verdict) < page.text.index("What is promised")
    for summary in study.summaries:
        assert summary.title in page.text
        assert f"{summary.refit * 100:.1f}" in page.text
    for site in study.comparisons[0].sites:
        assert page.text.count(site.name) >= 3  # the chart in two widths, and the table
    assert "block.0.scale 64 × 8 float32 2,048" in page.text
    assert "gain scalar float32 4" in page.text
    assert "2 tensors, 2.1 kB in a round" in page.text
    assert "12.3 kB from each site" in page.text  # 3 rounds of 4,096 bytes
    assert "Seed 0 & more." in page.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # flwr imports typer, which warns
def test_every_status_is_named(tmp_path: Path) -> None:
    from fedgraft_common.messages import Status

    text = Page(page_of(Study((make_comparison(),)), tmp_path)).text
    for status in Status:
        assert f" {status.value} " in text.split("What left each site")[1]


def test_the_promise_is_on_the_page(tmp_path: Path) -> None:
    study = Study((make_comparison(),))
    text = Page(page_of(study, tmp_path)).text
    for term, words in promise(study):
        assert f"{term} {words}" in text


def test_the_plans_own_row_is_marked(tmp_path: Path) -> None:
    text = Page(page_of(Study((make_comparison(),)), tmp_path)).text
    assert text.count("this plan 7") == 1
    assert "federated, distributed mechanism this plan" in text


def test_epsilon_wording(tmp_path: Path) -> None:
    text = Page(page_of(Study((make_comparison(),)), tmp_path)).text
    assert "alone, head only 61.5 – nothing leaves –" in text
    assert "federated, distributed mechanism this plan 76.5 76.5 8.00 1e-5" in text
    assert "federated, no DP 81.5 81.5 no DP –" in text
    assert not re.search(r"\b(inf|nan|None)\b", text)


def test_plan_and_hash_are_printed_in_full(tmp_path: Path) -> None:
    comparison = make_comparison()
    page = Page(page_of(Study((comparison, make_comparison(seed=1))), tmp_path))
    assert comparison.plan.hash in page.text
    assert make_comparison(seed=1).plan.hash in page.text
    block = page.text[page.text.index('{ "name"') :]
    assert json.loads(block) == comparison.plan.model_dump(mode="json")


def test_several_seeds_show_means(tmp_path: Path) -> None:
    study = Study(tuple(make_comparison(seed=seed) for seed in range(3)))
    text = Page(page_of(study, tmp_path)).text
    assert "78.5 ± 2.0" in text  # refit means .765, .785, .805
    assert "Each of the 3 seeds is a run by itself" in text
    assert "Seed 2 & more." in text


def test_no_rounds_no_curves(tmp_path: Path) -> None:
    text = Page(page_of(Study((make_comparison(curves=False),)), tmp_path)).text
    assert "Accuracy per site" in text
    assert "Accuracy over rounds" not in text and "Epsilon over rounds" not in text


def test_colours_follow_the_readers_setting(tmp_path: Path) -> None:
    html = page_of(Study((make_comparison(),)), tmp_path)
    assert "prefers-color-scheme: dark" in html
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert re.findall(r"#[0-9a-fA-F]{6}", drawings) == []
    light, dark = (set(re.findall(r"--([a-z-]+):", part)) for part in html.split("@media")[:2])
    assert set(re.findall(r"var\(--([a-z-]+)\)", html)) <= light == dark


def test_many_sites_are_all_in_the_table_and_evenly_drawn(tmp_path: Path) -> None:
    study = Study((make_comparison(sites=MOST_SITES_DRAWN + 12),))
    text = Page(page_of(study, tmp_path)).text
    assert f"{MOST_SITES_DRAWN} of {MOST_SITES_DRAWN + 12} sites, evenly spaced" in text
    for site in study.comparisons[0].sites:
        assert site.name in text
    names = [label.get_text() for label in sites_chart(study, WIDE).axes[0].get_yticklabels()]
    assert (len(names), names[0], names[-1]) == (
        MOST_SITES_DRAWN, study.comparisons[0].sites[-1].name, "branch-00",
    )  # fmt: skip


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_charts_draw_the_numbers(width: int) -> None:
    study = Study((make_comparison(), make_comparison(seed=1)))
    drawn = [list(line.get_ydata()) for line in accuracy_chart(study, width).axes[0].lines]
    for summary in study.summaries:
        if summary.key.startswith("alone"):
            assert [summary.refit] * 2 in drawn
        else:
            assert [summary.refit] in drawn
    curves = [ys for ys in drawn if len(ys) == 3]  # means of two seeds, .04 apart
    assert [ys[0] for ys in curves] == pytest.approx([0.26, 0.28, 0.30])
    bars = bytes_chart(study, width).axes[0].patches
    assert [bar.get_width() for bar in bars] == [0, 0, 4096, 4096, 4096]


def test_of_the_pool_every_record_left() -> None:
    comparison = make_comparison()
    pool = Row("central", "pooled, DP", 7.991, (0.9,) * 4, (0.9,) * 4)
    study = Study((replace(comparison, rows=(*comparison.rows, pool)),))
    words = [text.get_text() for text in bytes_chart(study, WIDE).axes[0].texts]
    assert words == ["nothing leaves"] * 2 + ["4.1 kB"] * 3 + ["all records, once"]


def test_a_score_that_a_site_cannot_have_is_a_dash(tmp_path: Path) -> None:
    """AUC where everybody held out is ill."""
    comparison = make_comparison()
    rows = tuple(replace(row, refit=(math.nan, *row.refit[1:])) for row in comparison.rows)
    page = page_of(Study((replace(comparison, rows=rows),)), tmp_path)
    text = Page(page).text
    assert "nan" not in re.sub(r"data:\S+", "", text.lower()).split()
    assert "8.00 – – – – –" in text


def test_rows_that_spend_alike_share_one_line_of_epsilon() -> None:
    axes = epsilon_chart(Study((make_comparison(),)), WIDE).axes[0]
    assert len(axes.lines) == 1
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0, 2.6637, 5.3273, 7.991], abs=1e-4)
    assert [text.get_text() for text in axes.texts if "8.00" in text.get_text()] == [
        "local and\ndistributed 8.00"
    ]


def test_labels_are_moved_apart_and_stay_in_order() -> None:
    assert moved_apart([0.0, 5.0], [1, 1]) == [0.0, 5.0]
    assert moved_apart([1.0, 1.0, 1.0], [1, 1, 1]) == [0.0, 1.0, 2.0]
    places = moved_apart([0.0, 0.9, 1.0, 1.05, 7.0], [1] * 5)
    assert all(b - a >= 1 - 1e-12 for a, b in pairwise(places))
    assert places[-1] == 7.0


def test_bytes_words() -> None:
    assert [bytes_words(n) for n in (0, 999, 1000, 2_500_000)] == [
        "0 bytes", "999 bytes", "1.0 kB", "2.5 MB",
    ]  # fmt: skip
