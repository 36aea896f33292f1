"""`fedgraft site`: what the operator of a site does."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from fedgraft_client.check_cli import check, status
from fedgraft_client.join_cli import join
from fedgraft_client.peers_cli import accept_peer, peers
from fedgraft_common.plan import load_plan

app = typer.Typer(no_args_is_help=True, help="Budget, costs, approval and head of a site.")
SiteFileOption = Annotated[
    Path, typer.Option("--site", envvar="FEDGRAFT_SITE", help="The site file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PlanFile = Annotated[Path, typer.Argument(help="A plan file (TOML), or a waiting plan (JSON).")]
DEFAULT = Path("site.toml")
app.command("join")(join)
app.command("check")(check)
app.command("status")(status)
app.command("peers")(peers)
app.command("accept-peer")(accept_peer)


@app.command()
def up(
    site: SiteFileOption = DEFAULT,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log JSON lines.", envvar="FEDGRAFT_LOG_JSON")
    ] = False,
) -> None:
    """Run the site's daemon until SIGTERM: it asks the server, trains here, sends adapters."""
    from fedgraft_client.site_file import load_site_file
    from fedgraft_client.up import run_until_stopped
    from fedgraft_common.logs import set_up_logs

    set_up_logs(log_json, facts={"site": load_site_file(site).name})
    raise typer.Exit(run_until_stopped(site))


@app.command()
def budget(site: SiteFileOption = DEFAULT, as_json: AsJson = False) -> None:
    """Show what this data set has spent, what is left, and what each run cost."""
    from fedgraft_client.account import read_ledger, runs
    from fedgraft_client.site_file import load_site_file

    file = load_site_file(site)
    limit, delta = file.policy.maximum_epsilon, file.policy.maximum_delta
    ledger = file.store_directory(site.parent) / "ledger.sqlite3"
    accounts = runs(read_ledger(ledger), delta) if ledger.exists() else []
    spent = accounts[-1].lifetime if accounts else 0.0
    if as_json:
        summary = {"data": file.data.name, "unit": file.data.unit, "delta": delta}
        left = max(0.0, limit - spent)
        summary |= {"maximum_epsilon": limit, "spent": spent, "left": left}
        typer.echo(json.dumps({**summary, "runs": [asdict(a) for a in accounts]}, indent=2))
        return
    console = Console()
    table = Table(title=f"Privacy budget of {file.data.name}, per {file.data.unit}")
    for name in ("run", "rounds", "epsilon", "lifetime"):
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    table.add_column(f"of {limit:g}", ratio=1, min_width=20)
    before = 0.0
    for account in accounts:
        bar = Bar(limit, before, min(account.lifetime, limit))
        name = account.run + (" (sealed)" if account.sealed else "")
        numbers = str(account.rounds), f"{account.epsilon:.2f}", f"{account.lifetime:.2f}"
        table.add_row(name, *numbers, bar)
        before = account.lifetime
    if accounts:
        console.print(table)
    left = max(0.0, limit - spent)
    console.print(
        f"Spent {spent:.2f} of epsilon {limit:g} at delta {delta:g}; {left:.2f} left. Runs are "
        "composed, so their epsilons do not add up to the lifetime's.",
        highlight=False,
    )


@app.command()
def cost(plan_file: PlanFile, site: SiteFileOption = DEFAULT, as_json: AsJson = False) -> None:
    """Show what joining a plan would cost, before anything is spent."""
    from fedgraft_client.account import read_ledger
    from fedgraft_client.budget import cost as cost_of
    from fedgraft_client.entry import spent
    from fedgraft_client.policy import check_plan
    from fedgraft_client.site_file import load_site_file
    from fedgraft_common.mechanism import step_noise

    file, plan = load_site_file(site), load_plan(plan_file)
    step = step_noise(plan, file.data.nominal_size, file.name)
    check_plan(file.policy, plan, file.data.unit, step)
    ledger = file.store_directory(site.parent) / "ledger.sqlite3"
    events = spent(read_ledger(ledger)) if ledger.exists() else []
    found = cost_of(file.policy, plan, step.events, events)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    limit = file.policy.maximum_epsilon
    typer.echo(f"spent so far   epsilon {found.before:.4f} at delta {file.policy.maximum_delta:g}")
    typer.echo(f"this run       epsilon {found.run:.4f} at delta {plan.privacy.delta:g}, alone")
    typer.echo(f"after it       epsilon {found.after:.4f} of {limit:g}")
    typer.echo(f"affordable     {found.rounds} of {found.asked} rounds")
    if found.rounds < found.asked and not file.policy.partial_runs:
        typer.echo("The site would refuse: the budget does not pay the whole run.")


@app.command()
def plans(site: SiteFileOption = DEFAULT) -> None:
    """List the plans that wait for approval."""
    from fedgraft_client.site_file import load_site_file

    folder = load_site_file(site).store_directory(site.parent) / "plans"
    for file in sorted(folder.glob("*.json")):
        word = "approved" if file.with_suffix(".approved").exists() else "waiting"
        typer.echo(f"{file.stem[:12]}  {word:8}  {load_plan(file).name}  {file}")


@app.command()
def approve(
    plan: Annotated[str, typer.Argument(help="Hash of a waiting plan; its beginning is enough.")],
    site: SiteFileOption = DEFAULT,
) -> None:
    """Agree to a plan that waits; the daemon writes it into the ledger at the next round."""
    from fedgraft_client.site_file import load_site_file
    from fedgraft_common.errors import PolicyError

    folder = load_site_file(site).store_directory(site.parent) / "plans"
    found = [file for file in folder.glob("*.json") if file.stem.startswith(plan)]
    if len(found) != 1:
        waiting = ", ".join(sorted(file.stem[:12] for file in folder.glob("*.json")))
        raise PolicyError(
            "plan", plan, f"the hash of one waiting plan: {waiting or 'none is waiting'}",
            "List them with `fedgraft site plans`.",
        )  # fmt: skip
    found[0].with_suffix(".approved").touch(mode=0o600)
    typer.echo(f"Approved {found[0].stem[:12]} ({load_plan(found[0]).name}).")


@app.command()
def refit(
    plan_file: PlanFile,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="The run's final adapter in PEFT's format; default: the one the server sent."
        ),
    ] = None,
    site: SiteFileOption = DEFAULT,
) -> None:
    """Fit the head at home without noise and seal it; this ends the run at this site for good."""
    from fedgraft_client.opening import open_site

    plan, opened = load_plan(plan_file), open_site(site)
    try:
        bench = opened.bench(plan)
        opened.refit(plan, bench.adapted.read(adapter) if adapter else opened.store.final(plan))
        sealed = opened.store.directory / plan.hash / "sealed.safetensors"
    finally:
        opened.store.close()
    typer.echo(f"Sealed head: {sealed}")
    typer.echo("It serves predictions here and never takes part in a round again.")
