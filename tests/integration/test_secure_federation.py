"""Secure aggregation between real processes: gateway, TLS, daemons; sites that die on the way."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from flwr.app import Message
from safetensors.torch import load_file

from fedgraft_client.app import client_app
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan, load_plan
from fedgraft_common.secure_messages import Statement, from_bits, unpack_list
from fedgraft_common.secure_transcript import Transcript
from fedgraft_server.federation import run_federation
from fedgraft_simulations.cli import PLANS
from fedgraft_simulations.federation.__main__ import begin, follow
from fedgraft_simulations.federation.network import BadNetwork
from fedgraft_simulations.federation.processes import Federation
from fedgraft_simulations.local_grid import LocalGrid
from fedgraft_simulations.partition import partition
from fedgraft_simulations.sites import SimulatedSites


def make_plan(sites: int, rounds: int, dropouts: int) -> Plan:
    return load_plan(
        PLANS / "digits.toml",
        [
            f"sites.count={sites}", f"aggregation.sites={sites}", f"rounds.count={rounds}",
            f"privacy.tolerated_dropouts={dropouts}",
        ],
    )  # fmt: skip


def start(federation: Federation, plan: Plan) -> Path:
    federation.start_server()
    for share in partition(plan):
        federation.join(share, plan)
        federation.start_site(share.name)
    return begin(federation)


def kill(federation: Federation, name: str) -> None:
    process = federation.processes.pop(name)
    process.kill()
    process.wait()


def survivors(folder: Path) -> dict[int, frozenset[str]]:
    """Whose inputs went into each round, as the sites signed it."""
    found: dict[int, frozenset[str]] = {}
    for transcript in folder.glob("transcript-*"):
        roster = Transcript.from_bytes((transcript / "set-up.bin").read_bytes()).roster
        for path in transcript.glob("round-*.bin"):
            statements = [Statement.from_bytes(part) for part in unpack_list(path.read_bytes())]
            (bits,) = {statement.survivors for statement in statements}
            names = frozenset(roster.names[n] for n in from_bits(bits, len(roster)))
            found[statements[0].round] = names
    return found


def in_one_process(plan: Plan, directory: Path, present: dict[int, frozenset[str]]) -> Tensors:
    """The same run with the same dropouts."""
    sites = SimulatedSites(plan, directory / "sites", "cpu")
    names = [share.name for share in sites.shares()]

    def lost(message: Message) -> bool:
        number = message.content.config_records["plan"]["round"]
        assert isinstance(number, int)
        name = names[message.metadata.dst_node_id - 1]
        return message.metadata.message_type == "train" and name not in present[number]

    grid = LocalGrid(client_app(sites), len(names), lost=lost)
    run_federation(plan, grid, directory / "server", durable=False, trust=sites.trust)
    return load_file(directory / "server" / "adapter" / "adapter_model.safetensors")


def largest_difference(one: Tensors, other: Tensors) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def behind_a_counter(federation: Federation, name: str) -> BadNetwork:
    """What a site and the gateway say to each other passes here, and is counted."""
    file = federation.directory / name / "home" / "identity" / "federation.json"
    facts = json.loads(file.read_text())
    network = BadNetwork(facts["gateway"])
    file.write_text(json.dumps(facts | {"gateway": network.address}))
    return network


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.CRITICAL):
        yield


def test_a_site_that_is_killed_comes_back_and_its_input_counts_once(tmp_path: Path) -> None:
    plan = make_plan(sites=3, rounds=4, dropouts=0)
    killed: list[int] = []

    def tell(finished: int) -> None:
        if finished >= 1 and not killed:
            killed.append(finished)
            kill(federation, "branch-01")
            federation.start_site("branch-01")

    with Federation(tmp_path / "real", plan) as federation:
        folder = start(federation, plan)
        follow(federation, folder, tell)
        real = load_file(folder / "adapter" / "adapter_model.safetensors")
    present = survivors(folder)
    assert killed and present == {n: frozenset(federation.names) for n in range(1, 5)}
    expected = in_one_process(plan, tmp_path / "simulated", present)
    assert largest_difference(real, expected) <= 1e-6


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_sixty_rounds_of_eight_sites_of_which_two_die(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(sites=8, rounds=60, dropouts=2)
    dying = {20: "branch-02", 40: "branch-05"}
    marks: dict[int, tuple[float, list[Counter[str]]]] = {}  # round to clock and bytes by then
    with ExitStack() as stack:
        federation = stack.enter_context(Federation(tmp_path / "real", plan))
        federation.start_server()
        networks = []
        for share in partition(plan):
            federation.join(share, plan)
            networks.append(stack.enter_context(behind_a_counter(federation, share.name)))
            federation.start_site(share.name)
        began = time.monotonic()

        def tell(finished: int) -> None:
            if finished not in marks:
                seen = [Counter(network.seen) for network in networks]
                marks[finished] = time.monotonic(), seen
            for number in [n for n in dying if finished >= n]:
                kill(federation, dying.pop(number))

        folder = begin(federation)
        follow(federation, folder, tell)
        real = load_file(folder / "adapter" / "adapter_model.safetensors")
    seconds = time.monotonic() - began
    present = survivors(folder)
    assert not dying and sorted(present) == list(range(1, 61))
    assert len(present[10]) == 8 and len(present[60]) == 6
    expected = in_one_process(plan, tmp_path / "simulated", present)
    difference = largest_difference(real, expected)
    set_up = (folder / "transcript-000001" / "set-up.bin").read_bytes()
    size = Transcript.from_bytes(set_up).terms.length
    whole = [n for n in marks if 2 <= n <= 18]  # everybody is there and nothing is set up
    first, last = min(whole), max(whole)
    spent = (marks[last][0] - marks[first][0]) / (last - first)
    sent, received = (
        [
            (after[way] - before[way]) / (last - first)
            for before, after in zip(marks[first][1], marks[last][1], strict=True)
        ]
        for way in ("sent", "received")
    )
    begun = marks[first][1]
    with capsys.disabled():
        print(  # noqa: T201
            f"\n60 rounds, 8 sites, 2 killed: {seconds:.0f} s; difference {difference:.1e}; "
            f"{min(map(len, present.values()))} to 8 inputs a round\n"
            f"rounds {first + 1} to {last}, {spent:.2f} s each; a site and round on the wire, TLS "
            f"and polling included: {min(sent):.0f} to {max(sent):.0f} bytes sent, "
            f"{min(received):.0f} to {max(received):.0f} received, of which {4 * size} are masked "
            f"integers and {33 * 8} shares\n"
            f"until round {first}, set-up included: {max(s['sent'] for s in begun)} bytes sent, "
            f"{max(s['received'] for s in begun)} received"
        )
    assert difference <= 1e-6
    assert min(sent) > 4 * size + 33 * 8  # what was counted holds at least what must travel
    assert sum(sent) / len(sent) < 10 * (4 * size + 33 * 8) + 100_000 * spent  # and not much more
