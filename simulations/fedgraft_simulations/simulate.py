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
from fedgraft_client.tasks import Task
from fedgraft_client.tasks.alignment import aligned
from fedgraft_common.errors import CheckpointError, MessageError
from fedgraft_common.files import write_atomically
from fedgraft_common.messages import Tensors, TensorSpec
from fedgraft_common.plan import Mechanism, Plan
from fedgraft_common.secure_terms import masked_schema
from fedgraft_server.federation import RoundSummary, server_app
from fedgraft_simulations.alone import fit_alone, train_alone
from fedgraft_simulations.centre import Centre, pooled
from fedgraft_simulations.comparison import Comparison, Point, Row, SiteFacts, Tensor, mean
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
    "central": "pooled, DP",
    "central-none": "pooled, no DP",
}
DEFAULT_ROWS = ("alone-head", "alone-adapter", "local", "distributed", "none")
"""The last two rows pool all records in one place: upper bounds, which no federation has."""
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
    """A simulated site and what it is measured on.

    Attributes:
        site: trains.
        share: its records.
        bench: its model, shared by all sites whose heads take the same features.
        test: what the prefix keeps of the test records; the same object at every site that is
            measured on the same records.
        labels: of the test records.
    """

    site: Site
    share: Share
    bench: Workbench
    test: Cached
    labels: torch.Tensor


