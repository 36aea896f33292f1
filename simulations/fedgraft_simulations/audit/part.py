"""A part of a privacy audit: one question about a plan, asked of a run of it, and its answer.

    AuditContext -> Part.run -> PartResult{Finding..., Figure...} -> signed audit.html, audit.json

A part is a class with a name, a title and a method `run`, and one line in `parts.PARTS`; it can run
alone. Equal contexts give equal results: all randomness of an auditor comes from `context.random`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from fedgraft_client.site_file import SiteFile
from fedgraft_common.plan import Plan
from fedgraft_simulations.audit.rehearsal import Claim, Rehearsal, claim_of

Verdict = Literal["pass", "fail", "info"]
Effort = Literal["quick", "full"]
Report = Callable[[float, str], None]
"""Told how much of a part is done, in [0, 1], and what it does now."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked.

    Attributes:
        claim: what should hold, in words.
        measured: what was found, with its confidence if it is an estimate.
        verdict: whether it held; `info` decides nothing.
        detail: how it was measured, for a specialist.
        cases: what it was measured on, one by one; the page folds them away.
        name: of the check, the same in every audit; a self-test counts by it.
    """

    claim: str
    measured: str
    verdict: Verdict
    detail: str = ""
    name: str = ""
    cases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture.

    Attributes:
        title: what it shows, in a few words.
        caption: how to read it.
        png: drawn with matplotlib, at about twice the size at which it is shown.
    """

    title: str
    caption: str
    png: bytes


@dataclass(frozen=True, slots=True)
class PartResult:
    """What a part found.

    Attributes:
        name: as in `parts.PARTS`.
        title: a few words.
        verdict: `fail` if any finding failed.
        summary: one plain sentence for someone who is not a specialist.
        findings: what was checked.
        figures: pictures.
        facts: numbers for `audit.json`; JSON values without NaN or infinity.
        not_covered: what this part cannot see, one sentence each.
        seconds: how long it took.
    """

    name: str
    title: str
    verdict: Verdict
    summary: str
    findings: tuple[Finding, ...] = ()
    figures: tuple[Figure, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    not_covered: tuple[str, ...] = ()
    seconds: float = 0.0


class Part(Protocol):
    """One part of an audit."""

    name: str
    title: str

    def run(self, context: AuditContext, progress: Report) -> PartResult:
        """Checks, measures or attacks, and says what it found."""


@dataclass(frozen=True)
class AuditContext:
    """What the parts of one audit share.

    Attributes:
        plan: the plan under audit; `aggregation.sites` is filled in.
        directory: private to the audit, empty at its start; a part writes below
            `directory / its name`.
        seed: of the auditor's own randomness: canaries, coins, shadow models.
        effort: `quick` for tests and a first look, `full` for a verdict.
        ledger: an exported ledger to audit instead of the rehearsal's; None for the rehearsal's.
        site: the file of the site that the ledger belongs to: its rules, what it says about its
            data; None if the auditor does not have it.
        witness: an earlier copy of that ledger, or its witness; None if the auditor has none.
        site_key: that site's public key as the auditor knows it, in hexadecimal.
        device: where simulated sites train.
    """

    plan: Plan
    directory: Path
    seed: int = 0
    effort: Effort = "full"
    ledger: Path | None = None
    site: SiteFile | None = None
    witness: Path | None = None
    site_key: str | None = None
    device: str = "cpu"

    @cached_property
    def rehearsal(self) -> Rehearsal:
        """The plan, run once on this machine by the production code: see `Rehearsal`.

        Run at the first use and shared by all parts; a part only reads it. A part that changes the
        data, the code or the plan makes its own with `Rehearsal.run(plan, directory)`.
        """
        return Rehearsal.run(self.plan, self.directory / "rehearsal", device=self.device)

    @cached_property
    def claim(self) -> Claim:
        """What the plan promises a site of this simulation; the largest epsilon of any site."""
        return claim_of(self.plan)

    def random(self, *purpose: int | str) -> np.random.Generator:
        """The auditor's randomness for one purpose: equal seeds and purposes give equal draws."""
        key = hashlib.sha256(json.dumps([self.seed, *purpose]).encode()).digest()
        return np.random.default_rng(int.from_bytes(key, "little"))


def worst(findings: tuple[Finding, ...]) -> Verdict:
    """`fail` if any failed, `info` if none decides anything, else `pass`."""
    verdicts = {finding.verdict for finding in findings}
    if "fail" in verdicts:
        return "fail"
    return "pass" if "pass" in verdicts else "info"


def listed(faults: Sequence[str]) -> str:
    """The first three faults in words, and how many more there are; empty if there is none."""
    rest = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
    return "; ".join(faults[:3]) + rest
