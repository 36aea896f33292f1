"""`fedgraft predict`: use what a federation left behind, at home."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Predict new records with an adapter and a sealed head.")


@app.command()
def predict(
    images: Annotated[Path, typer.Argument(help="npz file with an array `images`.")],
    adapter: Annotated[Path, typer.Option(help="Adapter directory in PEFT's format.")],
    head: Annotated[Path, typer.Option(help="The site's sealed.safetensors.")],
    backbone: Annotated[
        str | None,
        typer.Option(help="Where the backbone is, if not where the plan said: dir:PATH."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of CSV.")] = False,
) -> None:
    """Print the class and its probability for each record."""
    from fedgraft_client import predict as prediction
    from fedgraft_client.data import load_images

    found = prediction.predict(adapter, head, load_images(images), backbone)
    rows = [{"record": i, **answer} for i, answer in enumerate(found.answers)]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
