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
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import torch
from cryptography.hazmat.primitives import serialization
from filelock import FileLock, Timeout

from fedgraft_client.account import MANY, public_key, read_ledger
from fedgraft_client.cache import MEMORY_LIMIT
from fedgraft_client.data import Records, check_records
from fedgraft_client.device_memory import GIB, memory_fraction
from fedgraft_client.entry import Entry, find_faults, spent
from fedgraft_client.identity import Identity, load_identity, whoami
from fedgraft_client.opening import load_records
from fedgraft_client.policy import Policy, check_plan
from fedgraft_client.runtime import Runtime, Workbench, choose_device
from fedgraft_client.site_file import SiteFile, load_site_file
from fedgraft_client.witness import Witness
from fedgraft_common.accounting import epsilon, epsilon_bound
from fedgraft_common.errors import (
    DataError,
    DeviceError,
    FedgraftError,
    IdentityError,
    LedgerError,
    PolicyError,
    PrivacyError,
)
from fedgraft_common.mechanism import StepNoise, step_noise
from fedgraft_common.plan import Plan

if TYPE_CHECKING:
    from fedgraft_client.head import LinearHead

T = TypeVar("T")
LEAST_DISK: Final = GIB  # bytes that ledger, heads and logs may want
AHEAD: Final = 5.0  # seconds; Flower refuses calls of a site whose clock is further ahead
RECORDS: Final = 64  # synthetic ones in the trial step
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
        records, entries = None, None
        if file is None:
            for name in ("data", "classes", "ledger", "identity"):
                yield Result(name, None, "needs the site file")
        else:
            yield self._look("data", lambda: check_data(file, base))
            records = self._value
            yield self._after("classes", records, lambda found: check_classes(found, file.classes))
            yield self._look("ledger", lambda: check_ledger(file, base))
            entries = self._value
            yield self._look("budget", lambda: check_budget(entries or [], file.policy))
            identity_at = base / file.home / "identity"
            yield self._look("identity", lambda: check_identity(identity_at, self._clock()))
        identity: Identity | None = self._value if file is not None else None
        yield self._after("connection", identity, lambda i: connect(i, self._ask, self._clock))
        offset: tuple[float, float] | None = self._value
        yield self._after("clock", offset, lambda found: check_clock(*found))
        memory = file.policy.gpu_memory if file else None
        yield self._look("device", lambda: check_device(file.device if file else "auto", memory))
        device: torch.device | None = self._value
        home = base / file.home if file else base
        directory, is_here = find_backbone(plan, home, identity)
        if is_here and device is not None:
            batch = file.physical_batch if file else RECORDS
            made = Runtime(str(device), batch, lambda _: directory, memory)
            yield self._look("backbone", lambda: load_bench(made, plan))
        else:
            self._value = None
            why = "not fetched yet; the daemon does at the first round" if device else "no device"
            yield Result("backbone", None, why)
        bench: Workbench | None = self._value
        size = cache_bytes(bench, len(records)) if bench and records else 0
        yield self._look("disk", lambda: check_disk(home, size))
        if file is not None:
            yield self._look("policy", lambda: check_policy(file, self._plan, spent(entries or [])))
        classes = file.classes if file else ("0", "1")
        yield self._after("DP step", bench, lambda b: trial_step(b, plan, classes))

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

    def _after(self, name: str, needed: T | None, work: Callable[[T], tuple[str, Any]]) -> Result:
        if needed is None:
            self._value = None
            return Result(name, None, "not checked: see the line it depends on")
        return self._look(name, lambda: work(needed))


def _action(error: FedgraftError) -> str:
    return f"Allowed: {error.allowed}. {error.action}"


def read_site_file(path: Path) -> tuple[str, SiteFile]:
    """The site file, whole and understood."""
    file = load_site_file(path)
    return f"{path}: site {file.name}, data set {file.data.name}", file


def check_data(file: SiteFile, base: Path) -> tuple[str, Records]:
    """Records that can be trained on, and those held out; classes are another check."""
    records = load_records(base / file.data.source, file.data.unit)
    sets = [(records, file.name)]
    if file.data.held_out is not None:
        held_out = load_records(base / file.data.held_out, file.data.unit)
        sets.append((held_out, f"{file.name}, held out"))
    for found, where in sets:
        check_records(replace(found, labels=torch.zeros_like(found.labels)), ("0", "1"), where)
    units = "" if records.units is None else f", {records.unit_count} of {file.data.unit}"
    text = f"{len(records)} records{units}; {file.data.nominal_size} units declared"
    return text, records


