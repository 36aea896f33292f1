"""What an account of a site must show, from its entries alone: one function for each check.

Every check can be asked of any ledger; `ledger.LedgerPart` asks them of one export, or of the
exports of every site of the rehearsal. Which plan and whose rules a ledger is held against is in
`Account`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from fedgraft_client.account import MANY, public_key
from fedgraft_client.entry import Entry, Kind, charges, find_faults, output_of, spent
from fedgraft_client.policy import Policy
from fedgraft_client.site_file import Data
from fedgraft_common.accounting import SamplingEvent, epsilon, epsilon_bound, second_opinion
from fedgraft_common.errors import PrivacyError
from fedgraft_common.mechanism import StepNoise, step_noise
from fedgraft_common.plan import Plan
from fedgraft_simulations.audit.part import Finding, listed

PRECISION, SURPLUS = 1e-9, 1e-6
"""Relative difference by which a charged noise multiplier may fall short of the plan's, by
rounding, and by which it may exceed it: more noise on paper than in the sum lowers epsilon."""


@dataclass(frozen=True, slots=True)
class Account:
    """A ledger and what it is held against.

    Attributes:
        entries: oldest first.
        plan: the plan under audit.
        policy: the site's rules, if the auditor has them.
        rehearsed: the plan is known to have run, so the ledger must know of it.
        data: what the site says in public about its data set, if the auditor has the site file.
        earlier: the lines of a witness or of an earlier export, if the auditor has one.
        key: the site's public key as the auditor knows it, in hexadecimal.
    """

    entries: Sequence[Entry]
    plan: Plan
    policy: Policy | None = None
    rehearsed: bool = False
    data: Data | None = None
    earlier: Sequence[Entry] | None = None
    key: str | None = None

    @property
    def reservations(self) -> list[Entry]:
        """Every charge for a round, void ones included."""
        return [e for e in self.entries if e.kind is Kind.RESERVE]

    @property
    def delta(self) -> float:
        """What lifetime epsilons are for: the policy's, else the plan's."""
        return self.policy.maximum_delta if self.policy else self.plan.privacy.delta


def audit_account(account: Account) -> Iterator[Finding]:
    """Everything that one export can show.

    Raises:
        LedgerError: it does not begin with the site's key.
    """
    yield _chain(account)
    yield from _earlier(account)
    yield _key(account)
    yield _dataset(account)
    yield _replays(account)
    yield _sealed(account)
    yield from _plan(account)
    yield from _spending(account)
    yield _policy(account)


def _chain(account: Account) -> Finding:
    faults = find_faults(account.entries, public_key(account.entries))
    return Finding(
        "No line was changed, removed, inserted or re-dated",
        f"{_counted(len(account.entries), 'line')}, {_or_whole(faults)}",
        "fail" if faults else "pass",
        "Numbers without gaps, SHA-256 chain, Ed25519 signatures, times that never go back, each "
        "commit and each void of one open reservation.",
        "chain",
    )


def _earlier(account: Account) -> Iterator[Finding]:
    """A chain is whole up to wherever it was cut off; a copy of its own past shows that it was."""
    if account.rehearsed:
        return
    claim = "Nothing was cut off at the end, and nothing was written anew"
    if account.earlier is None:
        yield Finding(
            claim, "not checked: no witness and no earlier export was given", "info",
            "Name one with --witness: an export that the site gave you before will do.",
            "earlier copy",
        )  # fmt: skip
        return
    seen, now = account.earlier, account.entries
    fault = ""
    if len(seen) > len(now):
        fault = f"the earlier copy goes on to line {len(seen)}; this one ends at {len(now)}"
    else:
        pairs = enumerate(zip(seen, now, strict=False), start=1)
        first = next((n for n, (a, b) in pairs if a.hash != b.hash), None)
        fault = f"line {first} is another one than in the earlier copy" if first else ""
    yield Finding(
        claim, fault or f"all {len(seen)} lines of the earlier copy are the first ones here",
        "fail" if fault else "pass", name="earlier copy",
    )  # fmt: skip


def _dataset(account: Account) -> Finding:
    """All charges are to the one data set and unit that the first line names."""
    opened = account.entries[0].body
    unit, name = str(opened.get("unit")), str(opened.get("dataset"))
    faults = [
        f"entry {e.seq}: charged per {e.body['unit']}, not per {unit}"
        for e in account.reservations
        if e.body["unit"] != unit
    ]
    if account.data is not None:
        mine = {"data.name": (name, account.data.name), "data.unit": (unit, account.data.unit)}
        faults += [f"{k}: {a} here, {b} in the site file" for k, (a, b) in mine.items() if a != b]
    return Finding(
        "The account is of one data set, and counts one kind of unit",
        f"{name}, per {unit}, {_or_none(faults)}", "fail" if faults else "pass",
        name="data set",
    )  # fmt: skip


def _key(account: Account) -> Finding:
    key = public_key(account.entries).public_bytes_raw().hex()
    if account.key is not None:
        right = key == account.key.strip().lower()
        return Finding(
            "The lines are signed by the site", f"by the key {key[:16]}"
            + ("" if right else f", which is not the {account.key[:16]} that you know"),
            "pass" if right else "fail", name="key",
        )  # fmt: skip
    return Finding(
        "The lines are signed by the site",
        f"by the key {key[:16]}, which the ledger itself names", "info",
        f"Compare it with the key that you know of the site, or name that with --site-key: {key}",
        "key",
    )  # fmt: skip


def _replays(account: Account) -> Finding:
    """A line, a round or a reply that occurs twice."""
    faults: list[str] = []
    bodies = {e.seq: e.body for e in account.entries if e.kind is Kind.RESERVE}
    nonces = Counter(str(body.get("nonce")) for body in bodies.values())
    faults += [f"the nonce {nonce} occurs {n} times" for nonce, n in nonces.items() if n > 1]
    commits = [e for e in account.entries if e.kind is Kind.COMMIT]
    replies = Counter(str(e.body["reply"]) for e in commits)
    faults += [f"the reply {reply[:16]} was committed {n} times" for reply, n in replies.items()
               if n > 1]  # fmt: skip
    newest: dict[str, int] = {}
    lost = any(e.kind is Kind.RECOVER for e in account.entries)
    for commit in commits:
        body = bodies.get(int(commit.body["reserve"]))
        if body is None:
            continue  # the chain says so
        output, number = output_of(body), int(body["round"])
        if number <= newest.get(output, 0) and not lost:
            faults.append(f"entry {commit.seq}: round {number} was finished a second time")
        newest[output] = max(number, newest.get(output, 0))
    repeated = _repeated(account)
    again = f"; {repeated} rounds were begun again, and charged again" if repeated else ""
    return Finding(
        "No line, no round and no reply occurs twice",
        f"{len(commits)} replies, {_or_none(faults)}{again}",
        "fail" if faults else "pass",
        "A reply that is resent is not a line: it costs nothing and is the same bytes.",
        "replays",
    )


def _repeated(account: Account) -> int:
    rounds = Counter((output_of(e.body), e.body["round"]) for e in account.reservations)
    return sum(count - 1 for count in rounds.values())


def _sealed(account: Account) -> Finding:
    sealed: set[str] = set()
    faults = []
    for entry in account.entries:
        plan = str(entry.body.get("plan"))
        if entry.kind is Kind.SEAL:
            sealed.add(plan)
        elif entry.kind is Kind.RESERVE and plan in sealed:
            faults.append(f"entry {entry.seq}: charged to {plan[:12]} after it was sealed")
    return Finding(
        "A run whose head was refitted without noise never goes on",
        f"{_counted(len(sealed), 'run')} sealed, {_or_none(faults)}", "fail" if faults else "pass",
        name="sealed",
    )  # fmt: skip


def _plan(account: Account) -> Iterator[Finding]:
    """The charges of the plan under audit are those that the plan calls for."""
    plan = account.plan
    mine = [e for e in account.reservations if e.body["plan"] == plan.hash]
    inconsistent = _inconsistent(account)
    yield Finding(
        "Every run keeps the mechanism that it began with",
        f"{_counted(len({str(e.body['plan']) for e in account.reservations}), 'run')}, "
        f"{_or_none(inconsistent)}",
        "fail" if inconsistent else "pass",
        "Name, unit, mechanism, sample rate and noise multiplier of all charges to one plan hash.",
        "consistency",
    )
    if plan.privacy.mechanism == "none":
        yield Finding(
            "What leaves the site is charged before it is computed",
            "the plan runs without DP: nothing is charged, and nothing is promised", "fail",
            name="plan",
        )  # fmt: skip
        return
    if not mine:
        yield Finding(
            "The plan under audit was charged as it asks",
            "this ledger holds no charge for it; name the plan that the site ran, to check it",
            "fail" if account.rehearsed else "info",
            name="plan",
        )
        return
    nominal = account.data.nominal_size if account.data else None
    wrong = [fault for entry in mine for fault in _against_plan(entry, plan, nominal)]
    rounds = {int(e.body["round"]) for e in mine if e.body["purpose"] == "train"}
    of = f"{len(mine)} charges for {len(rounds)} of {plan.rounds.count} rounds"
    yield Finding(
        f"The plan {plan.name} ({plan.hash[:12]}) was charged as it asks",
        f"{of}, {_or_none(wrong)}", "fail" if wrong else "pass",
        "The plan's SHA-256 is computed anew; sample rate, noise, steps, unit, mechanism, shares "
        "and colluders of every charge are compared with what the plan comes to.", "plan",
    )  # fmt: skip


def _inconsistent(account: Account) -> list[str]:
    kept: dict[tuple[str, str], tuple[Any, ...]] = {}
    faults = []
    for entry in account.reservations:
        body = entry.body
        facts = (
            body["run"], body["unit"], body["mechanism"], body["sample_rate"],
            body["noise_multiplier"], body["shares"], body["colluders"],
        )  # fmt: skip
        if kept.setdefault((str(body["plan"]), str(body["purpose"])), facts) != facts:
            faults.append(f"entry {entry.seq}: another mechanism than the run began with")
    return faults


_SAID = {"evaluate": "an evaluation", "start": "a release of class means"}


def _against_plan(entry: Entry, plan: Plan, nominal: int | None = None) -> list[str]:
    """How a charge differs from what the plan asks.

    Args:
        entry: the charge.
        plan: that it names.
        nominal: units that the site declares, if known; the sample rate may follow from it.
    """
    body = entry.body
    purpose = str(body["purpose"])
    trains = purpose == "train"
    try:
        step = _step(plan.canonical, float(body["sample_rate"]), trains)
    except PrivacyError as error:
        return [f"entry {entry.seq}: {error}"]
    events = {"train": step.event, "evaluate": step.evaluation, "start": step.start}
    event = events.get(purpose)
    if event is None:
        return [f"entry {entry.seq}: {_SAID.get(purpose, purpose)} that the plan does not ask for"]
    distributed = plan.privacy.mechanism == "distributed" and trains
    expected = {
        "run": plan.name,
        "unit": plan.privacy.unit,
        "mechanism": "distributed" if distributed else "local",
        "shares": plan.noise_shares if distributed else 1,
        "colluders": plan.privacy.tolerated_colluders if distributed else 0,
        "sample_rate": event.sample_rate,
        "steps": plan.training.local_steps if trains else 1,
    }
    faults = [
        f"entry {entry.seq}: {key} {body[key]}, not {value}"
        for key, value in expected.items()
        if body[key] != value
    ]
    if body["noise_multiplier"] < event.noise_multiplier * (1 - PRECISION):
        faults.append(
            f"entry {entry.seq}: noise multiplier {body['noise_multiplier']:.6g}, less than the "
            f"{event.noise_multiplier:.6g} that the plan's epsilon needs"
        )
    if body["noise_multiplier"] > event.noise_multiplier * (1 + SURPLUS):
        faults.append(
            f"entry {entry.seq}: noise multiplier {body['noise_multiplier']:.6g}, more than the "
            f"{event.noise_multiplier:.6g} that the plan's steps have"
        )
    if nominal is not None and trains and plan.training.sample_rate is None:
        rate = plan.training.expected_batch / nominal
        if not math.isclose(rate, body["sample_rate"], rel_tol=PRECISION):
            faults.append(
                f"entry {entry.seq}: sample_rate {body['sample_rate']:.6g}, not the {rate:.6g} of "
                f"{nominal} units"
            )
    if not 1 <= body["round"] <= plan.rounds.count:
        faults.append(f"entry {entry.seq}: round {body['round']} of {plan.rounds.count}")
    return faults


@lru_cache(maxsize=64)
def _step(canonical: str, rate: float, trains: bool) -> StepNoise:
    """What a plan comes to at a site with this sample rate."""
    plan = Plan.model_validate_json(canonical)
    if plan.training.sample_rate is not None:
        return step_noise(plan, 2, "as charged")
    if not trains:  # what other releases are charged does not depend on the rate
        return step_noise(plan.replace({"training.sample_rate": 1.0}), 2, "as charged")
    return step_noise(plan, round(plan.training.expected_batch / rate), "as charged")


def _spending(account: Account) -> Iterator[Finding]:
    """The total, by two accountants, and each run."""
    events = spent(account.entries)
    delta = account.delta
    if not events:
        return
    total, second, tolerance = _two_accountants(tuple(events), delta)
    agree = abs(total - second) <= tolerance
    pending = _pending(account)
    void = sum(e.kind is Kind.VOID for e in account.entries)
    waiting = f"; {pending} charges never committed, and count" if pending else ""
    waiting += f"; {void} taken back, as nothing had been computed" if void else ""
    yield Finding(
        "Two independent accountants agree on what was spent",
        f"epsilon {total:.4f} and {second:.4f} at delta {delta:g}{waiting}",
        "pass" if agree else "fail",
        f"PLD of dp-accounting, which decides, and PRV of Opacus; they may lie {tolerance:g} "
        "apart.",
        "accountants",
    )
    plan = account.plan
    run = spent(account.entries, plan.hash)
    if run:
        cost = epsilon(run, plan.privacy.delta)
        yield Finding(
            f"The run spent no more than the epsilon {plan.privacy.epsilon:g} that it promises",
            f"epsilon {cost:.4f} at delta {plan.privacy.delta:g}, "
            f"{sum(e.steps for e in run)} steps",
            "pass" if cost <= plan.privacy.epsilon or _repeated(account) else "fail",
            "A round that was begun again after a crash is charged twice, and may take a run above "
            "its promise; the site's policy bounds that.",
            "promise",
        )


def _pending(account: Account) -> int:
    closed = {int(e.body["reserve"]) for e in account.entries if e.kind in (Kind.COMMIT, Kind.VOID)}
    return sum(e.seq not in closed for e in account.reservations)


@lru_cache(maxsize=64)
def _two_accountants(events: tuple[SamplingEvent, ...], delta: float) -> tuple[float, float, float]:
    """Epsilon by PLD and by PRV, and how far apart they may be; coarser on a long history."""
    if len(events) > MANY:
        return epsilon_bound(events, delta), second_opinion(events, delta, 0.1), 0.11
    return epsilon(events, delta), second_opinion(events, delta, 0.01), 0.011


def _policy(account: Account) -> Finding:
    """The site's own rules, where a ledger can show them."""
    claim = "The site's own rules were kept"
    if account.policy is None:
        return Finding(
            claim, "not checked: no site file was given", "info",
            "Name it with --site; its [policy] is then held against every charge.", "policy",
        )  # fmt: skip
    broken = [fault for check in _RULES for fault in check(account, account.policy)]
    return Finding(
        claim, f"{len(account.reservations)} charges, {_or_none(broken)}",
        "fail" if broken else "pass",
        "Lifetime and run epsilon, noise, mechanisms, tasks, released evaluations and approvals. "
        "A ledger does not say which backbone and adapter method a plan used, nor local time.",
        "policy",
    )  # fmt: skip


