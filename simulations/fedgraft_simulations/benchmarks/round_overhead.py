"""What a round costs when nobody computes: in-process messages against Flower's Ray engine.

Both engines carry the same messages between the same ClientApp and the same ServerApp, which is
Fedgraft's own server loop with aggregation and checkpoints. A site reads the request, checks the
adapter against its schema and sends it back.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedgraft_common.adapted import adapted_backbone
from fedgraft_common.messages import (
    Status,
    Tensors,
    TensorSpec,
    from_record,
    read_request,
    to_record,
    write_reply,
)
from fedgraft_common.plan import Plan, load_plan
from fedgraft_server.federation import RoundSummary, server_app
from fedgraft_simulations.benchmarks.glyph_vit import glyph_vit
from fedgraft_simulations.benchmarks.measure import Ratio, Report, Way, alternate
from fedgraft_simulations.cli import PLANS
from fedgraft_simulations.local_grid import LocalGrid, local_context
from fedgraft_simulations.ray_engine import run_on_ray

TARGET = 40.0
Carry = Callable[[ServerApp, ClientApp, int], None]


def measure(repetitions: int = 3, sites: int = 10, rounds: int = 5) -> Report:
    """Runs both engines in turn, with the demo's adapter and with a large one."""
    ratios, figures = [], {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        job = {"privacy.mechanism": "none", "rounds.count": rounds, "sites.count": sites}
        demo = load_plan(PLANS / "digits.toml").replace(job)
        large = Plan().replace(
            job
            | {
                "backbone.source": f"dir:{glyph_vit(directory, steps=0)}",
                "adapter.method": "lora",
                "adapter.layers": "last:10",  # 276,480 float32 values in 120 tensors
            }
        )
        for plan in (demo, large):
            state = adapted_backbone(plan).state()
            size = sum(t.nbytes for t in state.values())
            what = f"{size / 1e3:,.0f} kB in {len(state)} tensors"
            local = Engine("in-process", plan, directory, in_process)
            ray = Engine("Flower on Ray", plan, directory, run_on_ray)
            alternate([local.run, ray.run], repetitions)
            ratios += [
                Ratio(f"job, {what}", ray.way(ray.total), local.way(local.total), TARGET),
                Ratio(f"later rounds, {what}", ray.way(ray.later), local.way(local.later)),
            ]
            each = rounds - 1
            figures[f"a later round in-process, {what}, s"] = local.way(local.later).median / each
            figures[f"a later round on Ray, {what}, s"] = ray.way(ray.later).median / each
    return Report(
        "round_overhead",
        f"{sites} sites x {rounds} rounds without compute",
        ratios=tuple(ratios),
        figures=figures,
        notes=(
            "A job is timed from call to return, which includes starting and ending Ray: every "
            "run pays for it. Later rounds leave start-up, the first round (in which the actors "
            "import their modules) and shut-down out.",
        ),
    )


class Engine:
    """One engine and its times.

    Attributes:
        total: seconds of each whole job.
        later: seconds from the end of the first round to the end of the last.
        adapter: the final adapter.
    """

    def __init__(self, name: str, plan: Plan, directory: Path, carry: Carry) -> None:
        self.name = name
        self.plan = plan
        self.directory = directory
        self.carry = carry
        self.total: list[float] = []
        self.later: list[float] = []
        self.adapter: Tensors = {}

    def run(self) -> float:
        """One job."""
        finished: list[float] = []

        def note(summary: RoundSummary) -> None:
            finished.append(time.perf_counter())
            self.adapter = summary.adapter

        with tempfile.TemporaryDirectory(dir=self.directory) as name:
            server = server_app(self.plan, Path(name), note, durable=False)
            started = time.perf_counter()
            self.carry(server, echo_app(), self.plan.sites.count)
            self.total.append(time.perf_counter() - started)
        self.later.append(finished[-1] - finished[0])
        return self.total[-1]

    def way(self, seconds: list[float]) -> Way:
        """For the report."""
        return Way(self.name, tuple(seconds))


def in_process(server: ServerApp, app: ClientApp, sites: int) -> None:
    """Carries messages without Ray."""
    server(LocalGrid(app, sites), local_context(0, 1))


def echo_app() -> ClientApp:
    """A site that follows the protocol and does nothing else."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        request = read_request(message)
        schema = tuple(TensorSpec(n, a.shape) for n, a in request.adapter.items())
        adapter = from_record(request.adapter, schema)
        return write_reply(message, request.round, Status.OK, to_record(adapter))

    @app.query()
    def keep_final(message: Message, context: Context) -> Message:
        return write_reply(message, read_request(message).round, Status.KEPT)

    return app
