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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft_client.entry import spent
from fedgraft_client.runtime import Runtime
from fedgraft_client.site import Site, SiteConfig
from fedgraft_client.store import SiteStore
from fedgraft_common.accounting import epsilon
from fedgraft_common.mechanism import StepNoise
from fedgraft_common.messages import ADAPTER, Tensors, from_record
from fedgraft_common.plan import Plan
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
from fedgraft_simulations.audit.rehearsal import Rehearsal
from fedgraft_simulations.partition import Share, partition

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
            contributed there; for HEAD canaries, the same of the head's part, which stays at home.
        drawn: every batch.
        honest: (h,) the sites whose sums the `worst` observer sees.
        steps: what each site's steps use.
        claimed: the largest epsilon that a site's ledger was charged; infinite without DP.
        length: C, or 1 without DP.
    """

    plan: Plan
    canaries: Canaries
    seen: NDArray[np.float32]
    drawn: tuple[Drawn, ...]
    honest: NDArray[np.int64]
    steps: tuple[StepNoise, ...]
    claimed: float
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
            sites = self.honest if observer == "worst" else np.arange(self.seen.shape[1])
            summed = self.seen[:, sites].sum(axis=1, dtype=np.float64)
            own = np.where(self.canaries.kind == HEAD, own, summed)
        return own / self.length


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
    shares = partition(plan)
    bench = runtime.workbench(plan)
    random = context.random("trial", repetition)
    honest = np.arange(len(shares))
    if plan.privacy.mechanism == "distributed":
        honest = np.sort(random.permutation(len(shares))[: plan.noise_shares])
    adapter = sum(parameter.numel() for parameter in bench.adapted.adapter.values())
    heads = _head_sizes(plan, shares, bench.adapted.feature_dim)
    canaries = draw_canaries(adapter, heads, honest, random)
    length = plan.privacy.clipping_norm if plan.privacy.mechanism != "none" else 1.0
    probe = Probe(canaries, length, plan.rounds.count, len(shares))

    def site(number: int) -> Site:
        share = shares[number]
        store = SiteStore(directory / "sites" / share.name, durable=False, unit=plan.privacy.unit)
        config = SiteConfig(share.name, share.classes, share.train.unit_count, simulated=True)
        found = ProbedSite(config, share.train, runtime, store, held_out=share.test)
        found.probe, found.place = probe, number
        return found

    run = Rehearsal.run(plan, directory, site, on_round=on_round)
    plan = run.plan
    charged = [spent(s.store.ledger.entries(), plan.hash) for s in run.sites]
    claims = [epsilon(events, plan.privacy.delta) if events else np.inf for events in charged]
    return Trial(
        plan=plan,
        canaries=canaries,
        seen=_sent(run, canaries, probe) - probe.others,
        drawn=tuple(sorted(probe.drawn, key=lambda batch: (batch.round, batch.site))),
        honest=honest,
        steps=tuple(s.step(plan) for s in run.sites),
        claimed=float(max(claims)),
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
    coordinate = [random.permutation(adapter)[: summed + clipped]]
    kind = [np.repeat([SUMMED, CLIPPED], [summed, clipped])]
    count = min(MOST_HEAD, min(heads[i] for i in honest))
    coordinate.append(adapter + random.permutation(min(heads[i] for i in honest))[:count])
    kind.append(np.full(count, HEAD))
    kinds = np.concatenate(kind)
    order = np.empty(len(kinds), dtype=np.int64)  # every site gets its share of each kind
    for one in (SUMMED, CLIPPED, HEAD):
        places = np.flatnonzero(kinds == one)
        order[places] = honest[random.permutation(len(places)) % len(honest)]
    return Canaries(
        np.concatenate(coordinate).astype(np.int64), kinds, order,
        random.random(len(kinds)) < 0.5,
    )  # fmt: skip


def _renamed(context: AuditContext, repetition: int) -> Plan:
    """The same plan under another name: simulated noise is drawn from a plan's hash."""
    key = hashlib.sha256(f"{context.seed} {repetition}".encode()).hexdigest()[:12]
    return context.plan.replace(
        {
            "name": f"{context.plan.name[:40]}-audit-{key}",
            "aggregation.sites": context.plan.sites.count,
        }
    )


def _head_sizes(plan: Plan, shares: list[Share], features: int) -> list[int]:
    if plan.head.training == "fixed":
        return [0] * len(shares)
    return [len(share.classes) * (features + 1) for share in shares]


def _sent(run: Rehearsal, canaries: Canaries, probe: Probe) -> NDArray[np.float32]:
    """(T, S, m) the noisy gradient sums at the canaries' coordinates, from the sites' replies."""
    plan, bench = run.plan, run.sites[0].bench(run.plan)
    names = list(bench.adapted.adapter)
    schema = bench.adapted.schema
    inside = canaries.kind != HEAD
    where = torch.from_numpy(canaries.coordinate[inside])
    sent = probe.head.copy()

    def at(tensors: Tensors) -> NDArray[np.float64]:
        flat = torch.cat([tensors[name].reshape(-1).double() for name in names])
        return flat[where].numpy()

    for exchange in run.exchanges("train"):
        number, site = exchange.round, exchange.site
        values = at(from_record(exchange.reply.content.array_records[ADAPTER], schema))
        if plan.privacy.mechanism != "distributed":  # an adapter was sent: undo the steps' size
            start = at(from_record(exchange.request.content.array_records[ADAPTER], schema))
            rate = plan.training.learning_rate * plan.step_scale(number)
            values = (start - values) * plan.training.expected_batch / rate
        sent[number - 1, site, inside] = values
    return sent
