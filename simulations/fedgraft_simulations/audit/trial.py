"""One federated run of a plan with canaries in it, and what an attacker sees of them.

What is seen is what left the sites: the bytes of their replies. From it is taken what the strongest
attacker that differential privacy knows of knows besides: everything about everyone but the canary.
What is left is noise, and the canary if it was there.

Observers (PRIVACY.md, "Two mechanisms"):

    single   sees a site's own replies: the server, with the local mechanism or without DP
    server   sees sums over all sites: the server, with the distributed mechanism
    worst    the same, but the tolerated colluders tell it what they sent and the tolerated
             dropouts send nothing: a sum over h sites, no more noise than was promised

Shapes: T rounds, S sites, m canaries.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fedgraft_client.entry import Entry, Kind, charges, spent
from fedgraft_client.runtime import Runtime, Workbench
from fedgraft_common.accounting import epsilon
from fedgraft_common.mechanism import StepNoise
from fedgraft_common.messages import ADAPTER, COUNTS, EVALUATE, from_record, read_counts
from fedgraft_common.plan import Plan
from fedgraft_common.secure_terms import to_vector
from fedgraft_simulations.audit.part import AuditContext
from fedgraft_simulations.audit.probe import (
    CLIPPED,
    HEAD,
    SUMMED,
    Canaries,
    Drawn,
    Probe,
    ProbedSite,
)
from fedgraft_simulations.audit.rehearsal import Rehearsal, site_of

Observer = Literal["single", "server", "worst"]
MOST_SUMMED, MOST_CLIPPED, MOST_HEAD = 2000, 600, 600
CLIPPED_SHARE = 0.3
"""Of an adapter with few coordinates, this share is for canaries that go through clipping."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A finished run with canaries.

    Attributes:
        plan: what ran.
        canaries: m of them.
        seen: (T, S, m) float32, what each site sent at a canary's coordinate, less what all others
            contributed there; under secure aggregation, before it was masked. For HEAD canaries,
            the same of the head's part, which stays at home.
        opened: (T, m) under secure aggregation, what the server read of the sum of all sites, less
            what all others contributed; else the sum of `seen`.
        drawn: every batch.
        honest: (h,) the sites whose sums the `worst` observer sees.
        steps: what each site's steps use.
        adapter_std: (S,) promised standard deviation of a site's own noise in one message.
        claimed: the largest epsilon that a site's ledger was charged; infinite without DP.
        charged: (S,) training steps that each site's ledger was charged for; 0 without DP.
        counts: (E, 2 S) noise of each of E released evaluations in units of the promised standard
            deviation: what left, less what was counted; E is 0 without evaluations.
        length: C, or 1 without DP.
    """

    plan: Plan
    canaries: Canaries
    seen: NDArray[np.float32]
    opened: NDArray[np.float64]
    drawn: tuple[Drawn, ...]
    honest: NDArray[np.int64]
    steps: tuple[StepNoise, ...]
    adapter_std: NDArray[np.float64]
    claimed: float
    charged: tuple[int, ...]
    counts: NDArray[np.float64]
    length: float

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Who the promise holds against; the strongest is last."""
        if self.plan.privacy.mechanism != "distributed":
            return ("single",)
        return ("server",) if len(self.honest) == self.seen.shape[1] else ("server", "worst")

    def views(self, observer: Observer) -> NDArray[np.float64]:
        """(T, m) what an observer sees of each canary, in units of C.

        The head's part is seen by nobody outside; the accountant assumes that it might be.
        """
        own = self.seen[:, self.canaries.site, np.arange(len(self.canaries))].astype(np.float64)
        if observer != "single":
            known = np.setdiff1d(np.arange(self.seen.shape[1]), self.honest)
            summed = self.opened
            if observer == "worst":  # colluders tell what they sent, dropouts send nothing
                summed = summed - self.seen[:, known].sum(axis=1, dtype=np.float64)
            own = np.where(self.canaries.kind == HEAD, own, summed)
        return own / self.length

    @property
    def opening_error(self) -> float:
        """How far what the server read is from the sum of what sites sent, at most."""
        inside = self.canaries.kind != HEAD
        summed = self.seen[:, :, inside].sum(axis=1, dtype=np.float64)
        return float(np.abs(self.opened[:, inside] - summed).max()) if inside.any() else 0.0


