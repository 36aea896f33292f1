"""Is this site ready? One line for each thing that a daemon needs, and what to do where it is not.

Every check is a function of what it looks at; it returns what it found, or raises an error that
says what to do. One that fails does not stop the others. Nothing is changed: the ledger is read
without its lock, no budget is spent, and nothing is trained but synthetic records.
"""

from __future__ import annotations

import datetime as dt
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from fedgraft_client.data import Records, check_records, check_unlabelled
from fedgraft_client.device_check import (
    RECORDS,
    cache_bytes,
    check_device,
    find_backbone,
    load_bench,
    trial_step,
)
from fedgraft_client.device_memory import GIB
from fedgraft_client.entry import Entry, spent
from fedgraft_client.identity import Identity, load_identity, whoami
from fedgraft_client.ledger_check import check_budget, check_ledger, check_policy
from fedgraft_client.opening import load_records
from fedgraft_client.runtime import Runtime, Workbench
from fedgraft_client.site_file import SiteFile, load_site_file
from fedgraft_client.tasks import build_task
from fedgraft_common.errors import DeviceError, FedgraftError, IdentityError, LinkError
from fedgraft_common.plan import Plan
from fedgraft_common.task_spec import TaskSpec

T = TypeVar("T")
LEAST_DISK: Final = GIB  # bytes that ledger, heads and logs may want
AHEAD: Final = 5.0  # seconds; Flower refuses calls of a site whose clock is further ahead
_DEPENDS: Final = "not checked: see the line it depends on"
DAY: Final = 86400.0  # seconds


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table.

    Attributes:
        name: what was looked at.
        ok: whether it is as it should be; None if it could not or need not be checked.
        found: what was found, or why it was not checked.
        action: what to do; empty if nothing.
    """

    name: str
    ok: bool | None
    found: str
    action: str = ""


class Checkup:
    """Runs checks and keeps their results; a failed one gives None to those that build on it.

    Args:
        site: the site file.
        plan: what the site is to take part in; None takes the defaults, with the embedded
            backbone.
        clock: seconds since the epoch.
        ask: what the gateway says; `identity.whoami`.
    """

    def __init__(
        self,
        site: Path,
        plan: Plan | None = None,
        clock: Callable[[], float] = time.time,
        ask: Callable[[Identity], dict[str, Any]] = whoami,
    ) -> None:
        self._site, self._plan = site, plan
        self._clock, self._ask = clock, ask
        self._last = Result("", None, "")
        self._value: Any = None

    def run(self) -> Iterator[Result]:
        """The results, each as soon as it is there."""
        base, plan = self._site.parent, self._plan or Plan()
        yield self._look("site file", lambda: read_site_file(self._site))
        file: SiteFile | None = self._value
        records: Records | None = None
        entries: list[Entry] | None = None
        if file is None:
            for name in ("data", "classes", "ledger", "identity"):
                yield Result(name, None, "needs the site file")
        else:
            yield self._look("data", lambda: check_data(file, base))
            records = self._value
            yield self._after("classes", records, lambda found: check_labels(found, file.spec))
            yield self._look("ledger", lambda: check_ledger(file, base))
            entries = self._value
            yield self._after("budget", entries, lambda found: check_budget(found, file.policy))
            identity_at = base / file.home / "identity"
            yield self._look("identity", lambda: check_identity(identity_at, self._clock()))
        identity: Identity | None = self._value if file is not None else None
        has_joined = file is None or (base / file.home / "identity").exists()
        why = _DEPENDS if has_joined else "not joined"
        yield self._after("connection", identity, lambda i: connect(i, self._ask, self._clock), why)
        offset: tuple[float, float] | None = self._value
        yield self._after("clock", offset, lambda found: check_clock(*found), why)
        memory = file.policy.gpu_memory if file else None
        yield self._look("device", lambda: check_device(file.device if file else "auto", memory))
        device: torch.device | None = self._value
        home = base / file.home if file else base
        task = build_task(file.spec if file else TaskSpec(classes=("0", "1")))
        found = self._look("backbone", lambda: ("", find_backbone(plan, home, identity)))
        if found.ok:
            directory, is_here = self._value
            batch = file.physical_batch if file else RECORDS
            where, most = (str(device), memory) if device else ("cpu", None)
            found = Result("backbone", None, "not fetched yet; the daemon does at the first round")
            self._value = None
            if is_here:
                made = Runtime(where, batch, lambda _: directory, most)
                found = self._look("backbone", lambda: load_bench(made, plan, task))
        yield found
        bench: Workbench | None = self._value
        count = len(records) if records else 0
        yield self._look("disk", lambda: check_disk(home, cache_bytes(bench, count)))
        if file is not None:
            yield self._after(
                "policy", entries, lambda found: check_policy(file, self._plan, spent(found))
            )
        yield self._after("DP step", bench, lambda b: trial_step(b, plan, task))

    def _look(self, name: str, work: Callable[[], tuple[str, Any]]) -> Result:
        self._value = None
        try:
            found, self._value = work()
        except FedgraftError as error:
            return Result(name, False, f"{error.field}: {error.value}", _action(error))
        except Exception as error:  # a check that breaks is a finding, and the others go on
            return Result(
                name, False, f"{type(error).__name__}: {error}", "Report this with the site's log."
            )
        return Result(name, True, found)

    def _after(
        self,
        name: str,
        needed: T | None,
        work: Callable[[T], tuple[str, Any]],
        why: str = _DEPENDS,
    ) -> Result:
        if needed is None:
            self._value = None
            return Result(name, None, why)
        return self._look(name, lambda: work(needed))


def _action(error: FedgraftError) -> str:
    return f"Allowed: {error.allowed}. {error.action}"


def read_site_file(path: Path) -> tuple[str, SiteFile]:
    """The site file, whole and understood."""
    file = load_site_file(path)
    return f"{path}: site {file.name}, data set {file.data.name}", file


def check_data(file: SiteFile, base: Path) -> tuple[str, Records]:
    """Records that can be trained on, and those held out; classes are another check."""
    records = load_records(file, base)
    sets = [(records, file.name)]
    if file.data.held_out is not None:
        held_out = load_records(file, base, file.data.held_out)
        sets.append((held_out, f"{file.name}, held out"))
    for found, where in sets:
        check_unlabelled(found, where)
    units = "" if records.units is None else f", {records.unit_count} of {file.data.unit}"
    text = f"{len(records)} records{units}; {file.data.nominal_size} units declared"
    return text, records


def check_labels(records: Records, spec: TaskSpec) -> tuple[str, None]:
    """Every label is one of the site's task."""
    check_records(records, build_task(spec), "labels")
    if records.labels.dim() > 1 or records.labels.is_floating_point():
        return f"labels of {spec.kind}", None
    counts = torch.bincount(records.labels, minlength=len(spec.classes)).tolist()
    return ", ".join(f"{name} {n}" for name, n in zip(spec.classes, counts, strict=True)), None


