"""`fedgraft simulate`: a whole federation on this machine."""

from __future__ import annotations

import json
import math
import time
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

app = typer.Typer(help="Run a plan on this machine, beside the alternatives.")
PLANS = Path(str(resources.files("fedgraft_simulations"))) / "plans"


class Bar:
    """A progress bar per row of the table: rounds, epsilon so far, accuracy, time left."""

    def __init__(self, progress: Progress, prefix: str) -> None:
        self._progress = progress
        self._prefix = prefix
        self._task: TaskID | None = None
        self._facts = ""

    def start(self, title: str, rounds: int) -> None:
        """A row begins."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._facts = ""
        short = title.removeprefix("federated, ").removesuffix(" mechanism")  # fits 80 columns
        self._task = self._progress.add_task(self._prefix + short, total=rounds, facts="")

    def round(self, number: int, epsilon: float, accuracy: float | None) -> None:
        """A round (or, staying alone, a site) is finished."""
        if accuracy is not None:
            spent = "no DP" if math.isinf(epsilon) else f"epsilon {epsilon:.2f}"
            self._facts = f"{spent}, score {accuracy:.3f}" if epsilon else f"{accuracy:.3f}"
        assert self._task is not None  # noqa: S101 - start comes first
        self._progress.update(self._task, completed=number, facts=self._facts)


@app.command()
def simulate(
    plan_file: Annotated[
        Path | None,
        typer.Argument(metavar="[PLAN]", help="A plan file (TOML); default: the digits plan."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. privacy.epsilon=2."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory of results; default runs/NAME, with --set runs/NAME-HASH. What is "
            "unfinished there is resumed.",
            envvar="FEDGRAFT_OUT",
        ),
    ] = None,
    after: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Start from the adapter of this earlier run, e.g. runs/digits, and "
            "say what its sites' tasks have lost.",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Repeat with this many seeds, from the plan's on.")
    ] = 1,
    rows: Annotated[
        str,
        typer.Option(
            help="Rows to run: alone-head, alone-adapter, local, distributed, none; with all "
            "records in one place: central, central-none."
        ),
    ] = "alone-head,alone-adapter,local,distributed,none",
    engine: Annotated[
        str, typer.Option(help="local (in-process) or flower (Ray).", envvar="FEDGRAFT_ENGINE")
    ] = "local",
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda:N.", envvar="FEDGRAFT_DEVICE")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Run a plan on this machine and compare it with staying alone and with no DP."""
    started = time.perf_counter()
    from fedgraft_common.errors import PlanError
    from fedgraft_common.plan import load_plan
    from fedgraft_simulations.comparison import Study
    from fedgraft_simulations.continual import Kept, earlier_run, forgetting, on_top_of
    from fedgraft_simulations.report import write_report
    from fedgraft_simulations.simulate import TITLES, simulate
    from fedgraft_simulations.table import forgetting_table, site_table, summary_table

    plan = load_plan(plan_file or PLANS / "digits.toml", changes or ())
    earlier = None
    if after is not None:
        earlier = earlier_run(after)
        plan = on_top_of(plan, earlier)
    chosen = tuple(row.strip() for row in rows.split(","))
    for row in chosen:
        if row not in TITLES:
            raise PlanError("--rows", row, ", ".join(TITLES), "Name rows of the table.")
    if engine not in ("local", "flower"):
        raise PlanError("--engine", engine, "local, flower", "Choose one of these.")
    variant = f"{plan.name}-{plan.hash[:8]}" if changes or after else plan.name
    directory = out or Path("runs") / variant
    quiet = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
        console=quiet,
        transient=True,
        disable=not quiet.is_terminal,
    ) as progress:
        comparisons = []
        for number in range(seeds):
            prefix = f"seed {plan.seed + number}: " if seeds > 1 else ""
            comparisons.append(
                simulate(
                    plan.replace({"seed": plan.seed + number}),
                    directory / f"seed-{plan.seed + number}",
                    rows=chosen,
                    engine="flower" if engine == "flower" else "local",
                    device=device,
                    progress=Bar(progress, prefix),
                )
            )
    study = Study(tuple(comparisons))
    directory.mkdir(parents=True, exist_ok=True)
    facts = study.document()
    kept: tuple[Kept, ...] = ()
    if earlier is not None and plan.privacy.mechanism in chosen:
        adapter = directory / f"seed-{plan.seed}" / plan.privacy.mechanism / "adapter"
        kept = forgetting(earlier, adapter, device)
        facts["earlier"] = {"plan": earlier.plan.name, "sites": [one.document() for one in kept]}
    document = json.dumps(facts, indent=2, allow_nan=False)
    (directory / "result.json").write_text(document + "\n", encoding="utf-8")
    write_report(study, directory / "report.html")
    if as_json:
        typer.echo(document)
        return
    console = Console()
    console.print(site_table(study))
    console.print(summary_table(study))
    console.print(study.verdict, highlight=False)
    if earlier is not None and kept:
        console.print(forgetting_table(earlier.plan, kept))
    quiet.print(
        f"{time.perf_counter() - started:.0f} s. Report: {directory / 'report.html'}; "
        f"adapter: {directory / f'seed-{plan.seed}' / plan.privacy.mechanism / 'adapter'}",
        highlight=False,
        soft_wrap=True,
    )
