"""A ledger with 10,000 past events: how long a dry run and a whole verification take.

The site has taken part in 60 runs, each with another sample rate and noise multiplier. Before
every reservation of its next run it asks whether the round still fits (`check_affordable`): the
history is composed once, at the first question, and each further one composes one event more.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from fedgraft_client.account import read_ledger, verify
from fedgraft_client.budget import check_affordable
from fedgraft_client.entry import Charge
from fedgraft_client.ledger import Ledger
from fedgraft_client.policy import Policy
from fedgraft_common.accounting import SamplingEvent
from fedgraft_simulations.benchmarks.measure import Report

RUNS = 60


def measure(repetitions: int = 20, events: int = 10_000) -> Report:
    """Fills a ledger, opens it as a daemon does, then asks and reserves.

    Args:
        repetitions: rounds of the next run.
        events: past reservations.
    """
    policy = Policy(maximum_epsilon=1e4)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        _fill(directory, events)
        started = time.perf_counter()
        ledger = Ledger(directory, "data", witness=directory / "witness")
        opening = time.perf_counter() - started
        asked, reserved = [], []
        for number in range(1, repetitions + 1):
            charge = _charge(RUNS, number)
            run = ledger.spent(charge.plan)
            started = time.perf_counter()
            check_affordable(policy, 1e-5, charge.event, ledger.spent(), run)
            asked.append(time.perf_counter() - started)
            started = time.perf_counter()
            ledger.reserve(charge)
            reserved.append(time.perf_counter() - started)
        ledger.close()
        started = time.perf_counter()
        verify(read_ledger(directory / "ledger.sqlite3"), 1e-5, directory / "witness")
        verified = time.perf_counter() - started
    return Report(
        "long_ledger",
        f"A ledger with {events} past events of {RUNS} mechanisms",
        figures={
            "open and check (s)": opening,
            "first dry run (s)": asked[0],
            "warm dry run (ms)": 1e3 * statistics.median(asked[1:]),
            "reservation on the disk (ms)": 1e3 * statistics.median(reserved),
            "verify with two accountants (s)": verified,
        },
        notes=("Aims: warm dry run under 50 ms, verify under 30 s.",),
    )


def _charge(run: int, number: int) -> Charge:
    event = SamplingEvent(0.02 + 0.001 * run, 2.0 + 0.02 * run, 1)
    return Charge(f"run-{run}", f"{run:064x}", number, "train", "local", "record", event)


def _fill(directory: Path, events: int) -> None:
    """Without waiting for the disk, then made durable by the first real opening."""
    with Ledger(directory, "data", durable=False) as ledger:
        for number in range(events):
            ledger.reserve(_charge(number * RUNS // events, number % (events // RUNS + 1) + 1))
    Ledger(directory, "data", witness=directory / "witness", recover=True).close()
