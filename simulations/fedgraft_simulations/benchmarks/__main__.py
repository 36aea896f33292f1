"""`python -m fedgraft_simulations.benchmarks [NAME ...]`: measurements that print ratios.

No names run them all, which takes about ten minutes on two processors and, the first time, about
as long again to pre-train the ViT.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedgraft_simulations.benchmarks.measure import Report, machine


class Name(StrEnum):
    """The benchmarks, in the order in which they run."""

    ROUND_OVERHEAD = "round_overhead"
    GATEWAY_LATENCY = "gateway_latency"
    FEDERATION_OVERHEAD = "federation_overhead"
    PRODUCTION_ROUNDS = "production_rounds"
    PREFIX_CACHE = "prefix_cache"
    SECURE_NOISE = "secure_noise"
    SECURE_AGGREGATION = "secure_aggregation"
    THOUSAND_SITES = "thousand_sites"
    LONG_LEDGER = "long_ledger"
    DIGITS_VIT = "digits_vit"
    BACKBONE_TRANSFER = "backbone_transfer"
    SOAK = "soak"


def main(
    names: Annotated[list[Name] | None, typer.Argument(help="Which; all if none is named.")] = None,
    repetitions: Annotated[
        int | None, typer.Option(min=1, help="Runs of each way; every benchmark has a default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Where the pre-trained ViT is kept; ~/.cache/fedgraft.")
    ] = None,
) -> None:
    """Measure Fedgraft side by side with the alternatives."""
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT's
    console = Console(file=sys.stderr if as_json else sys.stdout)
    console.print(machine())
    reports = []
    for name in names or list(Name):
        with console.status(f"{name} ..."):
            report = _measure(name, repetitions, cache)
        report.show(console)
        reports.append(report.document())
    if as_json:
        print(json.dumps({"machine": machine(), "benchmarks": reports}, indent=2))


def _measure(name: Name, repetitions: int | None, cache: Path | None) -> Report:
    measure: Callable[..., Report] = import_module(f"{__package__}.{name}").measure
    logging.getLogger("flwr").setLevel(logging.ERROR)  # after the import, which sets it too
    options: dict[str, object] = {}
    if repetitions is not None and name is not Name.THOUSAND_SITES:
        options["repetitions"] = repetitions
    if cache is not None and name in (Name.PREFIX_CACHE, Name.SECURE_NOISE, Name.DIGITS_VIT):
        options["cache"] = cache
    return measure(**options)


if __name__ == "__main__":
    typer.run(main)
