"""Checks of a site's account: the ledger is whole, something is left, a plan is within the rules.

The ledger is read, never written: no budget is spent, and no line is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from filelock import FileLock, Timeout

from fedgraft_client.account import MANY, public_key, read_ledger
from fedgraft_client.budget import affordable_rounds
from fedgraft_client.entry import Entry, find_faults, spent
from fedgraft_client.policy import Policy, check_plan
from fedgraft_client.site_file import SiteFile
from fedgraft_client.witness import Witness
from fedgraft_common.accounting import SamplingEvent, epsilon, epsilon_bound
from fedgraft_common.errors import LedgerError, PolicyError, PrivacyError
from fedgraft_common.mechanism import step_noise
from fedgraft_common.plan import Plan


def check_ledger(file: SiteFile, base: Path) -> tuple[str, list[Entry]]:
    """The account is whole, of this data set, no older than its witness, and has its key."""
    directory = file.store_directory(base)
    path, key_file = directory / "ledger.sqlite3", directory / "ledger.key"
    witness = Witness(file.witness_file(base) or directory / "ledger.witness")
    if not path.exists():
        if witness.exists():
            raise LedgerError(
                str(path), "no such file, but its witness is there", "the ledger of this data set",
                "Put the newest backup back, then `fedgraft ledger recover`.",
            )  # fmt: skip
        return "none yet; the daemon opens one", []
    entries = read_ledger(path)
    key = public_key(entries)
    if faults := find_faults(entries, key):
        raise LedgerError(
            str(path), f"{faults[0]} ({len(faults)} faults)", "the lines that this site wrote",
            "Put the newest backup back; `fedgraft ledger recover` then adds what it lacks.",
        )  # fmt: skip
    for name, mine in (("dataset", file.data.name), ("unit", file.data.unit)):
        if (found := str(entries[0].body.get(name))) != mine:
            raise LedgerError(
                f"{path}: {name}", found, f"{mine!r}, as the site file says",
                "Every data set has a ledger of its own; name another directory.",
            )  # fmt: skip
    _check_key(key_file, key.public_bytes_raw())
    if witness.exists():
        seen = [entry.hash for entry in witness.read()]
        if seen != [entry.hash for entry in entries[: len(seen)]]:
            found = f"{len(entries)} entries" if len(entries) < len(seen) else "another history"
            raise LedgerError(
                str(path), found, f"the {len(seen)} entries that the witness saw",
                "An old copy was put back: put the newest back, or `fedgraft ledger recover`.",
            )  # fmt: skip
        if len(entries) - len(seen) > 1:
            raise LedgerError(
                str(witness.path), f"{len(seen)} entries", f"{len(entries)}, those of the ledger",
                "An old copy of the witness was put back: put the newest back, or "
                "`fedgraft ledger recover`.",
            )  # fmt: skip
    elif len(entries) > 1:
        raise LedgerError(
            str(witness.path), "no such file", "the witness of this ledger",
            "Put it back from its own disk; if it is lost, `fedgraft ledger recover`.",
        )  # fmt: skip
    held = "held by a running process" if is_held(directory) else "free"
    return f"{len(entries)} entries, chain whole, {held}", entries


def _check_key(path: Path, public: bytes) -> None:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        found = key.public_key().public_bytes_raw()  # type: ignore[union-attr]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise LedgerError(
            str(path), str(error), "the key that signed this ledger", "Put it back from a backup."
        ) from None
    if found != public:
        raise LedgerError(
            str(path), "another key", "the key that signed this ledger",
            "Put it back from a backup.",
        )  # fmt: skip


def is_held(directory: Path) -> bool:
    """Whether a process has the ledger open; asked by taking its lock and giving it back."""
    path = directory / "ledger.lock"
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def check_budget(entries: list[Entry], policy: Policy) -> tuple[str, float]:
    """Something is left of the lifetime's epsilon."""
    events = spent(entries)
    compose = epsilon_bound if len(events) > MANY else epsilon
    total = compose(events, policy.maximum_delta) if events else 0.0
    if total >= policy.maximum_epsilon:
        raise PolicyError(
            "lifetime epsilon", f"{total:.2f} spent", f"below {policy.maximum_epsilon:g}",
            "This data set is used up; take other data, or decide anew what it may spend.",
        )  # fmt: skip
    left = policy.maximum_epsilon - total
    return f"epsilon {left:.2f} of {policy.maximum_epsilon:g} left", left


def check_policy(
    file: SiteFile, plan: Plan | None, events: Sequence[SamplingEvent]
) -> tuple[str, None]:
    """A plan is within the site's own rules and budget."""
    policy = file.policy
    limits = f"epsilon {policy.maximum_epsilon:g} at delta {policy.maximum_delta:g}"
    if plan is None:
        return f"{limits}, approval {policy.approval}; no --plan to hold against it", None
    if not (plan.secure or plan.privacy.mechanism == "local"):
        raise PrivacyError(
            "privacy.mechanism", plan.privacy.mechanism,
            "local, or distributed with secure_aggregation = 'real', at a site with real data",
            "Without either the server would see what is not private; simulate it.",
        )  # fmt: skip
    step = step_noise(plan, file.data.nominal_size, file.name)
    check_plan(policy, plan, file.data.unit, step)
    rounds = affordable_rounds(policy, plan, step.events, events, [])
    if rounds < plan.rounds.count and not (rounds and policy.partial_runs):
        raise PolicyError(
            f"plan {plan.name}", f"{plan.rounds.count} rounds", f"{rounds}, what the budget pays",
            "Ask for a plan that costs less, or allow partial runs.",
        )  # fmt: skip
    cost = step.epsilon(plan.privacy.delta)
    return (
        f"{plan.name}: epsilon {cost:.2f}, {rounds} of {plan.rounds.count} rounds paid, approval "
        f"{policy.approval}",
        None,
    )
