"""The same plan and seed give the same adapters in-process and on Flower's own runtime."""

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedgraft_client.app import client_app
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan
from fedgraft_server.federation import RoundSummary, server_app
from fedgraft_simulations.local_grid import LocalGrid, local_context
from fedgraft_simulations.ray_engine import SiteError, run_on_ray
from fedgraft_simulations.sites import SimulatedSites

pytestmark = [
    # Flower's and Ray's own: sockets and pipes that Ray leaves to the garbage collector, and
    # deprecated calls inside either.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
Carry = Callable[[ServerApp, ClientApp, int], None]


def in_process(server: ServerApp, app: ClientApp, sites: int) -> None:
    server(LocalGrid(app, sites), local_context(0, 1))


def adapters(plans: list[Plan], directory: Path, carry: Carry) -> list[list[Tensors]]:
    """The adapter after each round of each plan; the plans have their sites in common."""
    found: list[list[Tensors]] = [[] for _ in plans]
    sites = SimulatedSites(plans[0], directory / "sites", "cpu")
    together = ServerApp()

    @together.main()
    def main(grid: Grid, context: Context) -> None:
        for plan, adapters in zip(plans, found, strict=True):

            def note(summary: RoundSummary, adapters: list[Tensors] = adapters) -> None:
                adapters.append(summary.adapter)

            folder = directory / plan.hash
            server_app(plan, folder, note, durable=False, trust=sites.trust)(grid, context)

    carry(together, client_app(sites), plans[0].sites.count)
    return found


def test_ray_gives_the_adapters_of_the_local_grid(
    tmp_path: Path, vit_directory: Path, resnet_directory: Path
) -> None:
    common = Plan().replace(
        {
            "rounds.count": 3,
            "rounds.deadline": 240.0,
            "training.sample_rate": 0.1,
            "sites.count": 4,
            "sites.partitioner": "DirichletPartitioner",
            "sites.options": {"alpha": 5.0},
            "aggregation.sites": 4,
        }
    )
    local_mechanism = common.replace(
        {
            "backbone.source": f"dir:{vit_directory}",
            "backbone.pooling": "mean",  # the fixture was saved without a pooler
            "adapter.method": "ffa-lora",
            "privacy.mechanism": "local",
            "head.training": "private",
            "training.local_steps": 2,
        }
    )
    distributed_mechanism = common.replace(
        {
            "backbone.source": f"dir:{resnet_directory}",
            "adapter.method": "film",
            "privacy.mechanism": "distributed",
            "aggregation.strategy": "FedAvgM",
        }
    )
    plans = [local_mechanism, distributed_mechanism]
    here = adapters(plans, tmp_path / "local", in_process)
    there = adapters(plans, tmp_path / "ray", run_on_ray)

    for rounds_here, rounds_there in zip(here, there, strict=True):
        assert len(rounds_here) == 3
        first, last = rounds_here[0], rounds_here[2]
        moved = max(float((last[name] - first[name]).abs().max()) for name in first)
        assert moved > 1e-3, "nothing was trained: the comparison would mean nothing"
        for adapter_here, adapter_there in zip(rounds_here, rounds_there, strict=True):
            for name in adapter_here:
                torch.testing.assert_close(
                    adapter_there[name], adapter_here[name], atol=1e-6, rtol=0
                )


def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


def stumble(message: Message, context: Context) -> Message:
    raise ValueError("the site stumbled")


def app_that(answers: Callable[[Message, Context], Message]) -> ClientApp:
    def train(message: Message, context: Context) -> Message:
        return answers(message, context)

    app = ClientApp()
    app.train()(train)
    return app


def ask_everyone(grid: Grid, context: Context) -> None:
    requests = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    assert len(requests) == 3
    assert len(list(grid.send_and_receive(requests, timeout=120))) == 3


def refuse(grid: Grid, context: Context) -> None:
    raise KeyError("the server refused")


@pytest.mark.parametrize(
    ("answers", "main", "error"),
    [
        (stumble, ask_everyone, (SiteError, "the site stumbled")),
        (echo, refuse, (KeyError, "the server refused")),
    ],
    ids=["site fails", "server fails"],
)
def test_errors_reach_the_caller_and_nothing_is_left_behind(
    answers: Callable[[Message, Context], Message],
    main: Callable[[Grid, Context], None],
    error: tuple[type[Exception], str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    environment = dict(os.environ)
    processes = set(psutil.pids())
    seen: set[int] = set()

    server = ServerApp()

    @server.main()
    def watched(grid: Grid, context: Context) -> None:
        try:
            main(grid, context)
        finally:
            seen.update(p.pid for p in psutil.Process().children(recursive=True))

    with pytest.raises(error[0], match=error[1]):
        run_on_ray(server, app_that(answers), sites=3)

    started = seen - processes
    assert started, "Ray should have started processes"
    assert not [pid for pid in started if psutil.pid_exists(pid)]
    assert dict(os.environ) == environment
    assert capfd.readouterr().out == ""
