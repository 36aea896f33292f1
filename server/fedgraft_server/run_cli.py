"""`fedgraft run`, `runs`, `stop`, `resume`, `logs`: what the coordinator does on the server.

They change what is wanted of a run (`fedgraft_server.run_folder`) and tell the SuperLink;
`fedgraft server up` sees to it that it happens (`fedgraft_server.continuation`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgraft_common.errors import ServerError
from fedgraft_common.plan import load_plan

if TYPE_CHECKING:
    from fedgraft_server.run_folder import RunFolder
    from fedgraft_server.runs import Runs
    from fedgraft_server.settings import ServerDirectory

run_app = typer.Typer(help="Start a run.")
runs_app = typer.Typer(help="List the runs of this server.")
stop_app = typer.Typer(help="Stop a run; what it finished is kept.")
resume_app = typer.Typer(help="Continue a run from its newest checkpoint.")
logs_app = typer.Typer(help="Print what a run writes, until it ends.")

Directory = Annotated[
    Path, typer.Option("--dir", help="The server's directory.", envvar="FEDGRAFT_SERVER_DIR")
]
RunName = Annotated[str, typer.Argument(help="Name of a run; its beginning is enough.")]
_HERE = Path("server")


@run_app.command()
def run(
    plan_file: Annotated[Path, typer.Argument(help="A plan file (TOML).")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. privacy.epsilon=2."),
    ] = None,
    sites: Annotated[
        list[str] | None, typer.Option("--site", help="A site that takes part; repeat for more.")
    ] = None,
    group: Annotated[str | None, typer.Option(help="All sites of this group take part.")] = None,
    directory: Directory = _HERE,
) -> None:
    """Sign a plan and start it over the sites that are named; default: all that joined."""
    from fedgraft_common.signing import sign_plan
    from fedgraft_server.registry import Registry
    from fedgraft_server.run_folder import RunFacts, RunFolder
    from fedgraft_server.settings import ServerDirectory

    server = ServerDirectory(directory.absolute())
    plan = load_plan(plan_file, changes or ())
    with Registry(server.registry) as registry:
        names = sorted(member.name for member in registry.members(sites or None, group))
    if plan.aggregation.sites not in (None, len(names)):
        raise ServerError(
            "aggregation.sites", plan.aggregation.sites, f"{len(names)}, the sites of this run",
            "Correct the plan, or name the sites.",
        )  # fmt: skip
    plan = plan.replace({"aggregation.sites": len(names)})
    folder = RunFolder(server.runs / f"{plan.name}-{plan.hash[:12]}")
    signature = sign_plan(plan.canonical, server.operator_private_key())
    facts = RunFacts(json.loads(plan.canonical), signature, tuple(names))
    with folder.changing():
        if folder.exists():
            raise ServerError(
                str(folder.path), "a run of this plan", "a plan that was not run here yet",
                f"Continue it with `fedgraft resume {folder.name}`, or change the plan's name.",
            )  # fmt: skip
        folder.write(facts)  # first: a run that Flower knows has a directory
        try:
            _begin(server, folder)
        except BaseException:
            folder.forget()
            raise


@resume_app.command()
def resume(name: RunName, directory: Directory = _HERE) -> None:
    """Continue a run that was stopped or that failed; finished rounds are not repeated.

    A run that was completed delivers its final adapter again, to sites that were away.
    """
    from fedgraft_server.continuation import standing
    from fedgraft_server.run_folder import RunFolder
    from fedgraft_server.settings import ServerDirectory

    server = ServerDirectory(directory.absolute())
    folder = RunFolder.find(server.runs, name)
    with folder.changing():
        with _runs(server) as link:
            newest = link.of(folder.name)[-1:]
            where = standing(folder, newest[0] if newest else None)
            if where in ("pending", "starting", "running"):
                raise ServerError(
                    f"run {folder.name}", where, "a run that has ended",
                    f"Wait, or stop it with `fedgraft stop {folder.name}`.",
                )  # fmt: skip
        folder.set_stopped(False)
        _begin(server, folder)


@runs_app.command()
def runs(
    directory: Directory = _HERE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List runs: state, rounds finished, sites; and why a run failed."""
    from fedgraft_server.continuation import standing
    from fedgraft_server.run_folder import RunFolder
    from fedgraft_server.settings import ServerDirectory

    server = ServerDirectory(directory.absolute())
    with _runs(server) as link:
        newest = {state.folder: state for state in link.all()}
    rows = []
    for folder in RunFolder.all(server.runs):
        facts = folder.facts
        outcome = folder.outcome
        rows.append(
            {
                "run": folder.name,
                "state": standing(folder, newest.get(folder.name)),
                "round": folder.round,
                "rounds": facts.plan["rounds"]["count"],
                "sites": facts.sites,
                "reason": outcome.reason if outcome else "",
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo(
            f"{row['run']}  {row['state']:11}  round {row['round']} of {row['rounds']}  "
            f"{', '.join(row['sites'])}"
        )
        if row["reason"]:
            typer.echo(f"    {row['reason']}")


@stop_app.command()
def stop(name: RunName, directory: Directory = _HERE) -> None:
    """Stop a run; `fedgraft resume` continues it."""
    from fedgraft_server.continuation import standing
    from fedgraft_server.run_folder import COMPLETED, FAILED, STOPPED, RunFolder
    from fedgraft_server.settings import ServerDirectory

    server = ServerDirectory(directory.absolute())
    folder = RunFolder.find(server.runs, name)
    with folder.changing(), _runs(server) as link:
        states = link.of(folder.name)
        where = standing(folder, states[-1] if states else None)
        if where in (COMPLETED, FAILED, STOPPED):
            raise ServerError(
                f"run {folder.name}", where, "a run that is under way", "There is nothing to stop."
            )
        folder.set_stopped(True)  # first: nobody continues it from here on
        for state in states:
            if not state.is_over:
                link.stop(state.id)
    typer.echo(f"stopped     {folder.name}")


@logs_app.command()
def logs(
    name: RunName,
    directory: Directory = _HERE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Print what a run writes, until it ends."""
    from fedgraft_common.logs import as_text, read_entry
    from fedgraft_server.continuation import standing
    from fedgraft_server.run_folder import INTERRUPTED, RunFolder
    from fedgraft_server.settings import ServerDirectory

    server = ServerDirectory(directory.absolute())
    folder = RunFolder.find(server.runs, name)
    printed: set[int] = set()
    with _runs(server) as link:
        while True:  # a run that was continued is several to Flower
            states = link.of(folder.name)
            for state in states:
                if state.id not in printed:
                    for line in _lines(link.logs(state.id)):
                        entry = None if as_json else read_entry(line)
                        typer.echo(line if entry is None else as_text(entry))
                    printed.add(state.id)
            where = standing(folder, states[-1] if states else None)
            if where != INTERRUPTED and all(state.is_over for state in states):
                return
            time.sleep(1.0)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Whole lines of what comes in pieces."""
    begun = ""
    for text in texts:
        *lines, begun = (begun + text).split("\n")
        yield from lines
    if begun:
        yield begun


def _begin(server: ServerDirectory, folder: RunFolder) -> None:
    from fedgraft_server.continuation import begin

    with _runs(server) as link:
        begin(server, folder, link)
    typer.echo(f"run         {folder.name}")
    typer.echo(f"sites       {', '.join(folder.facts.sites)}")
    typer.echo(f"directory   {folder.path}")


def _runs(server: ServerDirectory) -> Runs:
    from fedgraft_server.runs import Runs
    from fedgraft_server.superlink import SuperLink

    superlink = SuperLink(server, server.settings())
    return Runs(superlink.address, superlink.client_context())