def simulate(
    plan: Plan,
    directory: Path,
    rows: tuple[str, ...] = DEFAULT_ROWS,
    engine: Engine = "local",
    device: str = "auto",
    progress: Progress | None = None,
) -> Comparison:
    """Runs a plan and its alternatives.

    Args:
        plan: `aggregation.sites` is taken from `sites.count`.
        directory: stores, checkpoints and adapters; a run that was cut short is resumed from it.
        rows: which rows of the table to run, from `TITLES`.
        engine: what carries the messages.
        device: where sites train.
        progress: told about each round.

    Raises:
        FedgraftError: the plan, the data or the backbone is wrong, or a round failed.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    started = time.perf_counter()
    plan = plan.replace({"aggregation.sites": plan.sites.count})
    _refuse_other_data(plan, directory / "data.json")
    sites = SimulatedSites(plan, directory / "sites", device)
    measured = measured_sites(sites, plan)
    run = _Run(plan, directory, sites, measured, engine, device, progress or Silent())
    for key in rows:  # refuse a row that cannot run before the first one runs
        if key.startswith("central"):
            run.centre(key)
        elif not key.startswith("alone"):
            for m in measured:
                m.site.step(variant(plan, key))  # type: ignore[arg-type]
    table = tuple(run.row(key) for key in rows)
    bench = measured[0].bench
    return Comparison(
        plan=plan,
        sites=tuple(_facts(m, plan) for m in measured),
        rows=table,
        sent=tuple(Tensor(s.name, s.shape, s.dtype, s.bytes) for s in _sent(plan, bench)),
        notes=_notes(plan, bench, engine),
        seconds=time.perf_counter() - started,
        score=run.score,
    )


def _sent(plan: Plan, bench: Workbench) -> tuple[TensorSpec, ...]:
    """The tensors that a site sends in a round."""
    schema = bench.adapted.schema
    return masked_schema(schema, bench.fixed_point(plan).bits) if plan.secure else schema


def _refuse_other_data(plan: Plan, file: Path) -> None:
    """A plan's hash leaves the simulation's tables out: files under it do not tell them apart."""
    tables = plan.model_dump_json(include={"data", "sites"})
    if file.exists() and file.read_text(encoding="utf-8") != tables:
        raise CheckpointError(
            str(file), "other data or sites", "those of the run in this directory",
            "Choose another --out, or delete this one.",
        )  # fmt: skip
    write_atomically(file, tables.encode(), durable=False)


def measured_sites(sites: SimulatedSites, plan: Plan) -> list[Measured]:
    """The sites of a plan with what each is measured on; a test set they share is kept once."""
    caches: dict[tuple[int, int], Cached] = {}  # a test set that all sites share is cached once
    found = []
    for site, share in zip(sites.all(), sites.shares(), strict=True):
        bench = site.bench(plan)
        key = id(bench), id(share.test.inputs)
        if key not in caches:
            caches[key] = bench.cache(share.test.inputs)
        labels = aligned(site.task(plan), share.test, bench.adapted.backbone)
        found.append(Measured(site, share, bench, caches[key], labels))
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
        device: str,
        progress: Progress,
    ) -> None:
        self.device = device
        self._centres: dict[str, Centre] = {}
        self._names: set[str] = set()
        self.plan = plan
        self.directory = directory
        self.sites = sites
        self.measured = measured
        self.engine = engine
        self.progress = progress

    def row(self, key: str) -> Row:
        """Runs and measures one row of the table."""
        started = time.perf_counter()
        if key == "alone-head":
            row = self._alone(key, adapt=False)
        elif key == "alone-adapter":
            row = self._alone(key, adapt=True)
        elif key.startswith("central"):
            row = self._central(key)
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
            adapter = train_alone(m.site, self.plan) if adapt else m.bench.initial
            head = fit_alone(m.site, self.plan, adapter)
            scores.append(self._score(m, head, m.bench.features(adapter, m.test)))
            self.progress.round(number, 0.0, mean(scores))
        return Row(key, TITLES[key], 0.0, tuple(scores))

    @property
    def score(self) -> str:
        """Which score the rows compare: one for all sites, or each task's own."""
        return next(iter(self._names)) if len(self._names) == 1 else "score"

    def centre(self, key: str) -> Centre:
        """One place that holds every site's records, and the plan it trains under."""
        if key not in self._centres:
            shares = [m.share for m in self.measured]
            self._centres[key] = pooled(self.plan, key, shares, self.directory, self.device)
        return self._centres[key]

    def _central(self, key: str) -> Row:
        centre = self.centre(key)
        plan, site = centre.plan, centre.site
        self.progress.start(TITLES[key], plan.rounds.count)

        def on_round(summary: RoundSummary) -> None:
            self.progress.round(summary.number, float("nan"), None)

        adapter = self._carry(plan, self.directory / key, on_round, centre)
        head = site.trained_head(plan)
        features = self._test_features(adapter)
        trained = [self._score(m, head, features[id(m.test)]) for m in self.measured]
        refitted = []
        for m in self.measured:
            own = m.bench.features(adapter, m.site.cached(m.bench))
            fitted = refit_head(own, m.site.labels(m.bench), head)
            refitted.append(self._score(m, fitted, features[id(m.test)]))
        epsilon = site.step(plan).epsilon(plan.privacy.delta)
        return Row(key, TITLES[key], epsilon, tuple(refitted), tuple(trained))

    def _federated(self, mechanism: Mechanism) -> Row:
        plan = variant(self.plan, mechanism)
        self.progress.start(TITLES[mechanism], plan.rounds.count)
        steps = [m.site.step(plan) for m in self.measured]  # calibrates, and refuses, up front
        worst = max(steps, key=lambda s: s.epsilon(plan.privacy.delta))
        stops = _curve_rounds(plan.rounds.count)
        server = self.directory / mechanism
        curve = _load_curve(server / "curve.json")

        def on_round(summary: RoundSummary) -> None:
            if summary.number not in stops:
                self.progress.round(summary.number, float("nan"), None)
                return
            spent = worst.epsilon(plan.privacy.delta, summary.number * plan.training.local_steps)
            scores = self._trained_scores(plan, summary.adapter)
            curve.append(Point(summary.number, mean(scores), spent))
            document = json.dumps([asdict(point) for point in curve])
            write_atomically(server / "curve.json", document.encode(), durable=False)
            self.progress.round(summary.number, spent, curve[-1].accuracy)

        adapter = self._carry(plan, server, on_round)
        trained = self._trained_scores(plan, adapter)
        features = self._test_features(adapter)
        refitted = [
            self._score(m, m.site.refit(plan, adapter), features[id(m.test)]) for m in self.measured
        ]
        epsilon = worst.epsilon(plan.privacy.delta)
        size = sum(s.bytes for s in _sent(plan, self.measured[0].bench))
        return Row(
            mechanism, TITLES[mechanism], epsilon, tuple(refitted), tuple(trained),
            tuple(curve), size,
        )  # fmt: skip

    def _carry(
        self,
        plan: Plan,
        directory: Path,
        on_round: Callable[[RoundSummary], None],
        centre: Centre | None = None,
    ) -> Tensors:
        """Runs the federation over the chosen grid, or one place that has all records."""
        final: list[Tensors] = []

        def note(summary: RoundSummary) -> None:
            final[:] = [summary.adapter]
            on_round(summary)

        server = server_app(plan, directory, note, durable=False, trust=self.sites.trust)
        app = client_app(centre or self.sites)
        if self.engine == "flower" and centre is None:
            from fedgraft_simulations.ray_engine import run_on_ray

            run_on_ray(server, app, plan.sites.count)
        else:
            try:
                count = 1 if centre else plan.sites.count
                server(LocalGrid(app, count), local_context(0, 1))
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
        """The score at each site with the head that the federation left there."""
        features = self._test_features(adapter)
        return [
            self._score(m, m.site.trained_head(plan), features[id(m.test)]) for m in self.measured
        ]

    def _test_features(self, adapter: Tensors) -> dict[int, torch.Tensor]:
        """Features of every test set under an adapter, by the identity of what is cached of it."""
        found: dict[int, torch.Tensor] = {}
        for bench in {id(m.bench): m.bench for m in self.measured}.values():
            own = {id(m.test): m.test for m in self.measured if m.bench is bench}
            together = tuple(torch.cat(parts) for parts in zip(*own.values(), strict=True))
            sizes = [len(test[0]) for test in own.values()]
            parts = bench.features(adapter, together).split(sizes)
            found |= dict(zip(own, parts, strict=True))
        return found

    def _score(self, m: Measured, head: LinearHead, features: torch.Tensor) -> float:
        """The score that the table compares, on a site's test records."""
        with torch.no_grad():
            outputs = head.cpu()(features)
        name, found = score_of(head.task, outputs, m.labels, self.plan.data.score)
        self._names.add(name)
        return found


def score_of(
    task: Task, outputs: torch.Tensor, labels: torch.Tensor, wanted: str
) -> tuple[str, float]:
    """Name and value of the score that is wanted, or of the task's own if it has no such one."""
    scores = task.scores(outputs, labels)
    name = wanted if wanted in scores else task.primary
    return name, scores[name]


def variant(plan: Plan, mechanism: Mechanism) -> Plan:
    """The plan with another mechanism, and what `[comparison]` says that one needs."""
    if mechanism == plan.privacy.mechanism:
        return plan
    changes = getattr(plan.comparison, mechanism)
    return plan.replace({"privacy.mechanism": mechanism, **changes})


def _curve_rounds(count: int) -> set[int]:
    return {max(1, round(count * i / CURVE_POINTS)) for i in range(1, CURVE_POINTS + 1)} | {
        1,
        count,
    }


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
    if plan.secure:
        notes.append(
            "The sites' sums were encoded, masked and added by the secure aggregation that a "
            "federation uses, over all its messages, with throwaway keys."
        )
    elif plan.privacy.mechanism == "distributed":
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
