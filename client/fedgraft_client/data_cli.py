"""`fedgraft data`: what is in a site's files, before anything is done with them.

Exit code 1: there are broken records that may not be left out, or labels outside the map.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from fedgraft_common.task_spec import TaskSpec

app = typer.Typer(no_args_is_help=True, help="Look at a site's data.")
SiteFileOption = Annotated[
    Path, typer.Option("--site", envvar="FEDGRAFT_SITE", help="The site file.")
]
DEFAULT = Path("site.toml")
SHOWN = 20
OCCUR_IN = {"detection": "boxes", "token-classification": "words", "segmentation": "masks"}
"""What a class is counted in, where it is not records."""


@app.callback()
def group() -> None:
    """Look at a site's data. Nothing of it leaves, and nothing is spent."""


@app.command()
def check(
    site: SiteFileOption = DEFAULT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read every record: how many, of which shape, units, labels, and what is broken."""
    from rich.console import Console

    with Console(stderr=True).status("Reading"):
        found = look(site)
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        for name, text in _lines(found):
            typer.echo(f"{name:<12}{text}")
    if found["problem"]:
        raise typer.Exit(1)


@app.command()
def extract(
    plan_file: Annotated[Path, typer.Argument(help="The plan, which names the backbone.")],
    site: SiteFileOption = DEFAULT,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. backbone.source."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Keep what the frozen backbone makes of each record, and score a head alone on it."""
    from rich.console import Console

    from fedgraft_client import extraction
    from fedgraft_common.plan import load_plan

    plan = load_plan(plan_file, changes or ())
    with Console(stderr=True).status("Extracting"):
        found = extraction.extract(site, plan)
    if as_json:
        rows = [{"score": s.name, "value": s.value, "low": s.low, "high": s.high}
                for s in found.scores]  # fmt: skip
        facts = {"backbone": found.backbone, "shape": found.shape, "units": found.units}
        typer.echo(json.dumps({**facts, "scores": rows, "file": str(found.file)}))
        return
    shape = " x ".join(map(str, found.shape))
    typer.echo(f"backbone    {found.backbone}")
    typer.echo(f"features    {shape} of {found.units} units")
    typer.echo("head alone  " + "\n            ".join(map(str, found.scores)))
    typer.echo(f"kept in     {found.file}")


def look(site: Path) -> dict[str, Any]:
    """What `check` prints, as data.

    Raises:
        PolicyError: the site file is wrong.
        DataError: the source cannot be opened.
    """
    from fedgraft_client.loaders.columns import ColumnsReader
    from fedgraft_client.loaders.load import survey
    from fedgraft_client.loaders.sheet import write_sheet
    from fedgraft_client.site_file import load_site_file
    from fedgraft_client.tasks import build_task
    from fedgraft_common.modality import form_of

    file, base = load_site_file(site), site.parent
    data, task = file.data, build_task(file.spec)
    loaded = survey(data.source, data, task, data.unit, base, file.store_directory(base))
    records = loaded.records
    names = ColumnsReader(data).names if loaded.modality == "tabular" and data.columns else ()
    if loaded.modality == "tabular" and not names:
        names = tuple(f"column {i + 1}" for i in range(records.inputs.shape[1]))  # type: ignore[union-attr]
    sheet = write_sheet(loaded, task, names, file.store_directory(base) / "look")
    return {
        "source": loaded.origin,
        "modality": loaded.modality,
        "form": form_of(records.inputs),
        "inputs": list(names),
        "records": len(records),
        "unit": data.unit,
        "units": records.unit_count if len(records) else 0,
        "nominal_size": data.nominal_size,
        "task": file.spec.kind,
        "labels": counted(records.labels, file.spec),
        "ranges": ranges(records.labels, file.spec),
        "columns": list(loaded.columns),
        "broken": [{"where": where, "why": why} for where, why in loaded.broken],
        "skip_broken": data.skip_broken,
        "unknown_labels": dict(loaded.unknown),
        "look": str(sheet) if sheet else None,
        "problem": bool(loaded.unknown)
        or (bool(loaded.broken) and not data.skip_broken)
        or len(records) == 0,
    }


def counted(labels: torch.Tensor, spec: TaskSpec) -> dict[str, int]:
    """How often each class occurs: records, or boxes, labelled words, or masks that hold it."""
    if len(labels) == 0:  # then it has no shape either
        return dict.fromkeys(spec.classes, 0)
    if spec.kind == "survival":
        seen = int(labels[:, 1].sum())
        return {"event": seen, "no event": len(labels) - seen}
    if spec.kind == "multi-label":
        return {n: int(c) for n, c in zip(spec.classes, labels.sum(dim=0), strict=True)}
    if spec.kind == "detection":
        labels = labels[..., 0].long()  # -1 where an image has fewer boxes
    if labels.is_floating_point() or spec.kind == "language-modelling":
        return {}
    masks = spec.kind == "segmentation"
    every = (labels == k for k in range(len(spec.classes)))
    found = (one.flatten(1).any(dim=1) if masks else one for one in every)
    return {name: int(one.sum()) for name, one in zip(spec.classes, found, strict=True)}


def ranges(labels: torch.Tensor, spec: TaskSpec) -> dict[str, tuple[float, float]]:
    """The smallest and the largest value of each target, or of the time until an event."""
    names = spec.targets or (("time",) if spec.kind == "survival" else ())
    if len(labels) == 0:
        return {}
    return {
        name: (float(labels[:, i].min()), float(labels[:, i].max())) for i, name in enumerate(names)
    }


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [
        ("source", found["source"]),
        ("columns", ", ".join(found["columns"]) or "none"),
        ("records", f"{found['records']} of {found['modality']}: {found['form']}"),
        ("units", f"{found['units']} of {found['unit']}; {found['nominal_size']} declared"),
        ("task", found["task"]),
    ]
    if found["labels"]:
        of = OCCUR_IN.get(found["task"])
        counts = ", ".join(f"{name} {n}" for name, n in found["labels"].items())
        lines.append(("labels", f"{counts} ({of})" if of else counts))
    if found["ranges"]:
        each = (f"{name} {low:g} to {high:g}" for name, (low, high) in found["ranges"].items())
        lines.append(("range", ", ".join(each)))
    broken = found["broken"]
    if broken:
        word = "left out" if found["skip_broken"] else "refused; data.skip_broken leaves them out"
        lines.append(("broken", f"{len(broken)} ({word})"))
        lines += [("", f"{one['where']}: {one['why']}") for one in broken[:SHOWN]]
        if len(broken) > SHOWN:
            lines.append(("", f"and {len(broken) - SHOWN} more; --json lists all"))
    if found["unknown_labels"]:
        words = ", ".join(f"{value!r} {n}x" for value, n in found["unknown_labels"].items())
        lines.append(("unknown", f"{words}: not in data.label_map, and no class"))
    if found["look"]:
        lines.append(("look at", found["look"]))
    return lines
