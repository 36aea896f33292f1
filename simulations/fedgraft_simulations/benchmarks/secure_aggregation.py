"""What secure aggregation costs: all sites and the server in one process, nothing shared.

Each site computes its own end of every pair's mask, and the server opens the sum, as in
production; no network, no training. Seconds are CPU time of the whole process. In a round of n
sites with L values there are n (n - 1) key agreements and n^2 mask streams of L values, so the
aim is a cost of about n^2 L; set-up is paid once and told apart.
"""

from __future__ import annotations

import datetime as dt
import secrets
import time
from collections.abc import Callable

import numpy as np

from fedgraft_common.masks import Vector, add_masks
from fedgraft_common.secure_aggregation import SecureRound
from fedgraft_common.secure_messages import Terms
from fedgraft_simulations.benchmarks.measure import Ratio, Report, Way, alternate
from fedgraft_simulations.secure_rounds import SecureRounds, Step
from fedgraft_simulations.throwaway_keys import throwaway_keys

AIM = 5.0  # seconds of CPU for a round of 100 sites and 100,000 values
PLAN_ROUNDS = 60


def measure(repetitions: int = 3, sites: int = 100, length: int = 100_000) -> Report:
    """Times rounds.

    Args:
        repetitions: rounds of each kind.
        sites: how many take part.
        length: values in a vector, uint32.
    """
    whole = Rounds(sites, length, max(PLAN_ROUNDS, 2 * repetitions + 2))
    half_sites = Rounds(sites // 2, length, repetitions + 1)
    half_length = Rounds(sites, length // 2, repetitions + 1)
    keys_only = Rounds(sites, 1, repetitions + 1)
    dropouts = whole.terms.dropouts

    def with_dropouts() -> float:
        return whole.time(dropouts)

    kinds = (whole, half_sites, half_length, keys_only)
    for rounds in kinds:
        rounds.time()  # the first round of a process pays for page faults
    ways = [*(rounds.time for rounds in kinds), with_dropouts, whole.plain_sum]
    all_, fewer, shorter, keys, dropped, plain = alternate(ways, repetitions)
    name = f"{sites} sites, {length:,} values"
    real = Way(name, all_)
    streams = 1000 * _cpu(lambda: _one_stream(length)) / 100
    site, server = whole.parts()
    return Report(
        "secure_aggregation",
        f"One round of secure aggregation, {name}, CPU seconds of all sites and the server",
        ratios=(
            Ratio("twice the sites (n^2: 4x)", real, Way(f"{sites // 2} sites", fewer)),
            Ratio("twice the values (at most 2x)", real, Way(f"{length // 2:,} values", shorter)),
            Ratio("real against summed in the clear", real, Way("numpy's sum", plain)),
            Ratio(
                f"{dropouts} sites missing against none", Way(f"{dropouts} missing", dropped), real
            ),
        ),
        figures={
            f"a round, s (at most {AIM:g})": real.median,
            "of it keys, shares and signatures, s": Way("", keys).median,
            "of it mask streams and additions, s": real.median - Way("", keys).median,
            f"one stream of {length:,} values, ms": streams,
            "one site, ms": 1000 * site,
            "the server, ms": 1000 * server,
            f"set-up for {PLAN_ROUNDS} rounds, all sites, s": whole.setup,
            f"set-up for {PLAN_ROUNDS} rounds, one site, ms": 1000 * whole.setup / sites,
            **whole.sizes(),
        },
        notes=(
            "Both ends of every pair compute their masks, as in production.",
            "Set-up is once for all rounds; much of it is checking certificates and signatures.",
        ),
    )


class Rounds:
    """One set-up, and rounds under it.

    Attributes:
        terms: of the set-up.
        setup: CPU seconds it took, all sites and the server.
    """

    def __init__(self, sites: int, length: int, rounds: int) -> None:
        now = dt.datetime.now(dt.UTC)
        names = [f"site-{i:04d}" for i in range(sites)]
        tolerated = max(d for d in range(sites) if d * (d + 1) < sites)
        self.terms = Terms(
            secrets.token_bytes(32), secrets.token_bytes(16), 1, rounds, length, 32, sites,
            tolerated, 0,
        )  # fmt: skip
        keys, self._trust = throwaway_keys(names, now)
        started = time.process_time()
        self._rounds = SecureRounds(
            self.terms, keys, self._trust, lambda _: secrets.token_bytes(32)
        )
        self.setup = time.process_time() - started
        source = np.random.default_rng(0)
        self._inputs: dict[str, Vector] = {
            name: source.integers(0, 2**32, length, dtype=np.uint32) for name in names
        }
        self._number = 0

    def time(self, missing: int = 0) -> float:
        """CPU seconds of the next round, whose sum is checked."""
        self._number += 1
        absent = dict.fromkeys(list(self._inputs)[:missing], Step.MASK)
        started = time.process_time()
        total = self._rounds.sum(self._number, self._inputs, b"", absent)
        seconds = time.process_time() - started
        there = np.array([self._inputs[name] for name in total.survivors])
        if not np.array_equal(total.values, there.sum(axis=0, dtype=np.uint32)):
            raise AssertionError("the sum is wrong")
        return seconds

    def plain_sum(self) -> float:
        """CPU seconds of adding the inputs up in the clear."""

        def add() -> None:
            total = np.zeros(self.terms.length, np.uint32)
            for values in self._inputs.values():
                np.add(total, values, out=total)

        return _cpu(add)

    def parts(self) -> tuple[float, float]:
        """CPU seconds of one site and of the server in the next round."""
        self._number += 1
        rounds, context = self._rounds, bytes(32)
        round_ = SecureRound(self.terms, rounds.roster, self._number, context)
        masked = {}
        started = time.process_time()
        for name, values in self._inputs.items():
            masked[name] = rounds.sites[name].mask(self._number, values, context)
        sites = time.process_time() - started
        started = time.process_time()
        for name, values in masked.items():
            round_.add_input(name, values)
        question = round_.close()
        server = time.process_time() - started
        started = time.process_time()
        answers = [site.unmask(question) for site in rounds.sites.values()]
        sites += time.process_time() - started
        started = time.process_time()
        for answer in answers:
            round_.add_answer(answer)
        round_.total()
        self._answer = answers[0]
        server += time.process_time() - started
        return sites / len(masked), server

    def sizes(self) -> dict[str, float]:
        """Bytes that one site sends and receives; after `parts`."""
        rounds = self._rounds
        name, site = next(iter(rounds.sites.items()))
        sharing = site.share(rounds.roster, self._trust)
        return {
            f"set-up for {self.terms.rounds} rounds, a site sends, kB": (
                len(site.advertise().to_bytes())
                + len(sharing.to_bytes())
            ) / 1e3,
            f"set-up for {self.terms.rounds} rounds, a site receives, kB": (
                len(rounds.roster.to_bytes()) + len(rounds.server.delivery(name).to_bytes())
            ) / 1e3,
            "a round, a site sends beyond its vector, kB": len(self._answer.to_bytes()) / 1e3,
            "a site's state, kB": len(site.save().setup) / 1e3,
        }  # fmt: skip


def _one_stream(length: int) -> None:
    vector = np.zeros(length, np.uint32)
    for _ in range(100):
        add_masks(vector, [bytes(32)], [])


def _cpu(action: Callable[[], object]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started
