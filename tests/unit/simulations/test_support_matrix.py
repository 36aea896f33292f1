"""The support matrix in the documents against a fresh run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedgraft_client.gradients import TOLERANCE
from fedgraft_common.adapted import AdaptedBackbone
from fedgraft_common.errors import AdapterError
from fedgraft_simulations import support_matrix
from fedgraft_simulations.families import FAMILIES, Absent, Family
from fedgraft_simulations.support_matrix import Row, brief, examine, matrix, read, table

DOCUMENT = Path(__file__).resolve().parents[3] / "deploy" / "support-matrix.md"
BY_NAME = {family.name: family for family in FAMILIES}
QUICK = ("BERT", "XLNet", "ResNet (transformers)", "SegFormer", "tabular network")
NAMED = (
    "VGG", "ResNet", "Inception", "EfficientNet", "ConvNeXt", "ViT", "Swin", "SqueezeNet",
    "MobileNet", "BERT", "DistilBERT", "RoBERTa", "GPT-2", "LLaMA", "XLNet", "T5 encoder",
    "wav2vec2", "AST", "PatchTST", "VideoMAE", "CLIP", "Faster R-CNN", "YOLOS", "DETR",
    "SegFormer", "tabular",
)  # fmt: skip


def cells(text: str) -> dict[str, list[str]]:
    """Family to its cells, with the reasons in place of their numbers."""
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE))
    found = {}
    for line in text.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and row[0] not in ("family", "---"):
            found[row[0]] = [
                re.sub(r"\[(\d+)\]", lambda m: f"[{reasons[m[1]]}]", cell) for cell in row
            ]
    return found


def documented() -> dict[str, list[str]]:
    return cells(DOCUMENT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMED)
def test_every_named_family_is_there(name: str) -> None:
    rows = [row for family, row in documented().items() if family.startswith(name)]
    assert rows
    for row in rows:  # something works, and what does not says why
        assert any(cell != "–" for cell in row[2:5]), row
        assert row[7] == "yes"
        assert row[8] == "yes" or re.fullmatch(r"no \[.+\]", row[8]), row


def test_documented_families_are_those_that_run() -> None:
    assert list(documented()) == [family.name for family in FAMILIES]


def test_the_readme_says_it_in_brief_and_family_by_family() -> None:
    readme = (DOCUMENT.parents[1] / "README.md").read_text(encoding="utf-8")
    shown = readme.split("<!-- support -->")[1].split("<!-- /support -->")[0]
    assert shown.strip() == brief(read(DOCUMENT.read_text(encoding="utf-8"))).strip()
    lines = cells(shown)
    assert list(lines) == ["takes", *dict.fromkeys(family.modality for family in FAMILIES)]
    assert "Faster R-CNN" in lines["image"][1] and "prompt" in lines["text"][2]
    assert "prefix" in lines["text"][3]  # DistilBERT's attention does not take it
    whole = DOCUMENT.read_text(encoding="utf-8")
    assert whole[whole.index("| family |") :].strip() in readme


@pytest.mark.parametrize("name", QUICK)
def test_a_fresh_run_says_the_same(name: str, tmp_path: Path) -> None:
    """All but ONNX, which takes longest; and every engine is held to the one-record loop."""
    row = examine(BY_NAME[name], tmp_path, onnx=False)
    (fresh,) = cells(table([row])).values()
    assert fresh[:8] == documented()[name][:8]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_all_of_it(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    try:
        row = examine(BY_NAME[name], tmp_path)
    except Absent as weights:
        pytest.skip(f"real weights are not on this machine: {weights}")
    (fresh,) = cells(table([row])).values()
    assert fresh == documented()[name]


def test_an_engine_that_is_wrong_is_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hooks alone, which XLNet fools, its adapters are no support."""
    from fedgraft_client import gradients

    assert TOLERANCE == 1e-4
    monkeypatch.setattr(gradients, "ENGINES", (gradients.Hooks,))
    row = examine(BY_NAME["XLNet"], tmp_path, onnx=False, methods=("lora", "film"))
    assert row.engines == {}
    assert set(row.reasons) == {"lora", "film"}


def test_an_adapter_that_does_nothing_is_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support_matrix, "_change", lambda _: None)
    row = examine(BY_NAME["tabular network"], tmp_path, onnx=False, methods=("lora",))
    assert row.reasons == {"lora": "it changes no feature of this network"}


def test_an_adapter_that_peft_reads_otherwise_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = AdaptedBackbone.save

    def save_another(self: AdaptedBackbone, directory: Path) -> None:
        state = self.state()
        self.load({name: torch.zeros_like(value) for name, value in state.items()})
        own(self, directory)
        self.load(state)

    monkeypatch.setattr(AdaptedBackbone, "save", save_another)
    row = examine(BY_NAME["tabular network"], tmp_path, onnx=False, methods=("lora",))
    assert row.peft.startswith("features differ by")


def test_a_family_that_does_not_load_says_why(tmp_path: Path) -> None:
    def broken(_: Path) -> None:
        raise AdapterError("model", f"no file {tmp_path}/model | here", "a file", "Copy it.")

    row = examine(replace(BY_NAME["BERT"], make=broken), tmp_path)  # type: ignore[arg-type]
    assert row.reasons == {"load": "no file model / here"}
    assert "| load [1] |" in table([row])
    assert "1. no file model / here" in table([row])


def test_absent_weights_are_left_out() -> None:
    def absent(_: Path) -> None:
        raise Absent("nowhere")

    family = Family("real", "image", absent)  # type: ignore[arg-type]
    seen: list[Row] = []
    assert matrix([family], tell=seen.append) == seen == []
