"""`make federation`: a server and three sites as real processes, beside the simulation.

Everything is real: certificates from invites, the gateway with mutual TLS, Flower's SuperLink,
signed plans, ledgers, daemons. Only noise and sampling come from the plan's seed, so that the
adapters must equal the simulation's; then the simulation's table holds for both.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from safetensors.torch import load_file

from fedgraft_common.errors import FedgraftError, ServerError
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan, load_plan
from fedgraft_simulations.cli import PLANS
from fedgraft_simulations.comparison import Study
from fedgraft_simulations.federation.processes import Federation
from fedgraft_simulations.partition import partition
from fedgraft_simulations.simulate import simulate
from fedgraft_simulations.table import summary_table

TOLERANCE = 1e-6


def main(
    plan_file: Annotated[Path | None, typer.Argument(help="Default: the demo's plan.")] = None,
    sites: Annotated[int, typer.Option(min=2, help="Site processes.")] = 3,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key.")
    ] = None,
) -> None:
    """Run a plan on real processes and compare with the simulation."""
    console = Console(stderr=True)
    plan = load_plan(plan_file or PLANS / "digits.toml", changes or ())
    plan = plan.replace({"sites.count": sites, "aggregation.sites": sites})
    with tempfile.TemporaryDirectory(prefix="fedgraft-") as name:
        directory = Path(name)
        started = time.monotonic()
        adapter = run(directory / "federation", plan, console)
        real = time.monotonic() - started
        with console.status("The same plan in a simulation ..."):
            rows = ("alone-head", "alone-adapter", plan.privacy.mechanism)
            comparison = simulate(plan, directory / "simulation", rows)
        simulated = load_file(
            directory / "simulation" / plan.privacy.mechanism / "adapter"
            / "adapter_model.safetensors"
        )  # fmt: skip
    worst = max(float((adapter[n] - simulated[n]).abs().max()) for n in simulated)
    study = Study((comparison,))
    Console().print(summary_table(study))
    typer.echo(
        f"{plan.rounds.count} rounds over {sites} site processes with mutual TLS in {real:.0f} s; "
        f"largest difference to the simulation's adapter {worst:.1e}."
    )
    if not worst <= TOLERANCE:
        typer.echo(f"That is more than {TOLERANCE:g}.", err=True)
        raise typer.Exit(1)


def run(directory: Path, plan: Plan, console: Console) -> Tensors:
    """Runs the plan on real processes.

    Returns:
        The final adapter, by PEFT's names.

    Raises:
        ServerError: the run failed.
    """
    shares = partition(plan)
    with Federation(directory, plan) as federation:
        with console.status("Server and sites start ..."):
            federation.start_server()
            for share in shares:
                federation.join(share, plan)
                federation.start_site(share.name)
        folder = begin(federation)
        with console.status("") as status:
            follow(federation, folder, lambda n: status.update(f"round {n} of {plan.rounds.count}"))
        return load_file(folder / "adapter" / "adapter_model.safetensors")


def begin(federation: Federation) -> Path:
    """Starts the run as soon as the SuperLink knows the sites; returns its directory."""
    end = time.monotonic() + 60
    while True:
        try:
            printed = federation.fedgraft("run", str(federation.plan_file))
            return federation.server / "runs" / printed.split()[1]
        except ServerError:
            if time.monotonic() > end:
                raise
            time.sleep(1)


def follow(federation: Federation, folder: Path, tell: Callable[[int], None]) -> None:
    """Waits for the end, by the checkpoints; asks Flower now and then whether the run still is.

    Args:
        federation: which was started.
        folder: of the run.
        tell: called twice a second with the number of finished rounds.

    Raises:
        ServerError: the run failed or was stopped.
    """
    asked = time.monotonic()
    while True:
        rounds = sorted(folder.glob("round-*.safetensors"))
        tell(int(rounds[-1].stem[6:]) if rounds else 0)
        finished = (folder / "adapter" / "adapter_model.safetensors").exists()
        if finished or time.monotonic() - asked > 15:
            asked = time.monotonic()
            (state,) = json.loads(federation.fedgraft("runs", "--json"))
            if state["state"] == "completed":
                return
            if state["state"] in ("failed", "stopped"):
                raise ServerError(
                    f"run {state['run']}", state["state"], "completed",
                    federation.fedgraft("logs", state["run"])[-2000:],
                )  # fmt: skip
        time.sleep(0.5)


if __name__ == "__main__":
    try:
        typer.run(main)
    except FedgraftError as error:
        sys.exit(f"fedgraft: {error}")
