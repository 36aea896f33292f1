"""`fedgraft simulate`: one plan on one machine, beside the alternatives a site has.

Every federated row runs the production ClientApp and ServerApp over a grid; the rows differ in
`privacy.mechanism` only. What a row is worth is measured at each site on held-out records, with
the head as the federation left it and after the sealed refit.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from fedgraft_client.app import client_app
from fedgraft_client.head import LinearHead
from fedgraft_client.prefix import Cached
from fedgraft_client.refit import refit_head
from fedgraft_client.runtime import Workbench
from fedgraft_client.site import Site
from fedgraft_common.errors import CheckpointError, MessageError
from fedgraft_common.files import write_atomically
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Mechanism, Plan
from fedgraft_server.federation import RoundSummary, server_app
from fedgraft_simulations.alone import ALONE_STIFFNESS, train_alone
from fedgraft_simulations.comparison import Comparison, Point, Row, SiteFacts, Tensor
from fedgraft_simulations.local_grid import LocalGrid, local_context
from fedgraft_simulations.partition import Share
from fedgraft_simulations.sites import SimulatedSites

Engine = Literal["local", "flower"]
TITLES: dict[str, str] = {
    "alone-head": "alone, head only",
    "alone-adapter": "alone, adapter + head",
    "local": "federated, local mechanism",
    "distributed": "federated, distributed mechanism",
    "none": "federated, no DP",
}
CURVE_POINTS = 12


class Progress(Protocol):
    """Told what is going on; the command line draws it."""

    def start(self, title: str, rounds: int) -> None:
        """A row begins."""

    def round(self, number: int, epsilon: float, accuracy: float | None) -> None:
        """A round of it is finished."""


class Silent:
    """No progress."""

    def start(self, title: str, rounds: int) -> None:
        """Nothing."""

    def round(self, number: int, epsilon: float, accuracy: float | None) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A simulated site and what it is measured on."""

    site: Site
    share: Share
    test: Cached


