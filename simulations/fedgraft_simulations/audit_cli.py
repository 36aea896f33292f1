"""`fedgraft audit`: check a plan's promise, attack it, and sign what was found."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from fedgraft_simulations.audit.part import AuditContext
    from fedgraft_simulations.audit.report import Audit

app = typer.Typer(help="Check and attack a plan; a signed report says what holds.")
PLANS = Path(__file__).parent / "plans"


@app.command()
def audit(
    plan_file: Annotated[
        Path | None,
        typer.Argument(metavar="[PLAN]", help="A plan file (TOML); default: the digits plan."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. privacy.epsilon=2."),
    ] = None,
    parts: Annotated[
        list[str] | None,
        typer.Option(
            "--part", help="Run this part only; may be repeated. Default: all. Parts: ledger, "
            "egress, mechanism, membership, inversion, robustness.",
        ),
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(help="A site's ledger as `fedgraft ledger export` printed it; without PLAN "
                     "and --part, only the ledger is audited."),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(help="That site's site.toml: its policy, and what it says about its data, "
                     "are held against the ledger."),
    ] = None,
    witness: Annotated[
        Path | None,
        typer.Option(help="That ledger's witness, or an earlier export: shows a cut end."),
    ] = None,
    site_key: Annotated[
        str | None, typer.Option(help="That site's public key as you know it, in hexadecimal.")
    ] = None,
    self_test: Annotated[
        bool,
        typer.Option("--self-test", help="Plant bugs that the audit must catch; without PLAN and "
                     "--part, nothing else is run."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the report; default runs/NAME/audit.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the auditor's own randomness.")] = 0,
    effort: Annotated[
        str, typer.Option(help="full, or quick for a first look.", envvar="FEDGRAFT_EFFORT")
    ] = "full",
    key: Annotated[
        Path | None,
        typer.Option(
            help="The auditor's Ed25519 key (PEM); made at the first use. Default: in the user's "
            "configuration directory.", envvar="FEDGRAFT_AUDITOR_KEY",
        ),
    ] = None,
    evidence: Annotated[
        Path | None,
        typer.Option(help="Keep runs, ledgers and replies in this new directory."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda:N.", envvar="FEDGRAFT_DEVICE")
    ] = "cpu",
    verify: Annotated[
        Path | None,
        typer.Option(metavar="DIRECTORY", help="Check the signature on a report instead."),
    ] = None,
    auditor: Annotated[
        str | None, typer.Option(help="With --verify: the auditor's public key, in hexadecimal.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:  # fmt: skip
    """Check what a plan promises, attack it, and sign a report; exit code 1 if anything failed."""
    if verify is not None:
        _verify(verify, auditor)
        return
    from fedgraft_client.account import read_ledger
    from fedgraft_client.ledger_key import signing_key
    from fedgraft_client.site_file import load_site_file
    from fedgraft_common.errors import PlanError
    from fedgraft_common.plan import load_plan
    from fedgraft_simulations.audit.ledger import read_copy
    from fedgraft_simulations.audit.part import AuditContext
    from fedgraft_simulations.audit.parts import PARTS
    from fedgraft_simulations.audit.report import write_audit

    if effort not in ("quick", "full"):
        raise PlanError("--effort", effort, "quick, full", "Choose one of these.")
    chosen = _chosen(plan_file, changes, parts, ledger, self_test)
    for name in chosen:
        if name not in PARTS:
            raise PlanError("--part", name, ", ".join(PARTS), "Name parts of the audit.")
    if evidence is not None and evidence.exists() and any(evidence.iterdir()):
        raise PlanError(
            "--evidence", str(evidence), "a directory that is new or empty",
            "An audit never mixes its files with those of another one; name another directory.",
        )  # fmt: skip
    plan = load_plan(plan_file or PLANS / "digits.toml", changes or ())
    if plan.aggregation.sites is None:
        plan = plan.replace({"aggregation.sites": plan.sites.count})
    else:  # the federation says how many sites it has; the rehearsal has as many
        plan = plan.replace({"sites.count": plan.aggregation.sites})
    for option, value in (("--witness", witness), ("--site-key", site_key)):
        if value is not None and ledger is None:
            raise PlanError(
                option, str(value), "an option of --ledger",
                "It is held against a site's ledger; name the export with --ledger.",
            )  # fmt: skip
    if ledger is not None:
        read_ledger(ledger)  # what is none is refused before anything runs
    if witness is not None:
        read_copy(witness)
    about_plan = plan_file is not None or bool(changes) or chosen not in (("ledger",), ())
    about_plan = about_plan or (chosen == ("ledger",) and ledger is None)
    directory = (
        out
        or Path("runs") / (plan.name if about_plan else "-".join(chosen) or "self-test") / "audit"
    )
    signer = signing_key(key or Path(typer.get_app_dir("fedgraft")) / "auditor.key", True, False)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="fedgraft-audit-") as scratch:
        context = AuditContext(
            plan, evidence or Path(scratch), seed, effort, ledger,  # type: ignore[arg-type]
            load_site_file(site) if site else None, witness, site_key, device,
        )  # fmt: skip
        found = _run(context, chosen, self_test, console)
    if not about_plan:
        found = replace(found, plan=None, claim=None)
    write_audit(found, directory, signer)
    if as_json:
        typer.echo(json.dumps(found.document(), indent=2, allow_nan=False))
    else:
        _print(found)
    console.print(
        f"{found.seconds:.0f} s. Report: {directory / 'audit.html'}, signed by "
        f"{signer.public_key().public_bytes_raw().hex()[:16]}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if found.verdict == "fail":
        raise typer.Exit(1)


def _chosen(
    plan_file: Path | None,
    changes: list[str] | None,
    parts: list[str] | None,
    ledger: Path | None,
    self_test: bool,
) -> tuple[str, ...]:
    """Which parts to run."""
    from fedgraft_simulations.audit.parts import PARTS

    if parts:
        return tuple(dict.fromkeys(name.strip() for part in parts for name in part.split(",")))
    if plan_file is None and not changes:
        if ledger is not None:
            return ("ledger",)
        if self_test:
            return ()
    return tuple(PARTS)


def _run(
    context: AuditContext, chosen: tuple[str, ...], with_self_test: bool, console: Console
) -> Audit:
    """Runs parts and self-test, with a bar for each."""
    from fedgraft_simulations.audit.parts import load_part, run_part
    from fedgraft_simulations.audit.report import Audit
    from fedgraft_simulations.audit.selftest import self_test

    started = time.perf_counter()
    every = [load_part(name) for name in chosen]
    results, tested = [], None
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        for part in every:
            task = progress.add_task(part.name, total=1.0, what="")

            def told(done: float, what: str, task: Any = task) -> None:
                progress.update(task, completed=done, what=what[:36])

            results.append(run_part(part, context, told))
            progress.update(task, completed=1.0, what=results[-1].verdict)
            if not console.is_terminal:  # a log has no bar
                found = results[-1]
                console.print(f"{found.name}: {found.verdict}, {found.seconds:.0f} s")
        if with_self_test:
            task = progress.add_task("self-test", total=1.0, what="")

            def tell(done: float, what: str) -> None:
                progress.update(task, completed=done, what=what[:36])
                if not console.is_terminal:
                    console.print(f"self-test, {done:.0%} done, next {what}", highlight=False)

            tested = self_test(context.directory / "self-test", context.seed, progress=tell)
    return Audit(
        plan=context.plan if every else None,
        claim=context.claim if every else None,
        parts=tuple(results),
        self_test=tested,
        seed=context.seed,
        effort=context.effort,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - started,
    )


def _print(found: Audit) -> None:
    """The report's first screen, for a terminal."""
    from rich.table import Table

    from fedgraft_simulations.audit.report import headline, measured_words, promise_words

    console = Console()
    mark = "[bold green]PASS[/]" if found.verdict == "pass" else "[bold red]FAIL[/]"
    console.print(f"{mark}  {headline(found)}", highlight=False)
    if found.parts:
        if found.plan is not None:
            console.print(f"promised   {promise_words(found)[1]}", highlight=False)
            console.print(f"measured   {measured_words(found)}", highlight=False)
        table = Table(box=None, pad_edge=False, show_header=False)
        for part in found.parts:
            table.add_row(part.verdict, part.name, part.summary)
            for finding in part.findings:
                if finding.verdict == "fail":
                    table.add_row("", "", f"fail: {finding.claim}: {finding.measured}")
        console.print(table, highlight=False, markup=False)
    if found.self_test is not None:
        table = Table(box=None, pad_edge=False)
        for column in ("planted bug", "ledger", "egress", "mechanism"):
            table.add_column(column)
        for case in found.self_test.bugs:
            cells = ("; ".join(case.caught.get(part, ())) or "–" for part in
                     ("ledger", "egress", "mechanism"))  # fmt: skip
            table.add_row(case.name if case.alarm else f"{case.name} (MISSED)", *cells)
        console.print(table, highlight=False)
        console.print(found.self_test.words, highlight=False)


def _verify(directory: Path, auditor: str | None) -> None:
    from fedgraft_simulations.audit.report import verify_audit

    report = verify_audit(directory, auditor)
    name = report["plan"]["name"] if report["plan"] else (
        "a ledger" if report["parts"] else "the audit itself"
    )  # fmt: skip
    typer.echo(f"signature  valid{'' if auditor else ', by the key that the report itself names'}")
    typer.echo(f"audit      {name}, {report['finished']}")
    typer.echo(f"verdict    {report['verdict']}")