def run_trial(
    context: AuditContext,
    directory: Path,
    repetition: int,
    on_round: Callable[[int], None] = lambda _: None,
    runtime: Runtime | None = None,
) -> Trial:
    """Runs the plan with canaries at its sites.

    Args:
        context: plan and the auditor's randomness.
        directory: for the run's files; empty.
        repetition: from 0; each has other canaries and other noise.
        on_round: told the number of each finished round.
        runtime: device and warm models, shared by repetitions.
    """
    plan = _renamed(context, repetition)
    runtime = runtime or Runtime(context.device)
    random = context.random("trial", repetition)
    count = plan.sites.count
    sites = [site_of(plan, directory, i, runtime, kind=ProbedSite) for i in range(count)]
    honest = np.arange(count)
    if plan.privacy.mechanism == "distributed":
        honest = np.sort(random.permutation(count)[: plan.noise_shares])
    bench = sites[0].bench(plan)
    adapter = sum(parameter.numel() for parameter in bench.adapted.adapter.values())
    heads = [sum(p.numel() for p in s.start_head(plan).parameters() if p.requires_grad)
             for s in sites]  # fmt: skip
    canaries = draw_canaries(adapter, heads, honest, random)
    length = plan.privacy.clipping_norm if plan.privacy.mechanism != "none" else 1.0
    probe = Probe(canaries, length, plan.rounds.count, count, _places(bench, canaries))
    for number, site in enumerate(sites):
        site.probe, site.place = probe, number
    with probe.opening():
        run = Rehearsal.run(plan, directory, lambda i: sites[i], on_round=on_round)
    plan = run.plan
    ledgers = [s.store.ledger.entries() for s in run.sites]
    spendings = [spent(entries, plan.hash) for entries in ledgers]
    claims = [epsilon(events, plan.privacy.delta) if events else np.inf for events in spendings]
    steps = tuple(s.step(plan) for s in run.sites)
    seen = np.where(canaries.kind == HEAD, probe.head, _sent(run, canaries, probe)) - probe.others
    opened = seen.sum(axis=1, dtype=np.float64)
    std = np.array([s.adapter_std * math.sqrt(plan.training.local_steps) for s in steps])
    if plan.secure:
        field = bench.fixed_point(plan)
        opened = np.stack(probe.opened) - probe.others.sum(axis=1, dtype=np.float64)
        std = np.full(count, field.share.std / field.scale)
    return Trial(
        plan=plan,
        canaries=canaries,
        seen=seen,
        opened=opened,
        drawn=tuple(sorted(probe.drawn, key=lambda batch: (batch.round, batch.site))),
        honest=honest,
        steps=steps,
        adapter_std=std,
        claimed=float(max(claims)),
        charged=tuple(_steps_charged(entries) for entries in ledgers),
        counts=_noise_of_counts(run, probe, steps),
        length=length,
    )


def draw_canaries(
    adapter: int, heads: list[int], honest: NDArray[np.int64], random: np.random.Generator
) -> Canaries:
    """Canaries for one run.

    Args:
        adapter: coordinates of the adapter.
        heads: trained coordinates of each site's head.
        honest: the sites that hold canaries.
        random: the auditor's.
    """
    clipped = min(MOST_CLIPPED, int(adapter * CLIPPED_SHARE))
    summed = min(MOST_SUMMED, adapter - clipped)
    head = min(heads[i] for i in honest)
    wanted = {SUMMED: summed, CLIPPED: clipped, HEAD: min(MOST_HEAD, head)}
    coordinates = [
        random.permutation(adapter)[: summed + clipped],
        adapter + random.permutation(head)[: wanted[HEAD]],
    ]
    # every site gets its share of each kind
    sites = [honest[random.permutation(n) % len(honest)] for n in wanted.values()]
    kinds = np.repeat(list(wanted), list(wanted.values()))
    return Canaries(
        np.concatenate(coordinates).astype(np.int64), kinds, np.concatenate(sites),
        random.random(len(kinds)) < 0.5,
    )  # fmt: skip


