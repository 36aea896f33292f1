"""Does the audit itself work? Bugs that it must catch, and sound runs that it must let pass.

Every case is a small federation that is audited like any other, by the parts in `PARTS_USED`. A bug
is caught if any of them fails; a sound run is a false alarm if any of them does. Sound runs are of
two kinds: the plan as it is, and the plan on records whose labels are random, from which nothing
can be learnt but the records themselves.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedgraft_common.plan import Plan, load_plan
from fedgraft_simulations.audit.part import AuditContext
from fedgraft_simulations.audit.parts import load_part
from fedgraft_simulations.audit.plants import BUGS
from fedgraft_simulations.partition import load_source

PARTS_USED = ("ledger", "egress", "mechanism")
SOUND_RUNS = 20
CHANGES: dict[str, Any] = {
    "name": "self-test",
    "rounds.count": 12,
    "sites.count": 4,
    "head.training": "private",
    "training.sample_rate": 0.25,
}
"""Of the digits plan: small enough to be run thirty times, with a head that DP has to cover."""
PLANS = Path(__file__).parent.parent / "plans"


@dataclass(frozen=True, slots=True)
class Case:
    """One audited federation.

    Attributes:
        name: of the bug, or of the kind of sound run.
        mistake: what is wrong with it; empty if nothing is.
        caught: part name to the checks that failed there.
        seconds: how long it took.
    """

    name: str
    mistake: str
    caught: dict[str, tuple[str, ...]]
    seconds: float

    @property
    def alarm(self) -> bool:
        """Whether any part failed."""
        return any(self.caught.values())


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What a self-test found.

    Attributes:
        bugs: a case for each planted bug.
        sound: sound runs.
    """

    bugs: tuple[Case, ...]
    sound: tuple[Case, ...]

    @property
    def caught(self) -> int:
        """Bugs that were caught."""
        return sum(case.alarm for case in self.bugs)

    @property
    def false_alarms(self) -> int:
        """Sound runs that were not let pass."""
        return sum(case.alarm for case in self.sound)

    @property
    def passed(self) -> bool:
        """Whether every bug and nothing else was caught."""
        return self.caught == len(self.bugs) and self.false_alarms == 0

    @property
    def words(self) -> str:
        """The result in one sentence."""
        return (
            f"{self.caught} of {len(self.bugs)} planted bugs caught, {self.false_alarms} false "
            f"alarms in {len(self.sound)} sound runs."
        )

    def document(self) -> dict[str, Any]:
        """For machines."""
        return {
            "passed": self.passed,
            "bugs": [
                {"name": c.name, "mistake": c.mistake, "caught": {k: list(v) for k, v in
                 c.caught.items()}}
                for c in self.bugs
            ],
            "sound": [
                {"name": c.name, "alarms": {k: list(v) for k, v in c.caught.items() if v}}
                for c in self.sound
            ],
        }  # fmt: skip


def self_test(
    directory: Path,
    seed: int = 0,
    sound_runs: int = SOUND_RUNS,
    progress: Callable[[float, str], None] = lambda *_: None,
) -> SelfTest:
    """Audits every bug and the sound runs.

    Args:
        directory: for the cases' files, which are removed when a case is done.
        seed: of the auditor's randomness.
        sound_runs: how many.
        progress: told how much is done, and what comes.
    """
    plan = load_plan(PLANS / "digits.toml").replace(CHANGES)
    total = len(BUGS) + sound_runs
    bugs, sound = [], []
    for place, bug in enumerate(BUGS):
        progress(place / total, f"bug: {bug.name}")
        bugs.append(
            run_case(bug.name, bug.mistake, plan, directory / f"bug-{place}", seed, bug.plant(plan))
        )
    for number in range(sound_runs):
        kind = ("sound", "random labels")[number % 2]
        progress((len(bugs) + number) / total, f"{kind}, {number + 1} of {sound_runs}")
        changed = _sound_plan(plan, kind, number, seed, directory)
        sound.append(run_case(kind, "", changed, directory / f"sound-{number}", seed + number))
    return SelfTest(tuple(bugs), tuple(sound))


def run_case(
    name: str,
    mistake: str,
    plan: Plan,
    directory: Path,
    seed: int,
    planted: AbstractContextManager[None] | None = None,
) -> Case:
    """Audits one federation.

    Args:
        name: of the case.
        mistake: what is wrong with it.
        plan: to audit.
        directory: for its files; new, and removed at the end.
        seed: of the auditor's randomness.
        planted: puts the mistake in place.
    """
    started = time.perf_counter()
    context = AuditContext(plan, directory, seed, effort="quick")
    caught = {}
    with planted or nullcontext():
        for part in PARTS_USED:
            result = load_part(part).run(context, lambda *_: None)
            failed = [f.name for f in result.findings if f.verdict == "fail"]
            caught[part] = tuple(dict.fromkeys(failed))
    shutil.rmtree(directory, ignore_errors=True)
    return Case(name, mistake, caught, time.perf_counter() - started)


def _sound_plan(plan: Plan, kind: str, number: int, seed: int, directory: Path) -> Plan:
    """A plan without a mistake; each has a seed of its own, every second one trains a fixed head,
    with the local mechanism, and some release evaluations.
    """
    changes: dict[str, Any] = {"seed": 1000 * seed + number}
    if number % 4 >= 2:
        changes |= {"privacy.mechanism": "local", "head.training": "fixed"}
    if number % 5 == 4:
        changes["evaluation.every"] = 2
    if kind == "random labels":
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / f"random-{number}.npz"
        digits = load_source("sklearn:digits")
        labels = np.random.default_rng([seed, number]).integers(0, 10, size=len(digits))
        np.savez(file, images=np.asarray(digits.inputs)[:, 0], labels=labels)
        changes["data.source"] = f"npz:{file}"
    return plan.replace(changes)
