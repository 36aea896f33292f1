"""Which backbones work with which adapters: looked up by running all of them.

For each family: does it load; with which adapter methods do its features change and its
per-example gradients agree with the one-record loop, and by which engine; can its frozen part be
cached; does an adapter survive being saved and read by PEFT; does ONNX compute the same. What does
not work is listed with the reason that the program itself gives.

    python -m fedgraft_simulations.support_matrix deploy/support-matrix.md

It prints the short table of the README.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from fedgraft_client.exporting.onnx import export_onnx
from fedgraft_client.gradients import choose_engine
from fedgraft_client.head import LinearHead
from fedgraft_client.prefix import Prefix
from fedgraft_client.task_head import empty_head
from fedgraft_client.tasks import build_task
from fedgraft_common.adapted import AdaptedBackbone, quiet_peft
from fedgraft_common.backbone import load_backbone
from fedgraft_common.errors import FedgraftError
from fedgraft_common.plan import Adapter, Backbone
from fedgraft_common.task_spec import TaskSpec
from fedgraft_simulations.families import FAMILIES, Absent, Family

METHODS = ("ffa-lora", "lora", "dora", "ia3", "film", "ln-tuning", "full", "prompt", "prefix")
"""All methods but `none`, which trains a head on features and has nothing to export."""
LANGUAGE_ONLY = ("prompt", "prefix")
KINDS = {"pooled": "single-label", "tokens": "token-classification", "map": "segmentation"}
RECORDS = 3
CLOSE = 1e-4


@dataclass(slots=True)
class Row:
    """What was found of one family.

    Attributes:
        family: name.
        takes: modality.
        engines: method to the engine that is exact for it.
        cache: `yes`, or why the frozen part cannot be cached.
        peft: `yes`, or what went wrong.
        onnx: `yes`, or why not; `-` if it was not tried.
        reasons: what does not work, to why.
    """

    family: str
    takes: str
    engines: dict[str, str] = field(default_factory=dict)
    cache: str = "-"
    peft: str = "-"
    onnx: str = "-"
    reasons: dict[str, str] = field(default_factory=dict)


def examine(
    family: Family, directory: Path, onnx: bool = True, methods: Sequence[str] = METHODS
) -> Row:
    """Runs everything for one family.

    Args:
        family: which.
        directory: empty; the model is made there.
        onnx: whether ONNX is tried, which takes longest.
        methods: adapter methods to try.
    """
    row = Row(family.name, family.modality)
    try:
        config = family.make(directory)
        load_backbone(config)
    except FedgraftError as error:
        row.reasons["load"] = _reason(error)
        return row
    for method in methods:
        if method in LANGUAGE_ONLY and not family.language:
            continue
        try:
            _try_method(family, config, method, directory / method, row)
        except FedgraftError as error:
            row.reasons[method] = _reason(error)
    if onnx and row.engines:
        row.onnx = _try_onnx(family, config, next(iter(row.engines)), directory / "model.onnx", row)
    return row


def _try_method(family: Family, config: Backbone, method: str, folder: Path, row: Row) -> None:
    adapted = _adapted(family, config, method)
    start = adapted.state()
    inputs = adapted.backbone.example(RECORDS, torch.Generator().manual_seed(4))
    with torch.no_grad():
        before = adapted(*inputs)
        _change(adapted)
        after = adapted(*inputs)
    if not _gap(before, after) > 1e-6:
        row.reasons[method] = "it changes no feature of this network"
        return
    adapted.save(folder)
    problem = _reread(config, folder, family, inputs, after)
    adapted.load(start)
    prefix = Prefix(adapted)
    if method not in LANGUAGE_ONLY and row.cache != "yes":
        row.cache = prefix.reason or "yes"
    row.engines[method] = _engine(family, adapted, prefix)
    row.peft = problem if row.peft in ("-", "yes") else row.peft


def _engine(family: Family, adapted: AdaptedBackbone, prefix: Prefix) -> str:
    """The engine whose gradients agree with the loop; raises GradientError if there is none."""
    head = _head(family, adapted)
    model = _Chain(prefix, head)
    example = adapted.backbone.example(RECORDS, torch.Generator().manual_seed(2))
    with torch.no_grad():
        cached = prefix.compute(*example)
        labels = head.task.example(model(*cached))
    engine, _ = choose_engine(model, cached, labels, head.task.loss)
    engine.close()
    return engine.name


def _reread(
    config: Backbone, folder: Path, family: Family, inputs: tuple[torch.Tensor, ...],
    expected: torch.Tensor,
) -> str:  # fmt: skip
    """Whether PEFT alone gives the same features from the saved adapter."""
    from peft import PeftModel

    backbone = load_backbone(config)
    with quiet_peft(), torch.no_grad():
        model = PeftModel.from_pretrained(backbone.model, str(folder)).eval()
        found = backbone.features(model, inputs, family.features)
    gap = _gap(expected, found)
    return "yes" if gap < CLOSE else f"features differ by {gap:.0e}"


def _try_onnx(family: Family, config: Backbone, method: str, path: Path, row: Row) -> str:
    adapted = _adapted(family, config, method)
    _change(adapted)
    model = _Chain(adapted, _head(family, adapted)).requires_grad_(False).eval()
    try:
        export_onnx(model, adapted.backbone, path)
    except FedgraftError as error:
        row.reasons["ONNX"] = _reason(error)
        return "no"
    return "yes"


class _Chain(nn.Module):
    """Features, then the head."""

    def __init__(self, features: nn.Module, head: LinearHead) -> None:
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.features(*inputs))
        return outputs


def _adapted(family: Family, config: Backbone, method: str) -> AdaptedBackbone:
    adapter = Adapter(method=method, rank=2, tokens=3, layers="last:1")
    return AdaptedBackbone(load_backbone(config), adapter, 0, family.features)


def _change(adapted: AdaptedBackbone) -> None:
    """Another adapter than the start, where LoRA does nothing."""
    generator = torch.Generator().manual_seed(1)
    adapted.load(
        {
            name: value + 0.1 * torch.randn(value.shape, generator=generator)
            for name, value in adapted.state().items()
        }
    )


def _head(family: Family, adapted: AdaptedBackbone) -> LinearHead:
    task = build_task(TaskSpec(kind=KINDS[family.features], classes=("a", "b", "c")))
    head = empty_head(task, adapted.feature_dim)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        head.linear.weight.normal_(generator=generator)
    return head


def _gap(expected: torch.Tensor, found: torch.Tensor) -> float:
    if expected.shape != found.shape:
        return float("inf")
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1))


def _reason(error: FedgraftError) -> str:
    """An error as it fits into a table: what was found and what would have been allowed."""
    text = f"{error.allowed}" if error.field.startswith("adapter.") else f"{error.value}"
    if "no module that suits" in text:
        return "its last block has no module that suits"
    text = re.sub(r"/[^ ]*/", "", text)  # directories of this machine
    return re.sub(r"\s+", " ", text.replace("|", "/")).strip()


def matrix(
    families: Iterable[Family] = FAMILIES,
    onnx: bool = True,
    tell: Callable[[Row], None] = lambda _: None,
) -> list[Row]:
    """Every family whose weights are on this machine, one after the other."""
    rows = []
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows.append(examine(family, Path(folder), onnx))
            except Absent:
                continue
        tell(rows[-1])
    return rows


def table(rows: Iterable[Row]) -> str:
    """Markdown, with numbered reasons under it."""
    reasons: list[str] = []

    def note(text: str) -> str:
        if text not in reasons:
            reasons.append(text)
        return f"[{reasons.index(text) + 1}]"

    lines = [
        "| family | takes | hooks | vmap | loop | not | cache | PEFT | ONNX |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.family, row.takes]
        for engine in ("hooks", "vmap", "loop"):
            cells.append(", ".join(m for m, e in row.engines.items() if e == engine) or "–")
        missing = {m: r for m, r in row.reasons.items() if m != "ONNX"}
        cells.append(", ".join(f"{m} {note(r)}" for m, r in missing.items()) or "–")
        for value in (row.cache, row.peft):
            cells.append(value if value in ("yes", "-") else f"no {note(value)}")
        cells.append(f"no {note(row.reasons['ONNX'])}" if row.onnx == "no" else row.onnx)
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"{i}. {reason}" for i, reason in enumerate(reasons, start=1))]
    return "\n".join(lines) + "\n"


def brief(rows: Iterable[Row]) -> str:
    """Markdown, a line for each kind of input: which families, and which methods go with them."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.takes, []).append(row)
    lines = ["| takes | families | adapters | of some |", "|---|---|---|---|"]
    for takes, found in kinds.items():
        names = dict.fromkeys(re.sub(r" \(\w+\)|, real .*", "", row.family) for row in found)
        every = [m for m in METHODS if all(m in row.engines for row in found)]
        some = [m for m in METHODS if m not in every and any(m in row.engines for row in found)]
        cells = (takes, ", ".join(names), ", ".join(every), ", ".join(some) or "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def read(document: str) -> list[Row]:
    """The families, what they take and their methods, out of what `table` wrote."""
    rows = []
    for line in document.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or cells[0] in ("family", "---"):
            continue
        row = Row(cells[0], cells[1])
        for engine, methods in zip(("hooks", "vmap", "loop"), cells[2:5], strict=True):
            row.engines |= {m: engine for m in methods.split(", ") if m != "–"}
        rows.append(row)
    return rows


INTRODUCTION = """# Which backbones work with which adapters

Generated by `python -m fedgraft_simulations.support_matrix deploy/support-matrix.md`, and compared
with a fresh run by the tests. Each family is a small network with random weights that has all of
the family's parts, or the real weights where it says so; the adapter stands in its last block.

- **hooks, vmap, loop**: adapter methods by the engine that computes their per-example gradients.
  Each agrees with a loop over single records to 1e-4 in float32; the loop is the slow one.
  `none` (head only, also called `feature-extraction`) works with every family.
- **not**: methods that do not suit the family, with the reason.
- **cache**: whether what comes before the adapted block is computed once for each record.
- **PEFT**: a saved adapter, read by PEFT alone, gives the same features.
- **ONNX**: backbone, adapter and head in one file give the same outputs in onnxruntime, to 1e-4,
  for any number of records.

"""


def main() -> None:
    """Writes the matrix into a file, and prints it in brief."""
    parser = argparse.ArgumentParser(description="Run every family and write the table.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--without-onnx", action="store_true")
    parser.add_argument("--only", default="", help="Part of a family's name.")
    options = parser.parse_args()
    chosen = [family for family in FAMILIES if options.only.lower() in family.name.lower()]
    rows = matrix(chosen, not options.without_onnx, lambda row: print(row, file=sys.stderr))  # noqa: T201
    options.path.write_text(INTRODUCTION + table(rows), encoding="utf-8")
    sys.stdout.write(brief(rows))


if __name__ == "__main__":
    main()