def _rule_lifetime(account: Account, policy: Policy) -> Iterator[str]:
    events = spent(account.entries)
    if events:
        total = _two_accountants(tuple(events), policy.maximum_delta)[0]
        if total > policy.maximum_epsilon:
            yield f"lifetime epsilon {total:.4f}, above maximum_epsilon {policy.maximum_epsilon:g}"


def _rule_runs(account: Account, policy: Policy) -> Iterator[str]:
    limit = policy.maximum_run_epsilon
    if limit is None:
        return
    for plan in dict.fromkeys(str(e.body.get("plan")) for e in charges(account.entries)):
        events = spent(account.entries, plan)
        cost = epsilon(events, policy.maximum_delta) if events else 0.0
        if cost > limit:
            yield f"run {plan[:12]}: epsilon {cost:.4f}, above maximum_run_epsilon {limit:g}"


def _rule_charges(account: Account, policy: Policy) -> Iterator[str]:
    for entry in account.reservations:
        body = entry.body
        if body["noise_multiplier"] < policy.minimum_noise_multiplier:
            yield f"entry {entry.seq}: noise multiplier below minimum_noise_multiplier"
        if body["purpose"] == "train" and body["mechanism"] not in policy.mechanisms:
            yield f"entry {entry.seq}: mechanism {body['mechanism']}"
        if not any(fnmatchcase(str(body["run"]), pattern) for pattern in policy.tasks):
            yield f"entry {entry.seq}: task {body['run']}"
        if body["purpose"] == "evaluate" and not policy.release_evaluation:
            yield f"entry {entry.seq}: a released evaluation"


def _rule_approval(account: Account, policy: Policy) -> Iterator[str]:
    if policy.approval != "manual":
        return
    approved: set[str] = set()
    for entry in account.entries:
        plan = str(entry.body.get("plan"))
        if entry.kind is Kind.APPROVE and entry.body.get("by", "operator") == "operator":
            approved.add(plan)
        elif entry.kind is Kind.RESERVE and plan not in approved:
            yield f"entry {entry.seq}: a plan that nobody had approved"


_RULES: tuple[Callable[[Account, Policy], Iterator[str]], ...] = (
    _rule_lifetime, _rule_runs, _rule_charges, _rule_approval,
)  # fmt: skip


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _or_whole(faults: Sequence[str]) -> str:
    return listed(faults) if faults else "whole"


def _or_none(faults: Sequence[str]) -> str:
    return listed(faults) if faults else "nothing wrong"