def check_classes(records: Records, classes: tuple[str, ...]) -> tuple[str, None]:
    """Every label is one of the site file's classes."""
    check_records(records, classes, "labels")
    counts = np.bincount(records.labels.numpy(), minlength=len(classes))
    if np.count_nonzero(counts) < 2:
        raise DataError(
            "labels", f"{classes[int(counts.argmax())]} only", "records of at least two classes",
            "Check the labels: a head that saw one class tells nothing apart.",
        )  # fmt: skip
    return ", ".join(f"{name} {n}" for name, n in zip(classes, counts, strict=True)), None


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
            "Put the newest backup back; `fedgraft ledger recover` then charges what it lacks.",
        )  # fmt: skip
    for name, mine in (("dataset", file.data.name), ("unit", file.data.unit)):
        if (found := str(entries[0].body.get(name))) != mine:
            raise LedgerError(
                f"{path}: {name}", found, f"{mine!r}, as the site file says",
                "Every data set has a ledger of its own; name another directory.",
            )  # fmt: skip
    _check_key(key_file, key.public_bytes_raw())
    if witness.exists():
        seen = witness.read(key)
        if seen.seq > len(entries) or entries[seen.seq - 1].hash != seen.hash:
            raise LedgerError(
                str(path), f"{len(entries)} entries", f"entry {seen.seq}, which the witness saw",
                "An old copy was put back: put the newest back, or `fedgraft ledger recover`.",
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
        raise DeviceError(
            "clock", f"{abs(ahead):.1f} s {side} the server's", f"within {AHEAD:g} s",
            "Let this machine follow a time server (NTP).",
        )  # fmt: skip
    return f"{ahead:+.1f} s to the server's", None


def check_device(name: str, gpu_memory: float | None) -> tuple[str, torch.device]:
    """The device exists, and has the memory that the policy grants."""
    device = choose_device(name)
    if device.type != "cuda":
        return f"{device}, {torch.get_num_threads()} threads", device
    free, total = torch.cuda.mem_get_info(device)
    memory_fraction(total, gpu_memory, str(device))
    allowed = f"; the policy allows {gpu_memory:g} GiB" if gpu_memory else ""
    title = torch.cuda.get_device_name(device)
    text = f"{device} ({title}), {free / GIB:.1f} of {total / GIB:.1f} GiB free{allowed}"
    if gpu_memory and free < gpu_memory * GIB:
        raise DeviceError(
            "device memory", text, "as much free as policy.gpu_memory",
            "Stop what else uses the device, or lower policy.gpu_memory.",
        )  # fmt: skip
    return text, device


def find_backbone(plan: Plan, home: Path, identity: Identity | None) -> tuple[Path | None, bool]:
    """Where a plan's backbone lies (None: where the plan says), and whether it is here."""
    if not plan.backbone.source.startswith("server:") or plan.backbone.sha256 is None:
        return None, True
    if identity is None or not (home / "backbones").is_dir():
        return None, False
    from fedgraft_client.blob_store import BlobStore

    store = BlobStore(home / "backbones", 0)  # only reads
    pinned = plan.backbone.manifest_sha256
    found = store.find(identity.operator_key, plan.backbone.sha256, pinned)
    return found, found is not None


def load_bench(runtime: Runtime, plan: Plan) -> tuple[str, Workbench]:
    """The backbone loads, has the plan's hash, and takes the plan's adapter."""
    bench = runtime.workbench(plan)
    backbone = bench.adapted.backbone
    values = sum(tensor.numel() for tensor in bench.initial.values())
    pinned = "as the plan says" if plan.backbone.sha256 else "not pinned by the plan"
    return (
        f"{backbone.manifest.name}, SHA-256 {backbone.sha256[:12]} ({pinned}); {values} values "
        f"of {plan.adapter.method}",
        bench,
    )


def cache_bytes(bench: Workbench, records: int) -> int:
    """Disk that the cached prefix of so many records needs; 0 if it stays in memory."""
    example = bench.adapted.backbone.example(1, torch.Generator().manual_seed(0))
    with suppress(torch.OutOfMemoryError):
        kept = bench.prefix.compute(example.to(bench.device))
        size = records * sum(tensor.nbytes for tensor in kept)
        return size if size > MEMORY_LIMIT else 0
    return 0


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


def check_policy(file: SiteFile, plan: Plan | None, events: list[Any]) -> tuple[str, None]:
    """A plan is within the site's own rules and budget."""
    policy = file.policy
    limits = f"epsilon {policy.maximum_epsilon:g} at delta {policy.maximum_delta:g}"
    if plan is None:
        return f"{limits}, approval {policy.approval}; no --plan to hold against it", None
    from fedgraft_client.budget import affordable_rounds

    if plan.privacy.mechanism != "local":
        raise PrivacyError(
            "privacy.mechanism", plan.privacy.mechanism, "local, at a site with real data",
            "Without secure aggregation the server would see this site's own sum; simulate it.",
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


def trial_step(
    bench: Workbench, plan: Plan, classes: tuple[str, ...], records: int = RECORDS
) -> tuple[str, None]:
    """One whole DP step on synthetic records, with the engine that the real ones would get."""
    from fedgraft_client.head import initial_head
    from fedgraft_client.randomness import NoiseSource
    from fedgraft_client.training import train_round

    head: LinearHead = initial_head(plan, classes, bench.adapted.feature_dim)
    example = bench.adapted.backbone.example(records, torch.Generator().manual_seed(1))
    cached = tuple(tensor.cpu() for tensor in bench.prefix.compute(example.to(bench.device)))
    bench.trainer(head)
    verdict = bench.verdicts[-1]
    smaller: list[int] = []
    began = time.perf_counter()
    update = train_round(
        bench,
        plan.replace({"training.local_steps": 1}),
        1,
        bench.initial,
        head,
        cached,
        torch.arange(records) % len(classes),
        StepNoise(1.0, 1.0, 1e-3, 1e-3, None),
        NoiseSource.from_operating_system(),
        records,
        torch.arange(records),
        smaller.append,
    )
    if not all(tensor.isfinite().all() for tensor in update.values()):
        raise DeviceError(
            "DP step", "an adapter that is not finite", "finite values",
            "Try another device; if it is the same there, report this with the plan.",
        )  # fmt: skip
    took = time.perf_counter() - began
    room = f", {smaller[-1]} at once for lack of memory" if smaller else ""
    return (
        f"{verdict.engine} exact to {verdict.error:.0e}; {records} synthetic records in "
        f"{took:.2f} s on {bench.device}{room}",
        None,
    )
