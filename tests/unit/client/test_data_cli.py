"""`fedgraft data check`: counts, broken files, and a sheet that only its owner can read."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fedgraft_client.data_cli import app, counted, ranges
from fedgraft_common.task_spec import TaskSpec

SITE = """
classes = ["healthy", "ill"]
[data]
source = "imagefolder:x-rays"
label_map = { normal = "healthy" }
nominal_size = 6
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    for label, value in (("normal", 60), ("ill", 200)):
        (tmp_path / "x-rays" / label).mkdir(parents=True)
        for number in range(3):
            image = Image.fromarray(np.full((8, 8), value, np.uint8))
            image.save(tmp_path / "x-rays" / label / f"{number}.png")
    (tmp_path / "site.toml").write_text(SITE)
    return tmp_path / "site.toml"


def checked(site: Path, *more: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["check", "--site", str(site), *more])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_what_is_found(site: Path) -> None:
    code, text = checked(site)
    assert code == 0
    assert "records     6 of image: float32(6, 1, 8, 8)" in text
    assert "units       6 of record; 6 declared" in text
    assert "labels      healthy 3, ill 3" in text
    sheet = site.parent / "home" / "data" / "look" / "contact-sheet.png"
    assert f"look at     {sheet}" in text
    assert stat.S_IMODE(sheet.stat().st_mode) == 0o600
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[1] == 1200
    drawn = {60, 200} & set(np.unique(pixels[20:140, :900]).tolist())
    assert drawn == {60, 200}  # both kinds of picture are on it


def test_broken_files_are_listed_and_decide_the_exit_code(site: Path) -> None:
    (site.parent / "x-rays" / "ill" / "bad.png").write_bytes(b"no")
    (site.parent / "x-rays" / "odd").mkdir()
    (site.parent / "x-rays" / "ill" / "0.png").rename(site.parent / "x-rays" / "odd" / "0.png")
    code, text = checked(site)
    assert code == 1
    assert "broken      1 (refused; data.skip_broken leaves them out)" in text
    assert "ill/bad.png: not an image that Pillow reads" in text
    assert "unknown     'odd' 1x: not in data.label_map, and no class" in text
    site.write_text(SITE.replace("nominal_size", "skip_broken = true\nnominal_size"))
    assert checked(site)[0] == 1  # the label is still unknown
    (site.parent / "x-rays" / "odd" / "0.png").unlink()
    code, text = checked(site)
    assert code == 0
    assert "broken      1 (left out)" in text


def test_json_lists_everything(site: Path) -> None:
    (site.parent / "x-rays" / "ill" / "bad.png").write_bytes(b"no")
    code, text = checked(site, "--json")
    found = json.loads(text)
    assert code == 1
    assert found["labels"] == {"healthy": 3, "ill": 3}
    assert [one["where"] for one in found["broken"]] == ["ill/bad.png"]


def test_a_table_leaves_a_page_of_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("age,sex,label\n60,f,healthy\n70,m,ill\n", "utf-8")
    (tmp_path / "site.toml").write_text(
        SITE.replace("imagefolder:x-rays", "csv:t.csv")
        + "[data.columns]\nage = { mean = 50, std = 10 }\nsex = { values = ['f', 'm'] }\n"
    )
    code, text = checked(tmp_path / "site.toml")
    assert code == 0
    assert "2 of tabular: float32(2, 3)" in text
    lines = (tmp_path / "home" / "data" / "look" / "sample.txt").read_text("utf-8").splitlines()
    assert lines == ["1\thealthy\tage 1, sex=f 1, sex=m 0", "2\till\tage 2, sex=f 0, sex=m 1"]


@pytest.mark.parametrize("kind", ["audio", "series"])
def test_signals_are_drawn(tmp_path: Path, kind: str) -> None:
    shape = (4, 50) if kind == "audio" else (4, 50, 2)
    arrays: dict[str, Any] = {kind: np.zeros(shape, np.float32), "labels": np.arange(4) % 2}
    np.savez(tmp_path / "t.npz", **arrays)
    (tmp_path / "site.toml").write_text(SITE.replace("imagefolder:x-rays", "t.npz"))
    code, text = checked(tmp_path / "site.toml")
    assert code == 0
    assert "contact-sheet.png" in text


LABELS: dict[str, tuple[dict[str, Any], Any, dict[str, int]]] = {
    "multi-label": ({"classes": ("a", "b")}, [[1.0, 0.0], [1.0, 1.0]], {"a": 2, "b": 1}),
    "token-classification": ({"classes": ("a", "b")}, [[0, 1, 1], [1, -100, -100]],
                             {"a": 1, "b": 3}),
    "segmentation": ({"classes": ("a", "b", "c")}, [[[0, 0], [1, -100]], [[0, 0], [0, 0]]],
                     {"a": 2, "b": 1, "c": 0}),
    "detection": ({"classes": ("a", "b")},
                  [[[1.0, 0, 0, 1, 1], [1.0, 0, 0, 1, 1]], [[0.0, 0, 0, 1, 1], [-1.0, 0, 0, 0, 0]]],
                  {"a": 1, "b": 2}),
    "survival": ({"cuts": (1.0, 2.0)}, [[0.5, 1.0], [3.0, 0.0], [9.0, 0.0]],
                 {"event": 1, "no event": 2}),
    "regression": ({"targets": ("dose",), "low": (0.0,), "high": (9.0,)}, [[2.5], [7.0]], {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", LABELS)
def test_what_is_counted_depends_on_the_task(kind: str) -> None:
    options, labels, expected = LABELS[kind]
    spec = TaskSpec(kind=kind, **options)
    assert counted(torch.tensor(labels), spec) == expected
    extent = {"survival": {"time": (0.5, 9.0)}, "regression": {"dose": (2.5, 7.0)}}
    assert ranges(torch.tensor(labels), spec) == extent.get(kind, {})
    assert ranges(torch.zeros(0), spec) == {}
    assert counted(torch.zeros(0), spec) == dict.fromkeys(spec.classes, 0)


def test_times_have_a_range(tmp_path: Path) -> None:
    table = "age,time,event\n60,3.5,1\n70,9,0\n"
    (tmp_path / "t.csv").write_text(table, "utf-8")
    (tmp_path / "site.toml").write_text(
        "[task]\nkind = 'survival'\ncuts = [2.0, 4.0]\n"
        "[data]\nsource = 'csv:t.csv'\nlabel = ['time', 'event']\nnominal_size = 2\n"
        "[data.columns]\nage = { mean = 50, std = 10 }\n"
    )
    code, text = checked(tmp_path / "site.toml")
    assert code == 0
    assert "labels      event 1, no event 1\n" in text
    assert "range       time 3.5 to 9\n" in text