def simulate(
    plan: Plan,
    directory: Path,
    rows: tuple[str, ...] = tuple(TITLES),
    engine: Engine = "local",
    device: str = "auto",
    progress: Progress | None = None,
    site_directory: Path | None = None,
    curve_points: int = CURVE_POINTS,
) -> Comparison:
    """Runs a plan and its alternatives.

    Args:
        plan: `aggregation.sites` is taken from `sites.count`.
        directory: stores, checkpoints and adapters; a run that was cut short is resumed from it.
        rows: which rows of the table to run, from `TITLES`.
        engine: what carries the messages.
        device: where sites train.
        progress: told about each round.
        site_directory: where the sites' stores lie; by default in `directory`. Plans that differ
            in privacy and training only may share it, and with it the sites' warm caches.
        curve_points: rounds after which a federated row is measured on its way; the first and the
            last are added if there are any.

    Raises:
        FedgraftError: the plan, the data or the backbone is wrong, or a round failed.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    started = time.perf_counter()
    plan = plan.replace({"aggregation.sites": plan.sites.count})
    _refuse_other_data(plan, directory / "data.json")
    sites = SimulatedSites(plan, site_directory or directory / "sites", device)
    measured = _measured(sites, plan)
    run = _Run(plan, directory, sites, measured, engine, progress or Silent(), curve_points)
    for key in rows:  # refuse a row that cannot run before the first one runs
        if not key.startswith("alone"):
            for m in measured:
                m.site.step(variant(plan, key))  # type: ignore[arg-type]
    table = tuple(run.row(key) for key in rows)
    bench = measured[0].site.runtime.workbench(plan)
    return Comparison(
        plan=plan,
        sites=tuple(_facts(m, plan) for m in measured),
        rows=table,
        sent=tuple(Tensor(s.name, s.shape, s.dtype, s.bytes) for s in bench.adapted.schema),
        notes=_notes(plan, bench, engine),
        seconds=time.perf_counter() - started,
    )


def _refuse_other_data(plan: Plan, file: Path) -> None:
    """A plan's hash leaves the simulation's tables out: files under it do not tell them apart."""
    tables = plan.model_dump_json(include={"data", "sites"})
    if file.exists() and file.read_text(encoding="utf-8") != tables:
        raise CheckpointError(
            str(file), "other data or sites", "those of the run in this directory",
            "Choose another --out, or delete this one.",
        )  # fmt: skip
    write_atomically(file, tables.encode(), durable=False)


def _measured(sites: SimulatedSites, plan: Plan) -> list[Measured]:
    found = []
    for site, share in zip(sites.all(), sites.shares(), strict=True):
        found.append(Measured(site, share, site.cached_held_out(site.runtime.workbench(plan))))
    return found


class _Run:
    """One comparison under way."""

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        sites: SimulatedSites,
        measured: list[Measured],
        engine: Engine,
        progress: Progress,
        curve_points: int,
    ) -> None:
        self.plan = plan
        self.directory = directory
        self.sites = sites
        self.measured = measured
        self.engine = engine
        self.progress = progress
        self.curve_points = curve_points

    def row(self, key: str) -> Row:
        """Runs and measures one row of the table."""
        started = time.perf_counter()
        if key == "alone-head":
            row = self._alone(key, adapt=False)
        elif key == "alone-adapter":
            row = self._alone(key, adapt=True)
        else:
            row = self._federated(key)  # type: ignore[arg-type]
        return Row(
            row.key, row.title, row.epsilon, row.refit, row.trained, row.curve,
            row.bytes_per_round, time.perf_counter() - started,
        )  # fmt: skip

    def _alone(self, key: str, adapt: bool) -> Row:
        self.progress.start(TITLES[key], len(self.measured))
        scores = []
        for number, m in enumerate(self.measured, start=1):
            bench = m.site.runtime.workbench(self.plan)
            adapter = train_alone(m.site, self.plan) if adapt else bench.initial
            head = refit(m.site, bench, adapter)
            scores.append(accuracy(bench, adapter, head, m.test, m.share.test.labels))
            self.progress.round(number, 0.0, sum(scores) / len(scores))
        return Row(key, TITLES[key], 0.0, tuple(scores))

    def _federated(self, mechanism: Mechanism) -> Row:
        plan = variant(self.plan, mechanism)
        self.progress.start(TITLES[mechanism], plan.rounds.count)
        steps = [m.site.step(plan) for m in self.measured]  # calibrates, and refuses, up front
        worst = max(steps, key=lambda s: s.epsilon(plan.privacy.delta))
        stops = _curve_rounds(plan.rounds.count, self.curve_points)
        server = self.directory / mechanism
        curve = _load_curve(server / "curve.json")

        def on_round(summary: RoundSummary) -> None:
            if summary.number not in stops:
                self.progress.round(summary.number, float("nan"), None)
                return
            spent = worst.epsilon(plan.privacy.delta, summary.number * plan.training.local_steps)
            scores = self._trained_scores(plan, summary.adapter)
            curve.append(Point(summary.number, sum(scores) / len(scores), spent))
            document = json.dumps([asdict(point) for point in curve])
            write_atomically(server / "curve.json", document.encode(), durable=False)
            self.progress.round(summary.number, spent, curve[-1].accuracy)

        adapter = self._carry(plan, server, on_round)
        trained = self._trained_scores(plan, adapter)
        refitted = []
        for m in self.measured:
            head = m.site.refit(plan, adapter)
            bench = m.site.runtime.workbench(plan)
            refitted.append(accuracy(bench, adapter, head, m.test, m.share.test.labels))
        epsilon = worst.epsilon(plan.privacy.delta)
        schema = self.measured[0].site.runtime.workbench(plan).adapted.schema
        size = sum(spec.bytes for spec in schema)
        return Row(
            mechanism, TITLES[mechanism], epsilon, tuple(refitted), tuple(trained),
            tuple(curve), size,
        )  # fmt: skip

    def _carry(
        self, plan: Plan, directory: Path, on_round: Callable[[RoundSummary], None]
    ) -> Tensors:
        """Runs the federation over the chosen grid."""
        final: list[Tensors] = []

        def note(summary: RoundSummary) -> None:
            final[:] = [summary.adapter]
            on_round(summary)

        server = server_app(plan, directory, note, durable=False)
        app = client_app(self.sites)
        if self.engine == "flower":
            from fedgraft_simulations.ray_engine import run_on_ray

            run_on_ray(server, app, plan.sites.count)
        else:
            try:
                server(LocalGrid(app, plan.sites.count), local_context(0, 1))
            except MessageError as error:
                raise self._cause(error) from None
        if not final:  # resumed after its last round
            from fedgraft_server.checkpoint import newest_checkpoint

            checkpoint = newest_checkpoint(directory, plan)
            assert checkpoint is not None  # noqa: S101 - that is why no round was left
            return checkpoint.adapter
        return final[0]

    def _cause(self, error: MessageError) -> Exception:
        """In a simulation the researcher owns the sites, so the site's own reason is shown."""
        own = (m.site.last_error for m in self.measured)
        return next((reason for reason in own if reason is not None), error)

    def _trained_scores(self, plan: Plan, adapter: Tensors) -> list[float]:
        """Accuracy per site with the head that the federation left there."""
        bench = self.measured[0].site.runtime.workbench(plan)
        sizes = [len(m.share.test) for m in self.measured]
        everything = tuple(
            torch.cat(parts) for parts in zip(*(m.test for m in self.measured), strict=True)
        )
        features = bench.features(adapter, everything).split(sizes)
        return [
            correct_share(m.site.trained_head(plan), f, m.share.test.labels)
            for m, f in zip(self.measured, features, strict=True)
        ]


