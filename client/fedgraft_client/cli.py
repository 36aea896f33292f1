"""`fedgraft predict` and `fedgraft evaluate`: use what a federation left behind, at home."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedgraft_common.reading import Reading

app = typer.Typer(help="Predict new records with an adapter and a sealed head.")
evaluate_app = typer.Typer(help="Score an adapter and a sealed head on labelled records.")
Adapter = Annotated[Path, typer.Option(help="Adapter directory in PEFT's format.")]
Head = Annotated[Path, typer.Option(help="The site's sealed.safetensors.")]
Backbone = Annotated[
    str | None, typer.Option(help="Where the backbone is, if not where the plan said: dir:PATH.")
]
Site = Annotated[
    Path | None,
    typer.Option(
        "--site", envvar="FEDGRAFT_SITE", help="A site file: how the records are to be read."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of CSV.")]


@app.command()
def predict(
    source: Annotated[
        str, typer.Argument(help="npz file, or KIND:PATH, e.g. imagefolder:new or csv:new.csv.")
    ],
    adapter: Adapter,
    head: Head,
    backbone: Backbone = None,
    site: Site = None,
    as_json: AsJson = False,
) -> None:
    """Print what is predicted for each record: class and probability, numbers, boxes, ..."""
    from fedgraft_client import predict as prediction
    from fedgraft_client.loaders import load

    reading, _ = _reading(site)
    found = load(source, reading, None)
    rows = [
        {"record": i, **answer}
        for i, answer in enumerate(
            prediction.predict(adapter, head, found.records.inputs, backbone).answers
        )
    ]
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


@evaluate_app.command()
def evaluate(
    source: Annotated[
        str, typer.Argument(help="npz file, or KIND:PATH, with the answers of each record.")
    ],
    adapter: Adapter,
    head: Head,
    backbone: Backbone = None,
    site: Site = None,
    as_json: AsJson = False,
) -> None:
    """Print each score with a 95 % interval. It stays here: nothing of it leaves the site."""
    from fedgraft_client import predict as prediction
    from fedgraft_client.loaders import load
    from fedgraft_client.scores import scores
    from fedgraft_client.store import load_sealed

    reading, unit = _reading(site)
    task = load_sealed(head).task
    records = load(source, reading, task, unit).records
    task.check(records.labels, source)
    found = prediction.predict(adapter, head, records.inputs, backbone)
    labels = prediction.align(found, records)
    results = scores(task, found.outputs, labels, records.units)
    if as_json:
        rows = [{"score": s.name, "value": s.value, "low": s.low, "high": s.high} for s in results]
        typer.echo(json.dumps(rows))
        return
    typer.echo(f"{len(records)} records, {records.unit_count} of {unit}")
    for result in results:
        typer.echo(str(result))


def _reading(site: Path | None) -> tuple[Reading, str]:
    """How records are read, and what a unit is."""
    from fedgraft_client.site_file import load_site_file
    from fedgraft_common.reading import Reading

    if site is None:
        return Reading(), "record"
    file = load_site_file(site)
    return file.data, file.data.unit
