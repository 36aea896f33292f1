"""`fedgraft site join`: become a site of a federation. Registered by the `site` group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def join(
    invite: Annotated[
        str, typer.Argument(help="The invite's text, or a file that holds it.", show_default=False)
    ],
    home: Annotated[
        Path,
        typer.Option(help="New directory for keys and certificate.", envvar="FEDGRAFT_SITE_HOME"),
    ] = Path("site"),
) -> None:
    """Make this site's keys, and get its certificate with an invite."""
    from fedgraft_client.identity import join as join_federation
    from fedgraft_common.certificates import read_pem

    file = Path(invite) if len(invite) < 256 else None  # an invite itself is longer
    text = read_pem(file).decode("utf-8", "replace") if file and file.is_file() else invite
    identity = join_federation(text, home)
    typer.echo(f"federation  {identity.facts.federation}")
    typer.echo(f"site        {identity.facts.site}")
    typer.echo(f"certificate until {identity.expires:%Y-%m-%d}, renewed by itself before")
    typer.echo(f"directory   {home} (private keys: keep it private, back it up)")
