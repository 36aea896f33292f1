"""The ledger audit: does a site's account hold, from its export alone?

Nothing of the site is needed but what `fedgraft ledger export` prints; the checks are in
`account.py`.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedgraft_client.account import export, public_key, read_ledger
from fedgraft_client.entry import Entry, parse_entry, spent
from fedgraft_common.accounting import epsilon_bound
from fedgraft_common.errors import LedgerError, PrivacyError
from fedgraft_common.plan import Plan
from fedgraft_simulations.audit.account import Account, audit_account
from fedgraft_simulations.audit.part import (
    AuditContext,
    Finding,
    PartResult,
    Report,
    Verdict,
    worst,
)
from fedgraft_simulations.table import epsilon_words


class LedgerPart:
    """See the module."""

    name = "ledger"
    title = "The account"

    def run(self, context: AuditContext, progress: Report) -> PartResult:
        """Exports, reads back and checks."""
        started = time.perf_counter()
        files = [context.ledger] if context.ledger else _export_all(context, progress)
        ledgers = [read_ledger(file) for file in files]
        plan = _as_charged(context.plan, ledgers) if context.ledger else context.rehearsal.plan
        site, rehearsed = context.site, context.ledger is None
        earlier = read_copy(context.witness) if context.witness else None
        accounts = [
            Account(
                entries, plan, site.policy if site else None, rehearsed,
                site.data if site and not rehearsed else None, earlier, context.site_key,
            )
            for entries in ledgers
        ]  # fmt: skip
        found = []
        for place, account in enumerate(accounts):
            progress(0.5 + 0.5 * place / len(accounts), f"ledger {place + 1} of {len(accounts)}")
            try:
                found.append(list(audit_account(account)))
            except (PrivacyError, KeyError, TypeError, ValueError) as error:
                raise LedgerError(
                    f"ledger {place + 1}", f"a line that says what none can: {error}",
                    "lines as a site writes them",
                    "Whoever wrote it had the key that it names: ask how it came about.",
                ) from None  # fmt: skip
        findings = tuple(_together(found))
        verdict = worst(findings)
        return PartResult(
            name=self.name,
            title=self.title,
            verdict=verdict,
            summary=_summary(findings, accounts, context),
            findings=findings,
            facts=_facts(accounts, found),
            not_covered=_not_covered(context),
            seconds=time.perf_counter() - started,
        )


def read_copy(path: Path) -> list[Entry]:
    """The lines of a ledger, of an export, or of a site's witness, which is left as it is.

    Raises:
        LedgerError: it is none of these.
    """
    try:
        return read_ledger(path)
    except LedgerError:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            return [parse_entry(json.loads(line)) for line in lines]
        except (OSError, ValueError, KeyError, TypeError):
            raise LedgerError(
                str(path), "no lines of a ledger",
                "a site's witness, or what `fedgraft ledger export` wrote before",
                "Check the path.",
            ) from None  # fmt: skip


def _as_charged(plan: Plan, ledgers: Sequence[Sequence[Entry]]) -> Plan:
    """The plan with the hash that a ledger names: a plan need not say how many sites take part."""
    open_plan = plan.replace({"aggregation.sites": None})
    known = {str(e.body.get("plan")) for entries in ledgers for e in entries}
    return open_plan if open_plan.hash in known else plan


def _together(found: list[list[Finding]]) -> Iterator[Finding]:
    """The findings of several ledgers, one for each check."""
    by_name: dict[str, list[Finding]] = defaultdict(list)
    for findings in found:
        for finding in findings:
            by_name[finding.name].append(finding)
    for same in by_name.values():
        if len(same) == 1:
            yield same[0]
            continue
        failed = [(place, f) for place, f in enumerate(same) if f.verdict == "fail"]
        if failed:
            place, first = failed[0]
            where = f"site {place}: {first.measured} (wrong at {len(failed)} of {len(same)} sites)"
            yield replace(first, measured=where)
        elif len({f.measured for f in same}) == 1:
            yield replace(same[0], measured=f"{same[0].measured}; at each of {len(same)} sites")
        else:
            yield replace(
                same[0], measured=f"{same[0].measured}; the like at all {len(same)} sites"
            )


def _summary(findings: Sequence[Finding], accounts: list[Account], context: AuditContext) -> str:
    verdict: Verdict = worst(tuple(findings))
    if context.plan.privacy.mechanism == "none" and verdict == "fail":
        return "There is no account to check: the plan runs without differential privacy."
    if verdict == "fail":
        wrong = next(finding for finding in findings if finding.verdict == "fail")
        return (
            "The account does not hold: do not rely on the epsilon that it names. "
            f"{wrong.claim}? No: {wrong.measured}."
        )
    spending = [spent(account.entries) for account in accounts]
    most = max((epsilon_bound(e, accounts[0].delta) for e in spending if e), default=0.0)
    which = "The site's account holds" if len(accounts) == 1 else (
        f"The accounts of all {len(accounts)} sites hold"
    )  # fmt: skip
    cost = f"epsilon {epsilon_words(most)} was spent at most" if most else "nothing was spent"
    unsure = any(f.name == "earlier copy" and f.verdict == "info" for f in findings)
    end = " as far as it goes; no earlier copy shows whether its end was cut off" if unsure else ""
    return f"{which}: no line was changed or removed, and {cost}{end}."


def _facts(accounts: list[Account], found: list[list[Finding]]) -> dict[str, Any]:
    ledgers = []
    for account, findings in zip(accounts, found, strict=True):
        events = spent(account.entries)
        last = account.entries[-1].time
        ledgers.append(
            {
                "lines": len(account.entries),
                "newest": datetime.fromtimestamp(last, UTC).isoformat(),
                "last_hash": account.entries[-1].hash,
                "key": public_key(account.entries).public_bytes_raw().hex(),
                "epsilon": epsilon_bound(events, account.delta) if events else 0.0,
                "delta": account.delta,
                "failed": [f.name for f in findings if f.verdict == "fail"],
            }
        )
    return {"ledgers": ledgers}


def _export_all(context: AuditContext, progress: Report) -> list[Path]:
    """The rehearsal's ledgers, as sites would export them."""
    progress(0.0, "running the plan")
    files = []
    directory = context.directory / "ledger"
    directory.mkdir(parents=True, exist_ok=True)
    for site in context.rehearsal.sites:
        file = directory / f"{site.config.name}.jsonl"
        file.write_text(export(site.store.ledger.entries()), encoding="utf-8")
        files.append(file)
    return files


def _not_covered(context: AuditContext) -> tuple[str, ...]:
    found = (
        "A ledger whose end was cut off, or that was rewritten by whoever holds the site's key, "
        "looks whole. The witness, or an earlier export, shows it: name one with --witness.",
        "A ledger says what was charged, not what was computed: the other parts measure that.",
    )
    if context.ledger is not None:
        return found
    return (*found, "These are the ledgers of a rehearsal, not of a hospital: name one with "
            "--ledger.")  # fmt: skip
