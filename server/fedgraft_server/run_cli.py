"""`fedgraft run`, `runs`, `stop`, `resume`, `logs`: what the coordinator does on the server.

A run has a directory of its own, with what it was started with:

    DIR/runs/NAME-HASH/run.json     plan, signature, sites, and Flower's numbers of the run
                       round-*      checkpoints
                       adapter/     the final adapter in PEFT's format
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgraft_common.errors import ServerError
from fedgraft_common.plan import Plan, load_plan, parse_plan

if TYPE_CHECKING:
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
    from fedgraft_server.settings import ServerDirectory

    server = ServerDirectory(directory.absolute())
    plan = load_plan(plan_file, changes or ())
    with Registry(server.registry) as registry:
        names = [member.name for member in registry.members(sites or None, group)]
        nodes = registry.node_ids(sites or None, group)
    if missing := sorted(set(names) - set(nodes)):
        raise ServerError(
            "sites", ", ".join(missing), "sites that the SuperLink knows",
            "Start `fedgraft server up` and try again in a moment.",
        )  # fmt: skip
    if len(nodes) < plan.aggregation.minimum_sites:
        raise ServerError(
            "sites", f"{len(nodes)} ({', '.join(sorted(nodes)) or 'none'})",
            f"at least {plan.aggregation.minimum_sites} (aggregation.minimum_sites)",
            "Invite more sites, or lower aggregation.minimum_sites.",
        )  # fmt: skip
    if plan.aggregation.sites not in (None, len(nodes)):
        raise ServerError(
            "aggregation.sites", plan.aggregation.sites, f"{len(nodes)}, the sites of this run",
            "Correct the plan, or name the sites.",
        )  # fmt: skip
    plan = plan.replace({"aggregation.sites": len(nodes)})
    folder = server.runs / f"{plan.name}-{plan.hash[:12]}"
    if (folder / "run.json").exists():
        raise ServerError(
            str(folder), "a run of this plan", "a plan that was not run here yet",
            f"Continue it with `fedgraft resume {folder.name}`, or change the plan's name.",
        )  # fmt: skip
    facts: dict[str, Any] = {
        "plan": json.loads(plan.canonical),
        "signature": sign_plan(plan.canonical, server.operator_private_key()),
        "sites": sorted(nodes),
        "flower": [],
    }
    _start(server, folder, plan, facts, sorted(nodes.values()))


@resume_app.command()
def resume(name: RunName, directory: Directory = _HERE) -> None:
    """Continue a run that was stopped or that failed; finished rounds are not repeated."""
    from fedgraft_server.registry import Registry
    from fedgraft_server.settings import ServerDirectory

    server = ServerDirectory(directory.absolute())
    folder, facts = _find(server, name)
    plan = parse_plan(facts["plan"], origin=str(folder / "run.json"))
    with _runs(server) as runs:
        states = {state.id: state for state in runs.all()}
    newest = states.get(facts["flower"][-1]) if facts["flower"] else None
    if newest is not None and newest.status != "finished":
        raise ServerError(
            f"run {folder.name}", newest.status, "a run that has ended",
            f"Wait, or stop it with `fedgraft stop {folder.name}`.",
        )  # fmt: skip
    with Registry(server.registry) as registry:
        nodes = registry.node_ids(facts["sites"])
    _start(server, folder, plan, facts, sorted(nodes.values()))


@runs_app.command()
def runs(
    directory: Directory = _HERE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List runs: state, rounds finished, sites."""
    from fedgraft_server.settings import ServerDirectory

    server = ServerDirectory(directory.absolute())
    with _runs(server) as link:
        states = {state.id: state for state in link.all()}
    rows = []
    for file in sorted((server.runs).glob("*/run.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        newest = states.get(facts["flower"][-1]) if facts["flower"] else None
        finished = sorted(file.parent.glob("round-*.safetensors"))
        rows.append(
            {
                "run": file.parent.name,
                "state": (newest.outcome or newest.status) if newest else "unknown",
                "round": int(finished[-1].stem.partition("-")[2]) if finished else 0,
                "rounds": facts["plan"]["rounds"]["count"],
                "sites": facts["sites"],
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo(
            f"{row['run']}  {row['state']:10}  round {row['round']} of {row['rounds']}  "
            f"{', '.join(row['sites'])}"
        )


@stop_app.command()
def stop(name: RunName, directory: Directory = _HERE) -> None:
    """Stop a run; `fedgraft resume` continues it."""
    from fedgraft_server.settings import ServerDirectory

    server = ServerDirectory(directory.absolute())
    folder, facts = _find(server, name)
    with _runs(server) as link:
        link.stop(facts["flower"][-1])
    typer.echo(f"stopped     {folder.name}")


@logs_app.command()
def logs(name: RunName, directory: Directory = _HERE) -> None:
    """Print what a run writes, until it ends."""
    from fedgraft_server.settings import ServerDirectory

    server = ServerDirectory(directory.absolute())
    _, facts = _find(server, name)
    with _runs(server) as link:
        for text in link.logs(facts["flower"][-1]):
            typer.echo(text, nl=False)


def _start(
    server: ServerDirectory, folder: Path, plan: Plan, facts: dict[str, Any], nodes: list[int]
) -> None:
    from fedgraft_common.files import write_atomically

    backbone = _assembled(server, plan)
    with _runs(server) as link:
        number = link.start(plan, folder, nodes, facts["signature"], backbone, server.ca[0])
    facts["flower"].append(number)
    write_atomically(folder / "run.json", (json.dumps(facts, indent=2) + "\n").encode())
    typer.echo(f"run         {folder.name}")
    typer.echo(f"sites       {', '.join(facts['sites'])}")
    typer.echo(f"directory   {folder}")


def _assembled(server: ServerDirectory, plan: Plan) -> Path | None:
    """Where a `server:NAME` backbone lies on the server itself."""
    if not plan.backbone.source.startswith("server:"):
        return None
    from fedgraft_common.backbone_protocol import ManifestRequest
    from fedgraft_server.backbone_library import BackboneLibrary

    config = plan.backbone
    request = ManifestRequest(sha256=config.sha256, manifest_sha256=config.manifest_sha256)
    return BackboneLibrary(server.backbones).assembled(request)


def _find(server: ServerDirectory, name: str) -> tuple[Path, dict[str, Any]]:
    found = [p for p in (server.runs).glob("*/run.json") if p.parent.name.startswith(name)]
    if len(found) != 1:
        known = ", ".join(sorted(p.parent.name for p in (server.runs).glob("*/run.json")))
        raise ServerError(
            "run",
            name,
            f"one of: {known or 'no run was started here'}",
            "List them: `fedgraft runs`.",
        )
    facts: dict[str, Any] = json.loads(found[0].read_text(encoding="utf-8"))
    return found[0].parent, facts


def _runs(server: ServerDirectory) -> Runs:
    from fedgraft_server.runs import Runs
    from fedgraft_server.superlink import HOST, SuperLink

    settings = server.settings()
    link = SuperLink(server, settings)
    return Runs(f"{HOST}:{settings.superlink.port}", link.client_context())
