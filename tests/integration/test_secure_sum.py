"""A whole run under secure aggregation, with real sites in one process."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from typer.testing import CliRunner

from fedgraft_client import ledger_cli
from fedgraft_client.account import export
from fedgraft_client.app import client_app
from fedgraft_client.entry import Kind
from fedgraft_common.certificates import certificate_pem
from fedgraft_common.errors import MessageError
from fedgraft_common.fixed_point import FixedPoint
from fedgraft_common.messages import ADAPTER, SecureStep, Status, Tensors, read_status
from fedgraft_common.plan import Plan
from fedgraft_common.secure_transcript import Transcript, check_transcript
from fedgraft_server.federation import RoundSummary, run_federation
from fedgraft_simulations.local_grid import LocalGrid
from fedgraft_simulations.sites import SimulatedSites

SITES, ROUNDS = 4, 3
Lost = Callable[[int, int, str], bool]
"""Whether the message to a site (from 0) in a round, of a type, is lost."""


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.CRITICAL):
        yield


@pytest.fixture
def plan() -> Plan:
    return Plan().replace(
        {
            "adapter.method": "film",
            "adapter.layers": "last:1",
            "privacy.mechanism": "distributed",
            "training.sample_rate": 0.5,
            "training.expected_batch": 8.0,
            "aggregation.sites": SITES,
            "sites.count": SITES,
            "data.test_fraction": 0.96,
            "rounds.count": ROUNDS,
        }
    )


class BadGrid(LocalGrid):
    """Loses messages; notes what comes back."""

    def __init__(self, sites: SimulatedSites, lost: Lost) -> None:
        super().__init__(
            client_app(sites), sites.plan.sites.count, lost=lambda m: lost(*_address(m))
        )
        self.replies: list[Message] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        self.replies += replies
        return replies


def _address(message: Message) -> tuple[int, int, str]:
    number = message.content.config_records["plan"]["round"]
    assert isinstance(number, int)
    return message.metadata.dst_node_id - 1, number, message.metadata.message_type


def nothing(site: int, number: int, kind: str) -> bool:
    return False


def run(
    plan: Plan, directory: Path, lost: Lost = nothing, sites: str = "sites"
) -> tuple[Tensors, BadGrid, list[RoundSummary]]:
    simulated = SimulatedSites(plan, directory / sites, "cpu")
    grid = BadGrid(simulated, lost)
    summaries: list[RoundSummary] = []
    final = run_federation(
        plan, grid, directory / "server", summaries.append, durable=False, trust=simulated.trust
    )
    return final, grid, summaries


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], t) for n, t in other.items())


def test_the_server_gets_the_sum_of_what_the_sites_encoded(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[np.ndarray] = []
    decoded: list[np.ndarray] = []
    encode, decode = FixedPoint.encode, FixedPoint.decode

    def note(self: FixedPoint, *arguments: object) -> np.ndarray:
        encoded.append(encode(self, *arguments))  # type: ignore[arg-type]
        return encoded[-1]

    def note_sum(self: FixedPoint, total: np.ndarray) -> np.ndarray:
        decoded.append(total.copy())
        return decode(self, total)

    monkeypatch.setattr(FixedPoint, "encode", note)
    monkeypatch.setattr(FixedPoint, "decode", note_sum)
    _, grid, summaries = run(plan, tmp_path)
    assert len(encoded) == SITES * ROUNDS and len(decoded) == ROUNDS
    for number in range(ROUNDS):
        total = np.zeros_like(decoded[number])
        for vector in encoded[number * SITES : (number + 1) * SITES]:
            total += vector
        assert np.array_equal(total, decoded[number])
    assert [s.sites for s in summaries] == [SITES] * ROUNDS
    size = encoded[0].nbytes
    assert [s.bytes_received for s in summaries] == [SITES * size] * ROUNDS
    sent = [  # nothing that left looks like what was encoded
        np.concatenate([np.frombuffer(a.data, np.uint8) for a in record.values()]).tobytes()
        for reply in grid.replies
        if (record := reply.content.array_records.get(ADAPTER))
    ]
    assert len(sent) == SITES * ROUNDS
    assert not any(vector.tobytes()[:64] in message for vector in encoded for message in sent)


def test_a_site_may_be_missing_in_a_round_and_come_back(plan: Plan, tmp_path: Path) -> None:
    plan = plan.replace({"privacy.tolerated_dropouts": 1})

    def lost(site: int, number: int, kind: str) -> bool:
        return (number, site) in ((1, 0), (2, 3))

    def lost_later(site: int, number: int, kind: str) -> bool:  # gave an input, then went away
        return (number, site) == (3, 2) and kind == SecureStep.UNMASK.message_type

    final, _, summaries = run(
        plan, tmp_path, lambda *a: (a[2] == "train" and lost(*a)) or lost_later(*a)
    )
    assert [s.sites for s in summaries] == [3, 3, 4]
    assert all(torch.isfinite(t).all() for t in final.values())


def test_too_few_inputs_reveal_nothing_and_the_run_goes_on_later(
    plan: Plan, tmp_path: Path
) -> None:
    expected, _, _ = run(plan, tmp_path / "whole")
    away = [True]

    def lost(site: int, number: int, kind: str) -> bool:
        return away[0] and number == 2 and site == 1 and kind == "train"

    with pytest.raises(MessageError, match=r"round 2.*found '3 sites'.*least 4"):
        run(plan, tmp_path / "cut", lost)
    folder = tmp_path / "cut" / "server"
    assert [p.name for p in (folder / "transcript-000001").glob("round-*")] == ["round-000001.bin"]
    away[0] = False
    final, _, summaries = run(plan, tmp_path / "cut", lost)
    assert [s.number for s in summaries] == [2, 3]
    assert same(final, expected)


def test_a_server_killed_while_it_unmasks_names_the_same_survivors(
    plan: Plan, tmp_path: Path
) -> None:
    plan = plan.replace({"privacy.tolerated_dropouts": 1})

    def third_is_late(site: int, number: int, kind: str) -> bool:
        return (site, number, kind) == (2, 2, "train")

    expected, _, _ = run(plan, tmp_path / "whole", third_is_late)

    def killed(site: int, number: int, kind: str) -> bool:
        if (site, number, kind) == (3, 2, SecureStep.UNMASK.message_type):
            raise KeyboardInterrupt
        return third_is_late(site, number, kind)

    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "cut", killed)
    final, grid, summaries = run(plan, tmp_path / "cut")  # now the late site would be there, too
    assert [s.sites for s in summaries] == [3, 4]
    assert same(final, expected)
    assert all(read_status(reply) in (Status.OK, Status.KEPT) for reply in grid.replies)


def test_a_site_that_fails_in_the_set_up_is_left_out(plan: Plan, tmp_path: Path) -> None:
    plan = plan.replace({"privacy.tolerated_dropouts": 1})

    def lost(site: int, number: int, kind: str) -> bool:
        return site == 1 and kind == SecureStep.SHARE.message_type

    _, _, summaries = run(plan, tmp_path, lost)
    assert [s.sites for s in summaries] == [3] * ROUNDS
    with pytest.raises(MessageError, match="set-up"):
        run(plan.replace({"privacy.tolerated_dropouts": 0}), tmp_path / "none", lost)


def test_each_answer_is_in_the_site_s_ledger_and_the_transcript_is_clean(
    plan: Plan, tmp_path: Path
) -> None:
    run(plan, tmp_path)
    simulated = SimulatedSites(plan, tmp_path / "sites", "cpu")
    transcript = Transcript.read(tmp_path / "server" / "transcript-000001")
    assert len(transcript.statements) == SITES * ROUNDS
    assert check_transcript(transcript, simulated.trust()) == []
    for site in simulated.all():
        entries = site.store.ledger.entries()
        steps = [(e.body["step"], e.body["round"]) for e in entries if e.kind is Kind.SECURE]
        assert steps == [
            ("advertise", 1), ("share", 1), ("accept", 1), ("unmask", 1), ("unmask", 2),
            ("unmask", 3),
        ]  # fmt: skip
        charges = [e.body for e in entries if e.kind is Kind.RESERVE]
        assert {(c["mechanism"], c["shares"], c["colluders"]) for c in charges} == {
            ("distributed", SITES - 1, 1)
        }


def test_an_auditor_holds_the_transcript_against_the_ledgers(plan: Plan, tmp_path: Path) -> None:
    """What a server leaves out is in the ledgers, and what a ledger lacks is in the transcript."""
    run(plan, tmp_path)
    simulated = SimulatedSites(plan, tmp_path / "sites", "cpu")
    folder, ca = tmp_path / "server" / "transcript-000001", tmp_path / "ca.pem"
    ca.write_bytes(certificate_pem(simulated.trust().ca))
    exports = []
    for site in simulated.all():
        exports.append(tmp_path / f"{site.config.name}.jsonl")
        exports[-1].write_text(export(site.store.ledger.entries()))

    def audit(*ledgers: Path) -> tuple[int, dict[str, Any]]:
        arguments = ["transcript", str(folder), *map(str, ledgers), "--ca", str(ca), "--json"]
        result = CliRunner().invoke(ledger_cli.app, arguments)
        return result.exit_code, json.loads(result.stdout)

    code, found = audit(*exports)
    assert (code, found["findings"]) == (0, [])
    assert found["sites"] == sorted(site.config.name for site in simulated.all())
    assert (found["answers"], found["left_out"]) == (SITES * ROUNDS, 0)
    words = CliRunner().invoke(
        ledger_cli.app, ["transcript", str(folder), str(exports[0]), "--ca", str(ca)]
    )
    assert "too few: ask more sites" in words.stdout and "faults     none" in words.stdout

    (folder / "round-000002.bin").unlink()  # the server would rather not have asked
    code, found = audit(*exports)
    assert (code, found["answers"], found["left_out"]) == (0, SITES * ROUNDS, SITES)

    cut = exports[0].read_text().splitlines(keepends=True)  # a site that forgot its last answer
    exports[0].write_text("".join(cut[:-1]))
    code, found = audit(*exports)
    assert code == 1
    assert [(f["fault"], f["round"]) for f in found["findings"]] == [("ledger", ROUNDS)]

    exports[0].write_text("".join(line for line in cut if '"share"' not in line))
    code, found = audit(*exports)
    assert code == 1 and {"ledger", "roster"} <= {f["fault"] for f in found["findings"]}


def test_a_server_that_sends_sites_different_adapters_learns_nothing(
    plan: Plan, tmp_path: Path
) -> None:
    """Masks depend on what the site computes on: another adapter for one site, and no sum."""
    simulated = SimulatedSites(plan, tmp_path / "sites", "cpu")
    first = simulated[0]
    original = first.answer

    def other(message: Message) -> Message:
        from fedgraft_common.messages import to_record

        adapter = message.content.array_records[ADAPTER]
        moved = {n: torch.tensor(a.numpy()) + 0.25 for n, a in adapter.items()}
        message.content[ADAPTER] = to_record(moved)
        return original(message)

    totals: list[np.ndarray] = []
    decode = FixedPoint.decode

    def note_sum(self: FixedPoint, total: np.ndarray) -> np.ndarray:
        totals.append(total.copy())
        return decode(self, total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FixedPoint, "decode", note_sum)
        patch.setattr(
            "fedgraft_client.site.Site.answer",
            lambda site, m: (
                other(m)
                if site is first and m.content.config_records["plan"]["round"] == 2
                else original.__func__(site, m)  # type: ignore[attr-defined]
            ),
        )
        run(plan, tmp_path)
    honest, nonsense = totals[0].view(f"int{8 * totals[0].itemsize}"), totals[1]
    spread = nonsense.astype(np.float64) / 2.0 ** (8 * nonsense.itemsize)
    assert abs(spread.mean() - 0.5) < 0.1 and spread.std() > 0.25  # uniform: std 0.289
    assert np.abs(honest).max() < 2 ** (8 * honest.itemsize - 1)