def check_identity(directory: Path, now: float) -> tuple[str, Identity]:
    """The site has joined, and its certificate is valid."""
    if not directory.exists():
        raise IdentityError(
            "identity", "not joined", f"an identity in {directory}",
            f"Ask for an invite, then `fedgraft site join INVITE --home {directory}`.",
        )  # fmt: skip
    moment = dt.datetime.fromtimestamp(now, dt.UTC)
    identity = load_identity(directory, lambda: moment)
    days = (identity.expires - moment).total_seconds() / DAY
    who = f"{identity.facts.site} of {identity.facts.federation}"
    return f"{who}; certificate for {days:.0f} more days, renewed by the daemon", identity


def connect(
    identity: Identity, ask: Callable[[Identity], dict[str, Any]], clock: Callable[[], float]
) -> tuple[str, tuple[float, float] | None]:
    """The gateway answers over mutual TLS and knows this site.

    Returns:
        What was found; and by how many seconds the server's clock is ahead of this machine's, and
        how far that may be off. None if the server does not say.
    """
    began = clock()
    answer = ask(identity)
    took = clock() - began
    name = answer.get("site")
    if name != identity.facts.site:
        raise IdentityError(
            identity.facts.gateway, f"known as {name}", identity.facts.site,
            "The certificate is another site's: restore the identity from a backup.",
        )  # fmt: skip
    moment = answer.get("time")
    ahead = None
    if isinstance(moment, int | float):
        ahead = float(moment) - (began + took / 2), took / 2
    return f"{identity.facts.gateway} in {1000 * took:.0f} ms over mutual TLS", ahead


def check_clock(ahead: float, uncertainty: float) -> tuple[str, None]:
    """The two clocks agree; Flower signs calls with the time."""
    if abs(ahead) > AHEAD + uncertainty:
        side = "behind" if ahead > 0 else "ahead of"
        raise LinkError(
            "clock", f"{abs(ahead):.1f} s {side} the server's", f"within {AHEAD:g} s",
            "Let this machine follow a time server (NTP).",
        )  # fmt: skip
    return f"{ahead:+.1f} s to the server's", None


def check_disk(home: Path, cache: int) -> tuple[str, None]:
    """Room for the ledger, the heads, and what the frozen part makes of the records."""
    where = home
    while not where.exists():
        where = where.parent
    free, needed = shutil.disk_usage(where).free, LEAST_DISK + cache
    if free < needed:
        raise DeviceError(
            f"disk of {where}", f"{free / GIB:.1f} GiB free", f"at least {needed / GIB:.1f} GiB",
            "Free some space: a ledger that cannot be written stops every round.",
        )  # fmt: skip
    return f"{free / GIB:.1f} GiB free, {needed / GIB:.1f} needed", None
