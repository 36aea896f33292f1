"""`fedgraft site peers` and `accept-peer`: whose keys this site knows. Registered by `site`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

Site = Annotated[Path, typer.Option("--site", envvar="FEDGRAFT_SITE", help="The site file.")]


def peers(
    site: Site = Path("site.toml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show this site's own key fingerprint, those of the peers it knows, and strangers."""
    from fedgraft_client.account import read_ledger
    from fedgraft_client.identity import load_identity
    from fedgraft_client.peers import accepted, known_peers, strangers
    from fedgraft_client.site_file import load_site_file
    from fedgraft_common.site_signature import key_fingerprint

    file = load_site_file(site)
    store = file.store_directory(site.parent)
    key = load_identity(site.parent / file.home / "identity").site_key()
    found = {(key.name, key_fingerprint(key.key.public_key())): "this site"}
    ledger = store / "ledger.sqlite3"
    known = known_peers(read_ledger(ledger)) if ledger.exists() else {}
    for word, some in (
        ("known", known),
        ("accepted, from the next set-up on", accepted(store / "peers")),
        ("stranger", strangers(store / "peers")),
    ):
        for pair in some.items():
            found.setdefault(pair, word)
    if as_json:
        rows = [{"peer": n, "key": k, "is": word} for (n, k), word in found.items()]
        typer.echo(json.dumps(rows, indent=2))
        return
    for (name, fingerprint), word in found.items():
        typer.echo(f"{fingerprint}  {name}  ({word})")


def accept_peer(
    name: Annotated[str, typer.Argument(help="The peer's name in the federation.")],
    fingerprint: Annotated[
        str, typer.Argument(help="Of its key, as `fedgraft site peers` prints it at the peer.")
    ],
    site: Site = Path("site.toml"),
) -> None:
    """Vouch for a peer's key; the daemon writes it into the ledger at the next set-up."""
    from fedgraft_client.peers import accept
    from fedgraft_client.site_file import load_site_file

    accept(load_site_file(site).store_directory(site.parent) / "peers", name, fingerprint)
    typer.echo(f"Accepted {name}. Was the fingerprint compared with that site, not the server?")
