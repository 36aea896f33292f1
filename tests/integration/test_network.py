"""A real federation over a bad network: gateway, mutual TLS, site daemons with ledgers, one run.

Between the sites and the gateway is a proxy that delays, throttles, reorders and cuts. Whatever it
does, the run ends with the adapter of the simulation, and every site has paid once for each round.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file

from fedgraft_client.account import read_ledger, verify
from fedgraft_client.entry import Kind
from fedgraft_common.logs import AS_JSON
from fedgraft_common.plan import Plan, load_plan
from fedgraft_simulations.cli import PLANS
from fedgraft_simulations.federation.__main__ import begin, follow
from fedgraft_simulations.federation.network import BadNetwork, Weather
from fedgraft_simulations.federation.processes import Federation
from fedgraft_simulations.partition import partition
from fedgraft_simulations.simulate import simulate

FAIR = Weather()
KINDS = {
    "late": Weather(delay=0.05, jitter=0.3),
    "narrow": Weather(rate=8_000.0),
    "shuffled": Weather(jitter=0.2, swap=0.1),
    "torn": Weather(cut=0.05),
}
OUTAGES = {"silent": Weather(silent=True), "closed": Weather(closed=True)}
OUTAGE = 40.0  # seconds; a site gives a call up after 30


def plan_of(rounds: int, sites: int) -> Plan:
    changes = [
        f"sites.count={sites}", f"aggregation.sites={sites}", f"aggregation.minimum_sites={sites}",
        f"rounds.count={rounds}", "rounds.deadline=600", "privacy.mechanism=local",
    ]  # fmt: skip
    return load_plan(PLANS / "digits.toml", changes)


@contextmanager
def federation(directory: Path, plan: Plan, seed: int) -> Iterator[tuple[Federation, BadNetwork]]:
    """Everything is up, and the sites reach the gateway through the proxy only."""
    with Federation(directory, plan) as made:
        made.start_server()
        shares = partition(plan)
        for share in shares:
            made.join(share, plan)
        files = [directory / s.name / "home" / "identity" / "federation.json" for s in shares]
        facts = [json.loads(file.read_text()) for file in files]
        with BadNetwork(facts[0]["gateway"], seed) as network:
            for file, about in zip(files, facts, strict=True):
                file.write_text(json.dumps(about | {"gateway": network.address}))
            for share in shares:
                made.start_site(share.name)
            yield made, network
            for name in made.names:
                made.processes[name].terminate()
            for name in made.names:
                assert made.processes[name].wait(200) == 0, made.log(name)[-2000:]


def expected(plan: Plan, directory: Path) -> dict[str, torch.Tensor]:
    """The adapter of the same plan in a simulation."""
    simulate(plan, directory, ("local",))
    return load_file(directory / "local" / "adapter" / "adapter_model.safetensors")


def check(made: Federation, folder: Path, plan: Plan, simulated: dict[str, torch.Tensor]) -> None:
    """Right result; each round once in every ledger and once at the server."""
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == simulated.keys()
    for name, tensor in simulated.items():
        torch.testing.assert_close(adapter[name], tensor, rtol=0, atol=1e-6)
    rounds = list(range(1, plan.rounds.count + 1))
    for name in made.names:
        ledger = made.directory / name / "home" / "records" / "ledger.sqlite3"
        entries = read_ledger(ledger)
        assert verify(entries, 1e-5, ledger.with_name("ledger.witness")).faults == ()
        charged = {e.seq: e.body["round"] for e in entries if e.kind is Kind.RESERVE}
        assert list(charged.values()) == rounds
        assert [charged[e.body["reserve"]] for e in entries if e.kind is Kind.COMMIT] == rounds
    text = (folder / "metrics.prom").read_text()
    counts = {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples}
    assert counts["fedgraft_server_rounds_total"] == plan.rounds.count
    assert counts["fedgraft_server_updates_total"] == plan.rounds.count * plan.sites.count


PRIVATE = re.compile(
    r"\b(loss|accurac\w*|gradients?|labels?|counts?|records?(?! mac)|epsilon)\b", re.I
)
FIELDS = {"time", "level", "logger", "action", "run", "round", "site", "message"}


def check_logs(made: Federation, plan: Plan) -> None:
    """Every line is JSON; where something happened is in fields; nothing private is anywhere."""
    private = {str(share.train.unit_count) for share in partition(plan)}
    for name in ("server", *made.names):
        lines = [json.loads(line) for line in made.log(name).splitlines()]
        for line in lines:
            assert set(line) <= FIELDS, line
            assert "action" in line, line
            assert not PRIVATE.search(line["message"]), line
            words = re.findall(r"(?<![\d.:=])\d+(?![\d.:])", line["message"])
            assert not private & set(words), line
        if name == "server":
            finished = [line for line in lines if line["action"] == "round"]
            assert [line["round"] for line in finished] == list(range(1, plan.rounds.count + 1))
            assert len({line["run"] for line in finished}) == 1
            links = [line for line in lines if line["action"] == "superlink"]
            assert {line["site"] for line in links if "site" in line} == set(made.names)
            run = finished[0]["run"]
        else:
            assert all(line["site"] == name for line in lines)
            answers = [line for line in lines if line["action"] == "answer"]
            assert {line["round"] for line in answers} == set(range(1, plan.rounds.count + 1))
            assert {line["run"] for line in answers} == {run}


class Forecast:
    """Changes the weather with each finished round, and cuts every connection with it.

    An outage lasts for a time, because no round ends in it.
    """

    def __init__(self, network: BadNetwork, kinds: Sequence[Weather]) -> None:
        self.network, self.kinds = network, kinds
        self.round = -1
        self.until = 0.0

    def __call__(self, finished: int) -> None:
        """See `follow`."""
        if finished != self.round:
            self.round = finished
            self.network.cut()
            self.network.weather = self.kinds[finished] if finished < len(self.kinds) else FAIR
            self.until = time.monotonic() + OUTAGE
        elif self.network.weather in OUTAGES.values() and time.monotonic() > self.until:
            self.network.weather = FAIR


@pytest.mark.slow  # five minutes, nearly all of them waiting for a connection that is down
@pytest.mark.timeout(900)
def test_a_run_over_a_bad_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And both sides' logs of it, for machines."""
    monkeypatch.setenv(AS_JSON, "1")
    plan = plan_of(rounds=5, sites=2)
    simulated = expected(plan, tmp_path / "simulated")
    with federation(tmp_path / "real", plan, seed=1) as (made, network):
        folder = begin(made)
        follow(made, folder, Forecast(network, list(KINDS.values())))
    check(made, folder, plan, simulated)
    assert min(network.seen["cuts"], network.seen["swaps"], network.seen["late"]) > 0
    check_logs(made, plan)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_forty_rounds_of_bad_weather(tmp_path: Path) -> None:
    """Each kind several times, in a drawn order, and outages longer than a site's patience."""
    kinds = [*KINDS.values()] * 8 + [*OUTAGES.values()] * 3
    random.Random(5).shuffle(kinds)  # noqa: S311 - weather
    plan = plan_of(rounds=40, sites=3)
    simulated = expected(plan, tmp_path / "simulated")
    with federation(tmp_path / "real", plan, seed=2) as (made, network):
        folder = begin(made)
        follow(made, folder, Forecast(network, kinds))
    check(made, folder, plan, simulated)
    assert network.seen["cuts"] > 40 and network.seen["swaps"] > 8, network.seen
