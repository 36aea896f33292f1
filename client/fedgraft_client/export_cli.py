"""`fedgraft export`: take what a federation left behind to where it is used."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedgraft_client.exporting.card import Results, Spent
    from fedgraft_client.exporting.deployed import Parts
    from fedgraft_common.plan import Plan

app = typer.Typer(help="Write adapter, merged weights, ONNX and a model card.")
FORMATS = ("peft", "merged", "onnx", "onnx-int8")
PUBLIC = ("peft",)
"""What holds nothing but the adapter; the head was fitted without noise."""
FILES = {
    "peft": ("adapter/", "the adapter in PEFT's format"),
    "merged": ("merged/", "the backbone with the adapter in its weights, and the head beside it"),
    "onnx": ("model.onnx", "backbone, adapter and head, any number of records"),
    "onnx-int8": ("model.int8.onnx", "the same with weights in 8 bits: smaller, less exact"),
}


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist yet.")],
    plan_file: Annotated[Path, typer.Option("--plan", help="The run's plan.")],
    adapter: Annotated[Path, typer.Option(help="Adapter directory in PEFT's format.")],
    head: Annotated[Path, typer.Option(help="The site's sealed.safetensors.")],
    formats: Annotated[
        str, typer.Option("--format", help="Any of " + ", ".join(FORMATS) + ", with commas.")
    ] = "peft,merged",
    backbone: Annotated[
        str | None,
        typer.Option(help="Where the backbone is, if not where the plan said: dir:PATH."),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(help="The site file: what its ledger spent, results on held-out records."),
    ] = None,
    about: Annotated[
        Path | None, typer.Option(help="Markdown file in which the site describes its data.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Only what may leave the site: no head, no results.")
    ] = False,
) -> None:
    """Write what a federation left behind, and a model card beside it."""
    from fedgraft_client.exporting.card import model_card
    from fedgraft_client.exporting.deployed import assemble
    from fedgraft_common.plan import load_plan

    chosen = _chosen(formats, public)
    plan = load_plan(plan_file)
    _check(out, about)
    parts = assemble(adapter, head, backbone)
    _check_plan(plan, parts)
    spent = results = None
    if site is not None:
        spent = _spent(plan, site)
        results = None if public else _results(parts, site)
    text = about.read_text(encoding="utf-8") if about else ""
    unfinished = out.with_name(f".{out.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        notes = [_write(name, parts, unfinished) for name in chosen]
        card = model_card(
            plan, parts.model.backbone, parts.model.head.task.spec,
            dict(FILES[name] for name in chosen), text, spent, results, public,
        )  # fmt: skip
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for name, note in zip(chosen, notes, strict=True):
        typer.echo(f"{FILES[name][0]:16} {note}")
    typer.echo(f"{'README.md':16} model card" + ("" if public else "; stays at the site"))


def _chosen(formats: str, public: bool) -> list[str]:
    from fedgraft_common.errors import ExportError

    chosen = [name.strip() for name in formats.split(",") if name.strip()]
    if public and formats == "peft,merged":
        chosen = list(PUBLIC)
    allowed = PUBLIC if public else FORMATS
    for name in chosen or [formats]:
        if name not in allowed:
            raise ExportError(
                "--format", name, ", ".join(allowed),
                "With --public only what is private by the promise is written; the head is not."
                if public else "Choose from these.",
            )  # fmt: skip
    return sorted(set(chosen), key=FORMATS.index)


def _check(out: Path, about: Path | None) -> None:
    from fedgraft_common.errors import ExportError

    if out.exists():
        raise ExportError(
            str(out), "something that exists", "a new directory", "Choose another name."
        )
    if about is not None and not about.is_file():
        raise ExportError("--about", str(about), "an existing text file", "Check the path.")


def _check_plan(plan: Plan, parts: Parts) -> None:
    from fedgraft_common.errors import ExportError

    if parts.plan not in (plan.hash, "unknown"):
        raise ExportError(
            "--plan", f"plan {plan.hash[:12]}", f"{parts.plan[:12]}, as the head was sealed for",
            "Name the plan of that run, with the same number of sites.",
        )  # fmt: skip


def _write(name: str, parts: Parts, out: Path) -> str:
    from fedgraft_client.exporting.merged import merge
    from fedgraft_client.exporting.onnx import export_onnx, quantise

    target = out / FILES[name][0]
    if name == "peft":
        shutil.copytree(parts.adapter, target)
        return "as the run left it"
    if name == "merged":
        return f"features agree to {merge(parts, target):.0e}"
    exact = out / FILES["onnx"][0]
    facts = {
        "fedgraft.task": parts.model.head.task.spec.model_dump_json(),
        "fedgraft.plan": parts.plan,
    }
    if name == "onnx":
        return (
            f"outputs agree to {export_onnx(parts.model, parts.model.backbone, exact, facts):.0e}"
        )
    temporary = not exact.exists()
    if temporary:
        export_onnx(parts.model, parts.model.backbone, exact, facts)
    quantise(exact, target)
    if temporary:
        exact.unlink()
    return _int8_note(parts, target)


def _int8_note(parts: Parts, path: Path) -> str:
    """How far 8 bits are from 32, in the outputs of synthetic records."""
    import torch

    from fedgraft_client.exporting.onnx import run_onnx

    inputs = parts.model.backbone.example(16, torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = parts.model(*inputs)
    found = run_onnx(path, inputs)
    gap = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
    return f"outputs differ by {gap:.0e}; {path.stat().st_size:,} bytes"


def _spent(plan: Plan, site: Path) -> Spent | None:
    from fedgraft_client.account import read_ledger, runs
    from fedgraft_client.exporting.card import Spent
    from fedgraft_client.site_file import load_site_file

    file = load_site_file(site)
    ledger = file.store_directory(site.parent) / "ledger.sqlite3"
    accounts = runs(read_ledger(ledger), plan.privacy.delta) if ledger.exists() else []
    own = [account for account in accounts if account.plan == plan.hash]
    if not own:
        return None
    return Spent(own[-1].epsilon, accounts[-1].lifetime, plan.privacy.delta, file.data.unit)


def _results(parts: Parts, site: Path) -> Results | None:
    import torch

    from fedgraft_client.exporting.card import Results
    from fedgraft_client.opening import load_records
    from fedgraft_client.predict import CHUNK
    from fedgraft_client.scores import scores
    from fedgraft_client.site_file import load_site_file
    from fedgraft_common.modality import take

    file = load_site_file(site)
    if file.data.held_out is None:
        return None
    records = load_records(file, site.parent, file.data.held_out)
    outputs = []
    with torch.no_grad():
        for start in range(0, len(records), CHUNK):
            part = take(records.inputs, slice(start, start + CHUNK))
            outputs.append(parts.model(*parts.model.backbone.prepare(part)))
    task = parts.model.head.task
    found = scores(task, torch.cat(outputs), records.labels, records.units)
    return Results(len(records), found)
