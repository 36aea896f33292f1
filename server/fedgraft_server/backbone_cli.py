"""`fedgraft server backbone`: what this server hands out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedgraft_common.errors import BackboneError

app = typer.Typer(no_args_is_help=True, help="Backbones that sites may fetch from this server.")
ServerOption = Annotated[
    Path,
    typer.Option(
        "--server", metavar="DIR", help="The server's directory.", envvar="FEDGRAFT_SERVER"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_HERE = Path("server")


@app.command()
def add(
    directory: Annotated[
        Path, typer.Argument(help="config.json, model.safetensors, manifest.json.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Default: the one in manifest.json, else the directory's.")
    ] = None,
    server: ServerOption = _HERE,
    as_json: AsJson = False,
) -> None:
    """Copy a backbone, sign its manifest with the operator's key, and print what a plan needs."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fedgraft_server.backbone_library import BackboneLibrary

    path = server / "operator.key"
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise _no_key(path, getattr(error, "strerror", None) or "no usable key") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(path, "another kind of key")
    manifest = BackboneLibrary(server / "backbones").add(directory, key, name)
    pinned = {
        "source": f"server:{manifest.name}",
        "sha256": manifest.weights_sha256,
        "manifest_sha256": manifest.hash,
    }
    if as_json:
        typer.echo(json.dumps(pinned, indent=2))
        return
    typer.echo("[backbone]")
    for field, value in pinned.items():
        typer.echo(f'{field} = "{value}"')


@app.command(name="list")
def show(server: ServerOption = _HERE, as_json: AsJson = False) -> None:
    """Name, size, licence and hash of every backbone."""
    from fedgraft_server.backbone_library import BackboneLibrary

    held = [manifest for _, manifest in BackboneLibrary(server / "backbones").manifests()]
    if as_json:
        typer.echo(json.dumps([{**m.model_dump(mode="json"), "hash": m.hash} for m in held]))
        return
    for manifest in held:
        typer.echo(
            f"{manifest.name}  {manifest.size} bytes  {manifest.licence}  {manifest.weights_sha256}"
        )


def _no_key(path: Path, found: str) -> BackboneError:
    return BackboneError(
        str(path), found, "the operator's Ed25519 key in PEM",
        "Name the server's directory with --server; `fedgraft server init` makes one.",
    )  # fmt: skip