def _steps_charged(entries: Iterable[Entry]) -> int:
    """Training steps that a ledger of one run was charged for."""
    return sum(
        int(entry.body["steps"])
        for entry in charges(entries)
        if entry.kind is Kind.RESERVE and entry.body["purpose"] == "train"
    )


def _noise_of_counts(
    run: Rehearsal, probe: Probe, steps: Sequence[StepNoise]
) -> NDArray[np.float64]:
    """`Trial.counts`. Sensitivity of the two counts together: see `evaluation.py`."""
    rounds: dict[int, NDArray[np.float64]] = {}
    for exchange in run.exchanges(EVALUATE):
        place = exchange.round, exchange.site
        promised = steps[exchange.site].evaluation
        if promised is None or place not in probe.exact:
            continue
        left = read_counts(exchange.reply.content.metric_records.get(COUNTS))
        exact = probe.exact[place]
        row = rounds.setdefault(exchange.round, np.full((len(steps), 2), np.nan))
        std = promised.noise_multiplier * math.sqrt(2)
        row[exchange.site] = (left.correct - exact.correct, left.total - exact.total)
        row[exchange.site] /= std
    found = [row.reshape(-1) for _, row in sorted(rounds.items()) if np.isfinite(row).all()]
    return np.stack(found) if found else np.zeros((0, 2 * len(steps)))


def _renamed(context: AuditContext, repetition: int) -> Plan:
    """The same plan under another name: simulated noise is drawn from a plan's hash."""
    key = hashlib.sha256(f"{context.seed} {repetition}".encode()).hexdigest()[:12]
    return context.plan.replace(
        {
            "name": f"{context.plan.name[:40]}-audit-{key}",
            "aggregation.sites": context.plan.sites.count,
        }
    )


def _places(bench: Workbench, canaries: Canaries) -> NDArray[np.int64]:
    """Where each adapter canary's coordinate is in a message, whose tensors have another order."""
    begins = np.cumsum([0, *(math.prod(spec.shape) for spec in bench.adapted.schema)])
    begin = {s.name: int(b) for s, b in zip(bench.adapted.schema, begins, strict=False)}
    order = np.concatenate(
        [begin[n] + np.arange(p.numel()) for n, p in bench.adapted.adapter.items()]
    )
    return np.where(
        canaries.kind == HEAD, 0, order[np.minimum(canaries.coordinate, len(order) - 1)]
    )


def _sent(run: Rehearsal, canaries: Canaries, probe: Probe) -> NDArray[np.float32]:
    """(T, S, m) the noisy gradient sums at the canaries' coordinates, from the sites' replies."""
    plan, schema = run.plan, run.sites[0].bench(run.plan).adapted.schema
    if plan.secure:
        return probe.encoded
    sent = np.zeros_like(probe.encoded)
    initial = to_vector(run.sites[0].bench(plan).initial, schema).astype(np.float64)[probe.where]

    def at(record: ArrayRecord) -> NDArray[np.float64]:
        tensors = from_record(record, schema)
        return to_vector(tensors, schema).astype(np.float64)[probe.where]

    for exchange in run.exchanges("train"):
        number = exchange.round
        values = at(exchange.reply.content.array_records[ADAPTER])
        if plan.privacy.mechanism != "distributed":  # an adapter was sent: undo the steps' size
            start = at(exchange.request.content.array_records[ADAPTER])
            rate = plan.training.learning_rate * plan.step_scale(number)
            pull = plan.training.weight_decay * plan.training.local_steps * (start - initial)
            values = ((start - values) / rate - pull) * plan.training.expected_batch
        sent[number - 1, exchange.site] = values
    return sent
