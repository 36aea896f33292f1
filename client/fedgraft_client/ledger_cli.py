"""`fedgraft ledger`: what a site shows an auditor, and what the auditor does with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Verify, show or export a privacy ledger.")
LedgerFile = Annotated[Path, typer.Argument(help="A ledger.sqlite3, or an export of one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def verify(
    ledger: LedgerFile,
    delta: Annotated[float, typer.Option(help="Delta of the recomputed epsilon.")] = 1e-5,
    witness: Annotated[
        Path | None, typer.Option(help="The witness file, if it is not beside the ledger.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="The site's public key as you know it, in hexadecimal.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every line and recompute epsilon with two accountants; exit code 1 on any fault."""
    from fedgraft_client import account

    console = Console(stderr=True)
    entries = account.read_ledger(ledger)
    with console.status(f"Checking {len(entries)} entries"):
        beside = witness or ledger.with_name("ledger.witness")
        found = account.verify(entries, delta, beside, key)
    if as_json:
        typer.echo(json.dumps(account.document(found), indent=2))
    else:
        typer.echo(f"entries    {found.entries}, {'whole' if not found.faults else 'NOT whole'}")
        for fault in found.faults:
            typer.echo(f"fault      {fault}")
        typer.echo(f"key        {found.key[:16]}{'' if key else ', as the ledger itself says'}")
        typer.echo(f"witness    {'agrees' if found.witnessed else 'not at hand, not compared'}")
        typer.echo(f"pending    {found.reserved} reservations without a commit, counted as spent")
        typer.echo(f"epsilon    {found.epsilon:.4f} at delta {delta:g} (PLD, decides)")
        typer.echo(
            f"           {found.second:.4f} (PRV, independent; may differ by {found.tolerance:g})"
        )
    if found.faults:
        raise typer.Exit(1)


@app.command()
def show(
    ledger: LedgerFile,
    last: Annotated[int, typer.Option(min=1, help="How many of the newest entries.")] = 20,
) -> None:
    """Print the newest entries."""
    from fedgraft_client import account

    table = Table(box=None, pad_edge=False)
    for name in ("entry", "time (UTC)", "kind", "what"):
        table.add_column(name, no_wrap=name != "what")
    for entry in account.read_ledger(ledger)[-last:]:
        when = datetime.fromtimestamp(entry.time, UTC).strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(str(entry.seq), when, entry.kind.value, _words(entry.body))
    Console().print(table)


@app.command()
def export(ledger: LedgerFile) -> None:
    """Print the ledger for an auditor: every entry, no record, no reply."""
    from fedgraft_client import account

    typer.echo(account.export(account.read_ledger(ledger)), nl=False)


@app.command()
def transcript(
    folder: Annotated[Path, typer.Argument(help="A transcript-NNNNNN folder of the server's run.")],
    ledgers: Annotated[
        list[Path], typer.Argument(help="Ledgers of sites that took part, or exports of them.")
    ],
    ca: Annotated[Path, typer.Option("--ca", help="The federation's CA certificate, ca.pem.")],
    as_json: AsJson = False,
) -> None:
    """Check from both sides that a server could open sums only; exit code 1 on any fault."""
    from fedgraft_client.account import read_ledger
    from fedgraft_client.transcript_check import compare
    from fedgraft_common.secure_transcript import Transcript

    read = Transcript.read(folder)
    found = compare(read, {str(path): read_ledger(path) for path in ledgers}, ca)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        terms = read.terms
        typer.echo(f"set-up     rounds {terms.first_round} to {terms.last_round}")
        typer.echo(f"roster     {read.roster.digest.hex()[:16]}, {len(read.roster)} sites")
        typer.echo(f"answers    {found.answers}, {found.left_out} of them from ledgers alone")
        enough = "enough" if len(found.sites) >= terms.needed else "too few: ask more sites"
        typer.echo(f"ledgers    of {len(found.sites)} sites, {enough} (at least {terms.needed})")
        for finding in found.findings:
            typer.echo(f"fault      {finding.fault}: {finding.text}")
        if not found.findings:
            typer.echo("faults     none: one sum a round could be opened, and nothing else")
    if found.findings:
        raise typer.Exit(1)


@app.command()
def recover(
    site: Annotated[
        Path, typer.Option("--site", envvar="FEDGRAFT_SITE", help="The site file.")
    ] = Path("site.toml"),
) -> None:
    """Go on with an old copy of a ledger: charge what the witness knows and the copy does not."""
    from fedgraft_client.account import read_ledger
    from fedgraft_client.entry import Kind
    from fedgraft_client.opening import recover_ledger
    from fedgraft_client.site_file import load_site_file

    file = load_site_file(site)
    path = file.store_directory(site.parent) / "ledger.sqlite3"
    before = len(read_ledger(path)) if path.exists() else 0
    with recover_ledger(file, site.parent) as ledger:
        newest = ledger.entries()[-1]
    if newest.kind is not Kind.RECOVER or newest.seq == before:
        typer.echo("Nothing was missing.")
    elif "restored" in newest.body:
        typer.echo(f"Put back {newest.body['restored']} entries that this copy did not have.")
    elif newest.body["witness"] is None:
        typer.echo("The witness was lost: a new one was started, and the ledger says so.")
    else:
        steps = sum(item["steps"] for item in newest.body["lost"])
        typer.echo(f"Charged {steps} steps that this copy did not know of.")


def _words(body: object) -> str:
    assert isinstance(body, dict)  # noqa: S101 - JSON objects
    if "sample_rate" in body:
        return (
            f"{body['run']} {body['plan'][:12]} round {body['round']}, {body['purpose']}, "
            f"{body['mechanism']}: q {body['sample_rate']:.4g}, "
            f"sigma {body['noise_multiplier']:.4g}, {body['steps']} steps, per {body['unit']}"
        )
    return ", ".join(f"{key} {_word(value)}" for key, value in body.items())


def _word(value: object) -> str:
    """Hashes and fingerprints are cut short; `export` has all of them."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_word(part)}" for key, part in value.items()) + ")"
    return value[:12] if isinstance(value, str) else str(value)
