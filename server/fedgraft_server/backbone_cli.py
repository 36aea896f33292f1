"""`fedgraft server backbone`: what the server hands out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Add backbones that sites may fetch.")

LIBRARY = "backbones"
"""The library's folder in the server's directory."""


@app.callback()
def backbone() -> None:
    """Keeps `add` a sub-command while it is the only one."""


@app.command()
def add(
    directory: Annotated[
        Path, typer.Argument(help="Hugging Face directory: config.json and model.safetensors.")
    ],
    server: Annotated[
        Path, typer.Option(envvar="FEDGRAFT_SERVER", help="The server's directory.")
    ] = Path(),
    name: Annotated[
        str | None, typer.Option(help="Name in plans; default: the backbone's own.")
    ] = None,
) -> None:
    """Check a backbone, sign its manifest and copy it into the server's directory.

    Prints the lines for a plan.
    """
    from fedgraft_common.backbone import load_backbone
    from fedgraft_common.plan import Backbone
    from fedgraft_server.backbone_library import BackboneLibrary, read_operator_key

    key = read_operator_key(server / "operator.key")
    load_backbone(Backbone(source=f"dir:{directory}"))  # sites load it the same way
    manifest = BackboneLibrary(server / LIBRARY).add(directory, key, name)
    typer.echo(
        f"# {len(manifest.files)} files, {manifest.size} bytes, licence {manifest.licence}",
        err=True,
    )
    typer.echo(f'[backbone]\nsource = "server:{manifest.name}"\nsha256 = "{manifest.sha256}"')
