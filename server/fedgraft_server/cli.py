"""`fedgraft server`: set up a federation, invite sites, shut them out, run the server."""

from __future__ import annotations

import datetime as dt
import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Annotated, Final

import typer

from fedgraft_common.errors import IdentityError, ServerError
from fedgraft_server import backbone_cli

app = typer.Typer(no_args_is_help=True, help="Set up and run a federation server.")
app.add_typer(backbone_cli.app, name="backbone")

Directory = Annotated[
    Path,
    typer.Option("--dir", help="The server's directory.", envvar="FEDGRAFT_SERVER_DIR"),
]
DirectoryArgument = Annotated[
    Path, typer.Argument(help="The server's directory.", envvar="FEDGRAFT_SERVER_DIR")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_HERE: Final = Path("server")
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}
_BACKBONE_SERVICE: Final = "fedgraft_server.backbone_service"


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="New or empty; holds keys: back it up.")],
    host: Annotated[str, typer.Option(help="Name or address by which sites reach this server.")],
    name: Annotated[str, typer.Option(help="Shown to sites.")] = "fedgraft",
    port: Annotated[
        int, typer.Option(help="For sites; the next three numbers are used as well.")
    ] = 9443,
    bind: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",  # noqa: S104
) -> None:
    """Make the CA, the server's certificate, the operator's key and federation.toml."""
    from pydantic import ValidationError

    from fedgraft_server import authority, settings
    from fedgraft_server.registry import utc_now

    try:
        chosen = settings.Settings.model_validate(
            {
                "federation": {"name": name, "host": host},
                "gateway": {"bind": bind, "port": port, "join_port": port + 1},
                "backbone": {"port": port + 2},
                "superlink": {"port": port + 3},
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ServerError(
            ".".join(str(part) for part in first["loc"]), first["input"], first["msg"],
            "Correct the option.",
        ) from None  # fmt: skip
    authority.create(settings.ServerDirectory(directory), chosen, utc_now())
    typer.echo(f"federation  {name}")
    typer.echo(f"directory   {directory} (holds the CA's key: back it up, keep it private)")
    typer.echo(f"ports       {port} and {port + 2} for sites, {port + 1} for joining")
    typer.echo(f"next        fedgraft server invite NAME --dir {directory}")


@app.command()
def invite(
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits and hyphens.")],
    directory: Directory = _HERE,
    valid: Annotated[str, typer.Option(help="How long: 30m, 24h, 7d.")] = "24h",
    group: Annotated[
        list[str] | None, typer.Option(help="A group plans may name; repeat for several.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write it to this file instead of printing it.")
    ] = None,
) -> None:
    """Print a one-time invite for a site; send it the way you would send a password."""
    from pydantic import ValidationError

    from fedgraft_common.atomic import write_atomically
    from fedgraft_common.certificates import fingerprint, read_certificate
    from fedgraft_common.invite import Invite
    from fedgraft_server.registry import Registry, utc_now
    from fedgraft_server.settings import ServerDirectory

    files = ServerDirectory(directory)
    settings = files.settings()
    duration = _duration(valid)
    facts = {
        "name": name,
        "host": settings.federation.host,
        "port": settings.gateway.join_port,
        "ca_sha256": fingerprint(read_certificate(files.ca[0])),
        "expires": (utc_now() + duration).replace(microsecond=0),
    }
    try:
        Invite.model_validate(facts | {"secret": "0" * 43})
    except ValidationError:
        raise IdentityError(
            "site name", name, "1 to 63 lower-case letters, digits and inner hyphens",
            "Choose another name.",
        ) from None  # fmt: skip
    groups = tuple(dict.fromkeys(group or ()))
    with Registry(files.registry) as registry:
        secret = registry.invite(name, groups, duration)
    text = Invite.model_validate(facts | {"secret": secret}).encode()
    if out is None:
        typer.echo(text)
    else:
        write_atomically(out, text.encode() + b"\n")


@app.command()
def sites(directory: Directory = _HERE, as_json: AsJson = False) -> None:
    """List the sites that joined."""
    from fedgraft_server.registry import Registry
    from fedgraft_server.settings import ServerDirectory

    files = ServerDirectory(directory)
    files.settings()
    with Registry(files.registry) as registry:
        found = registry.sites()
    if as_json:
        rows = [
            {
                "name": site.name,
                "groups": site.groups,
                "joined": site.joined.isoformat(),
                "revoked": site.revoked and site.revoked.isoformat(),
                "expires": site.expires.isoformat(),
                "serial": site.serial,
                "fingerprint": site.fingerprint,
                "node_key": site.node_key,
                "node_id": site.node_id,
            }
            for site in found
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("site", "groups", "joined", "certificate until", "state", box=None)
    for site in found:
        state = "revoked" if site.revoked else "joined"
        dates = (f"{site.joined:%Y-%m-%d}", f"{site.expires:%Y-%m-%d}")
        table.add_row(site.name, ", ".join(site.groups), *dates, state)
    Console().print(table)


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="A site's name.")], directory: Directory = _HERE
) -> None:
    """Shut a site out, at once, or take back an unused invite; it can be invited again."""
    from fedgraft_server.registry import Registry
    from fedgraft_server.settings import ServerDirectory

    files = ServerDirectory(directory)
    files.settings()
    with Registry(files.registry) as registry:
        registry.revoke(name)
    typer.echo(f"revoked     {name}")


@app.command()
def up(
    directory: DirectoryArgument = _HERE,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log JSON lines.", envvar="FEDGRAFT_LOG_JSON")
    ] = False,
) -> None:
    """Run the SuperLink, the gateway and the backbone service until SIGTERM."""
    import asyncio
    import os

    # gRPC would warn about the fork that starts the SuperLink; the child only executes.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    import uvloop

    from fedgraft_common.logs import set_up_logs
    from fedgraft_server import metrics
    from fedgraft_server.settings import ServerDirectory
    from fedgraft_server.up import Service, serve

    set_up_logs(log_json)
    services: list[Service] = []
    if importlib.util.find_spec(_BACKBONE_SERVICE) is not None:
        services.append(importlib.import_module(_BACKBONE_SERVICE).serve)
    services.append(metrics.serve)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(ServerDirectory(directory.absolute()), services))


def _duration(text: str) -> dt.timedelta:
    match = re.fullmatch(r"([1-9][0-9]{0,3})([mhd])", text)
    if match is None:
        raise IdentityError(
            "--valid", text, "a number and m, h or d, such as 30m, 24h or 7d", "Correct it."
        )
    return dt.timedelta(**{_UNITS[match[2]]: int(match[1])})
