"""The `fedgraft` command. Each package owns its sub-commands; they are loaded when they are called.

Loading by name keeps `common` free of imports of the other packages, and keeps start-up fast:
`fedgraft --help` imports neither torch nor Flower.

Exit codes: 0 done; 1 the input is wrong or a run failed (one line on standard error says what,
what is allowed and what to do); 2 the command line itself is wrong; 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass

import click
import typer

from fedgraft_common.errors import FedgraftError


@dataclass(frozen=True, slots=True)
class Command:
    """Where a sub-command lives and what the help says about it."""

    module: str
    help: str
    app: str = "app"


COMMANDS = {
    "simulate": Command(
        "fedgraft_simulations.cli", "Run a plan on this machine, beside the alternatives."
    ),
    "audit": Command(
        "fedgraft_simulations.audit_cli",
        "Check and attack a plan; a signed report says what holds.",
    ),
    "plan": Command("fedgraft_common.plan_cli", "Check a plan, or print its schema."),
    "run": Command("fedgraft_server.run_cli", "Start a run on this server.", "run_app"),
    "runs": Command("fedgraft_server.run_cli", "List the runs of this server.", "runs_app"),
    "stop": Command("fedgraft_server.run_cli", "Stop a run; it can be resumed.", "stop_app"),
    "resume": Command("fedgraft_server.run_cli", "Continue a run.", "resume_app"),
    "logs": Command("fedgraft_server.run_cli", "Print what a run writes.", "logs_app"),
    "site": Command("fedgraft_client.site_cli", "Join, run the daemon, budget, costs, approval."),
    "data": Command("fedgraft_client.data_cli", "Check a site's data, and extract features."),
    "ledger": Command("fedgraft_client.ledger_cli", "Verify, show or export a privacy ledger."),
    "server": Command("fedgraft_server.cli", "Set up and run a federation server."),
    "predict": Command("fedgraft_client.cli", "Predict new records with an adapter and a head."),
    "evaluate": Command(
        "fedgraft_client.cli", "Score an adapter and a head on labelled records.", "evaluate_app"
    ),
    "export": Command("fedgraft_client.export_cli", "Write merged weights, ONNX, a model card."),
}


class LazyGroup(click.Group):
    """Shows every sub-command's help line, but imports only the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A stand-in for the help page."""
        command = COMMANDS.get(cmd_name)
        return click.Command(cmd_name, help=command.help) if command else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The real command, now that it is called."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            module = importlib.import_module(COMMANDS[name].module)
            command = typer.main.get_command(getattr(module, COMMANDS[name].app))
        return name, command, rest


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fedgraft", prog_name="fedgraft")
def group() -> None:
    """Adapt one frozen backbone together, under differential privacy.

    Only adapters leave a site.
    """


def main() -> None:
    """Entry point: turns a FedgraftError into one line and exit code 1."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    # Threads that spin while they wait stall a small model tenfold as soon as anything else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = group(prog_name="fedgraft", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except FedgraftError as error:
        click.echo(f"fedgraft: {error}", err=True)
        sys.exit(1)