def variant(plan: Plan, mechanism: Mechanism) -> Plan:
    """The plan with another mechanism, and what `[comparison]` says that one needs."""
    if mechanism == plan.privacy.mechanism:
        return plan
    changes = getattr(plan.comparison, mechanism)
    return plan.replace({"privacy.mechanism": mechanism, **changes})


def refit(site: Site, bench: Workbench, adapter: Tensors) -> LinearHead:
    """A head fitted from nothing, for a site that stays alone."""
    features = bench.features(adapter, site.cached(bench))
    zeros = LinearHead(bench.adapted.feature_dim, len(site.config.classes))
    return refit_head(features, site.records.labels, zeros, ALONE_STIFFNESS)


def accuracy(
    bench: Workbench, adapter: Tensors, head: LinearHead, cached: Cached, labels: torch.Tensor
) -> float:
    """Share of records classified correctly."""
    return correct_share(head, bench.features(adapter, cached), labels)


def correct_share(head: LinearHead, features: torch.Tensor, labels: torch.Tensor) -> float:
    """scikit-learn's accuracy of a head on features (N, D)."""
    from sklearn.metrics import accuracy_score

    with torch.no_grad():
        found = head.cpu()(features).argmax(dim=1)
    return float(accuracy_score(labels.numpy(), found.numpy()))


def _curve_rounds(count: int, points: int) -> set[int]:
    ends = {1, count} if points else set()
    return {max(1, round(count * i / points)) for i in range(1, points + 1)} | ends


def _load_curve(file: Path) -> list[Point]:
    """Points of a run that was cut short; without DP an epsilon is Infinity in the file."""
    if not file.exists():
        return []
    return [Point(**point) for point in json.loads(file.read_text(encoding="utf-8"))]


def _facts(measured: Measured, plan: Plan) -> SiteFacts:
    step = measured.site.step(plan)
    return SiteFacts(
        name=measured.share.name,
        train=len(measured.share.train),
        test=len(measured.share.test),
        classes=measured.share.classes,
        sample_rate=step.sample_rate,
        noise_multiplier=step.event.noise_multiplier if step.event else 0.0,
        epsilon=step.epsilon(plan.privacy.delta),
    )


def _notes(plan: Plan, bench: Workbench, engine: Engine) -> tuple[str, ...]:
    notes = [
        "Noise and sampling came from the plan's seed, so that the run can be repeated: the "
        "simulation itself protects nobody. A site daemon draws from the operating system.",
    ]
    if plan.privacy.mechanism == "distributed":
        notes.append(
            "The simulation summed the sites' updates in place. The promise of the distributed "
            "mechanism holds where secure aggregation hides each summand; no cryptography ran here."
        )
    for verdict in bench.verdicts:
        outcome = f"exact (error {verdict.error:.0e})" if verdict.exact else "not exact, not used"
        notes.append(
            f"Per-example gradients by {verdict.engine}, against single records: {outcome}."
        )
    notes.append(
        f"The frozen part before {bench.prefix.door} was computed once per record."
        if bench.prefix.reason is None
        else f"Nothing was cached: {bench.prefix.reason}."
    )
    notes.append(
        "Messages were function calls in one process."
        if engine == "local"
        else "Messages went through Flower's simulation runtime on Ray."
    )
    return tuple(notes)
