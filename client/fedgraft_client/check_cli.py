"""`fedgraft site check` and `fedgraft site status`. Registered by the `site` group.

Exit code 1: a line of the table is red; the daemon does not run, or gave no sign of life for long.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

SiteFileOption = Annotated[
    Path, typer.Option("--site", envvar="FEDGRAFT_SITE", help="The site file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT = Path("site.toml")
_MARKS = {True: "[green]ok[/]", False: "[red]fail[/]", None: "[yellow]-[/]"}


def check(
    site: SiteFileOption = DEFAULT,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="Also hold this plan against policy, budget and backbone."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that this site could take part: data, device, clock, ledger, identity, connection."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fedgraft_common.plan import load_plan

    wanted = load_plan(plan) if plan else None
    with Console(stderr=True).status("Loading"):
        from fedgraft_client.check import Checkup
    results = []
    with Console(stderr=True).status("Checking") as shown:
        for result in Checkup(site, wanted).run():
            results.append(result)
            shown.update(f"Checked: {result.name}")
    failed = [result for result in results if result.ok is False]
    if as_json:
        found = {"ok": not failed, "checks": [asdict(result) for result in results]}
        typer.echo(json.dumps(found, indent=2))
    else:
        table = Table(show_lines=False)
        for name in ("", "check", "found and what to do"):
            table.add_column(name, no_wrap=name != "found and what to do")
        for result in results:
            text = escape(result.found)
            if result.action:
                text += f"\n[bold]{escape(result.action)}[/]"
            table.add_row(_MARKS[result.ok], result.name, text)
        Console().print(table, highlight=False)
    if failed:
        raise typer.Exit(1)


def status(site: SiteFileOption = DEFAULT, as_json: AsJson = False) -> None:
    """Show what the daemon does: connected or not, its last round, what last went wrong."""
    from fedgraft_client.health import sight
    from fedgraft_client.site_file import load_site_file
    from fedgraft_common.errors import CheckpointError

    path = site.parent / load_site_file(site).home / "status.json"
    try:
        seen = sight(path, time.time())
    except ValueError as error:
        raise CheckpointError(
            str(path), str(error), "what the daemon wrote", "Start the daemon again."
        ) from None
    health = seen.health
    if as_json:
        own = asdict(health) if health else None
        age = seen.age if health else None
        typer.echo(json.dumps({"daemon": seen.word, "age": age, "health": own}, indent=2))
    elif health is None:
        typer.echo("daemon      absent: it has not run here. Start it with `fedgraft site up`.")
    else:
        note = {
            "running": f"running, {health.state.value} since {_moment(health.since)}",
            "stopped": f"stopped since {_moment(health.since)}",
            "stale": f"no sign of life for {seen.age:.0f} s: it died, or hangs. Start it again.",
        }
        lines = {
            "daemon": note[seen.word],
            "connected": "yes" if health.connected and seen.is_running else "no",
            "last round": str(health.round or "none"),
            "last status": health.status or "none",
            "last reply": _moment(health.last_answer),
            "last error": health.last_error or "none",
        }
        for name, text in lines.items():
            typer.echo(f"{name:<12}{text}")
    if not seen.is_running:
        raise typer.Exit(1)


def _moment(seconds: float) -> str:
    if not seconds:
        return "never"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
