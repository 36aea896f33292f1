"""Each way in which an account can be wrong is found in its export alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedgraft_client.account import export, read_ledger
from fedgraft_client.entry import GENESIS, Charge, Entry, Kind
from fedgraft_client.ledger import Ledger
from fedgraft_client.policy import Policy
from fedgraft_client.site_file import Data
from fedgraft_common.accounting import SamplingEvent
from fedgraft_common.errors import LedgerError
from fedgraft_common.mechanism import step_noise
from fedgraft_common.plan import Plan, parse_plan
from fedgraft_simulations.audit.account import Account, audit_account
from fedgraft_simulations.audit.ledger import LedgerPart, read_copy
from fedgraft_simulations.audit.part import AuditContext, Finding


def make_plan(**changes: object) -> Plan:
    document = {
        "name": "wards",
        "training": {"sample_rate": 0.5},
        "rounds": {"count": 3},
        "privacy": {"epsilon": 4.0, "delta": 1e-4},
    }
    return parse_plan(document, "test").replace(changes)


PLAN = make_plan()


def charge(number: int, plan: Plan = PLAN, purpose: str = "train", **changes: object) -> Charge:
    step = step_noise(plan, 100, "here")
    assert step.event is not None
    event = SamplingEvent(step.sample_rate, step.event.noise_multiplier, 1)
    facts = {
        "run": plan.name, "plan": plan.hash, "round": number, "purpose": purpose,
        "mechanism": "local", "unit": "record", "event": event,
    }  # fmt: skip
    return Charge(**{**facts, **changes})  # type: ignore[arg-type]


def run(ledger: Ledger, rounds: int = 3, **changes: object) -> None:
    for number in range(1, rounds + 1):
        entry = ledger.reserve(charge(number, **changes))  # type: ignore[arg-type]
        ledger.commit(entry, PLAN.hash, number, f"{number:064}", b"content")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "site", "x-rays") as made:
        yield made


def audit(
    ledger: Ledger | list[Entry], policy: Policy | None = None, plan: Plan = PLAN,
    rehearsed: bool = False,
) -> dict[str, Finding]:  # fmt: skip
    entries = ledger.entries() if isinstance(ledger, Ledger) else ledger
    return {f.name: f for f in audit_account(Account(entries, plan, policy, rehearsed))}


def failed(found: dict[str, Finding]) -> set[str]:
    return {name for name, finding in found.items() if finding.verdict == "fail"}


def test_a_sound_ledger_passes(ledger: Ledger) -> None:
    run(ledger)
    found = audit(ledger, Policy(maximum_epsilon=5, maximum_delta=1e-4))
    assert failed(found) == set()
    assert found["plan"].verdict == found["policy"].verdict == "pass"
    assert "3 charges" in found["plan"].measured
    assert "at delta 0.0001" in found["promise"].measured


def test_without_a_site_file_the_policy_is_not_judged(ledger: Ledger) -> None:
    run(ledger)
    assert audit(ledger)["policy"].verdict == "info"


def rewritten(entries: list[Entry], change: Callable[[int, dict], object]) -> list[Entry]:  # type: ignore[type-arg]
    """The same history with changed bodies, signed anew by a key of one's own."""
    key = Ed25519PrivateKey.generate()
    found, previous = [], GENESIS
    for entry in entries:
        body = dict(entry.body)
        if entry.kind is Kind.OPEN:
            body["key"] = key.public_key().public_bytes_raw().hex()
        change(entry.seq, body)
        entry = Entry.signed(entry.seq, entry.time, entry.kind, body, previous, key)
        found.append(entry)
        previous = entry.hash
    return found


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (lambda lines: lines.pop(3), "missing"),
        (lambda lines: lines.__setitem__(2, {**lines[2], "time": lines[2]["time"] + 1}), "signat"),
        (lambda lines: lines.insert(3, lines[2]), "missing"),
        (lambda lines: lines[3]["body"].__setitem__("noise_multiplier", 9.0), "signature"),
        (lambda lines: lines[4].__setitem__("signature", "00" * 64), "signature"),
    ],
)
def test_a_changed_export_breaks_the_chain(
    ledger: Ledger, tmp_path: Path, tamper: Callable[[list[object]], object], says: str
) -> None:
    run(ledger)
    lines = [json.loads(line) for line in export(ledger.entries()).splitlines()]
    tamper(lines)
    file = tmp_path / "export.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = audit(read_ledger(file))
    assert "chain" in failed(found)
    assert says in found["chain"].measured


def test_a_cut_tail_is_not_seen_and_is_said_not_to_be(ledger: Ledger) -> None:
    run(ledger)
    found = audit(ledger.entries()[:-2])
    assert failed(found) == set()


def held(ledger: list[Entry], **known: object) -> dict[str, Finding]:
    return {f.name: f for f in audit_account(Account(ledger, PLAN, **known))}  # type: ignore[arg-type]


def test_an_earlier_copy_shows_a_cut_tail_and_another_history(ledger: Ledger) -> None:
    run(ledger)
    entries = ledger.entries()
    assert held(entries)["earlier copy"].verdict == "info"
    assert held(entries, earlier=entries[:4])["earlier copy"].verdict == "pass"
    cut = held(entries[:-2], earlier=entries)
    assert failed(cut) == {"earlier copy"}
    assert "goes on to line 7" in cut["earlier copy"].measured
    anew = rewritten(entries, lambda n, body: body.update(noise_multiplier=9.0) if n == 4 else None)
    assert "line 1 is" in held(anew, earlier=entries)["earlier copy"].measured


def test_the_auditor_may_know_the_key(ledger: Ledger) -> None:
    run(ledger)
    entries = ledger.entries()
    key = entries[0].body["key"]
    assert held(entries, key=key.upper())["key"].verdict == "pass"
    assert failed(held(rewritten(entries, lambda *_: None), key=key)) == {"key"}


def test_a_witness_is_read_as_it_is(ledger: Ledger, tmp_path: Path) -> None:
    run(ledger)
    witness = tmp_path / "site" / "ledger.witness"
    assert read_copy(witness) == ledger.entries()
    file = tmp_path / "none.jsonl"
    file.write_text("nothing\n")
    with pytest.raises(LedgerError, match="witness"):
        read_copy(file)


def test_charges_are_to_one_data_set_and_unit(ledger: Ledger) -> None:
    run(ledger)
    entries = ledger.entries()
    data = Data(name="x-rays", source="x.npz", nominal_size=100)
    assert failed(held(entries, data=data)) == set()
    other = data.model_copy(update={"name": "mri"})
    assert failed(held(entries, data=other)) == {"data set"}
    patients = rewritten(entries, lambda n, body: body.update(unit="patient_id") if n == 1 else 0)
    assert "charged per record" in held(patients)["data set"].measured


def test_the_sample_rate_is_that_of_the_declared_size(ledger: Ledger) -> None:
    plan = make_plan(**{"training.sample_rate": None, "training.expected_batch": 20})
    ledger.reserve(charge(1, plan))
    data = Data(name="x-rays", source="x.npz", nominal_size=50)
    account = Account(ledger.entries(), plan, data=data)
    found = {f.name: f for f in audit_account(account)}
    assert "sample_rate 0.2, not the 0.4 of 50 units" in found["plan"].measured


def test_an_approval_by_the_policy_is_none_by_the_operator(ledger: Ledger) -> None:
    ledger.approve(PLAN.hash, PLAN.name, by="policy")
    run(ledger)
    rules = Policy(maximum_delta=1e-4, approval="manual")
    assert "nobody had approved" in audit(ledger, rules)["policy"].measured


def test_a_copied_charge_is_a_replay(ledger: Ledger) -> None:
    run(ledger)
    reserves = [e for e in ledger.entries() if e.kind is Kind.RESERVE]
    nonce = reserves[0].body["nonce"]
    entries = rewritten(
        ledger.entries(), lambda n, body: body.update(nonce=nonce) if "nonce" in body else None
    )
    found = audit(entries)
    assert failed(found) == {"replays"}
    assert "nonce" in found["replays"].measured


def test_a_reply_that_was_committed_twice_is_a_replay(ledger: Ledger) -> None:
    for number in (1, 2):
        ledger.commit(ledger.reserve(charge(number)), PLAN.hash, number, "f" * 64, b"content")
    assert failed(audit(ledger)) == {"replays"}


def test_a_round_that_was_finished_twice_is_a_replay(ledger: Ledger) -> None:
    for digest in ("e", "f"):
        ledger.commit(ledger.reserve(charge(1)), PLAN.hash, 1, digest * 64, b"content")
    assert "a second time" in audit(ledger)["replays"].measured


def test_a_crash_is_charged_twice_and_is_no_replay(ledger: Ledger) -> None:
    ledger.reserve(charge(1))  # killed here
    run(ledger)
    found = audit(ledger)
    assert failed(found) == set()
    assert "1 rounds were begun again" in found["replays"].measured
    assert "1 charges never committed" in found["accountants"].measured


def test_a_sealed_run_that_goes_on_is_found(ledger: Ledger) -> None:
    run(ledger)
    ledger.seal(PLAN.hash)
    last = ledger.entries()[-1]
    key = ledger._key
    body = charge(4).body() | {"nonce": "0"}
    later = Entry.signed(last.seq + 1, last.time, Kind.RESERVE, body, last.hash, key)
    assert "sealed" in failed(audit([*ledger.entries(), later]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"event": SamplingEvent(0.5, 0.7, 1)}, "less than"),
        ({"event": SamplingEvent(0.5, 50.0, 1)}, "more than"),
        ({"event": SamplingEvent(0.4, 5.0, 1)}, "sample_rate"),
        ({"event": SamplingEvent(0.5, 5.0, 2)}, "steps"),
        ({"mechanism": "distributed", "shares": 4}, "mechanism"),
        ({"run": "other"}, "run"),
    ],
)
def test_charges_are_held_against_the_plan(
    ledger: Ledger, changes: dict[str, object], says: str
) -> None:
    run(ledger, 3, **changes)
    found = audit(ledger)
    assert "plan" in failed(found)
    assert says in found["plan"].measured


def test_more_rounds_than_the_plan_has_break_the_promise(ledger: Ledger) -> None:
    run(ledger, rounds=4)
    found = audit(ledger)
    assert failed(found) == {"plan", "promise"}
    assert "round 4 of 3" in found["plan"].measured


def test_a_mechanism_that_changes_on_the_way_is_found(ledger: Ledger) -> None:
    run(ledger, rounds=1)
    sigma = charge(2).event.noise_multiplier
    ledger.reserve(charge(2, event=SamplingEvent(0.5, 2 * sigma, 1)))
    assert failed(audit(ledger)) == {"consistency", "plan"}


def test_the_sample_rate_may_follow_from_the_declared_size(ledger: Ledger) -> None:
    plan = make_plan(**{"training.sample_rate": None, "training.expected_batch": 20})
    for number in (1, 2, 3):
        entry = ledger.reserve(charge(number, plan))
        ledger.commit(entry, plan.hash, number, f"{number:064}", b"content")
    assert charge(1, plan).event.sample_rate == 0.2
    assert failed(audit(ledger, plan=plan)) == set()


def test_another_plan_than_was_charged_is_noted_and_fails_after_a_rehearsal(
    ledger: Ledger,
) -> None:
    run(ledger)
    other = make_plan(seed=1)
    assert audit(ledger, plan=other)["plan"].verdict == "info"
    assert audit(ledger, plan=other, rehearsed=True)["plan"].verdict == "fail"


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ({"maximum_epsilon": 3.0}, "maximum_epsilon 3"),
        ({"maximum_run_epsilon": 3.0}, "maximum_run_epsilon 3"),
        ({"minimum_noise_multiplier": 9.0}, "minimum_noise_multiplier"),
        ({"mechanisms": ("distributed",)}, "mechanism local"),
        ({"tasks": ("x-*",)}, "task wards"),
        ({"approval": "manual"}, "nobody had approved"),
    ],
)
def test_each_rule_of_the_policy_is_held(
    ledger: Ledger, policy: dict[str, object], says: str
) -> None:
    run(ledger)
    rules = Policy(**{"maximum_delta": 1e-4, **policy})  # type: ignore[arg-type]
    found = audit(ledger, rules)
    assert failed(found) == {"policy"}
    assert says in found["policy"].measured


def test_an_approved_plan_and_a_released_evaluation(ledger: Ledger) -> None:
    plan = make_plan(**{"evaluation.every": 3})
    ledger.approve(plan.hash, plan.name)
    run(ledger, plan=plan)
    evaluation = SamplingEvent(1.0, plan.evaluation.noise_multiplier, 1)
    ledger.reserve(charge(3, plan, "evaluate", event=evaluation))
    rules = {"maximum_delta": 1e-4, "approval": "manual"}
    assert failed(audit(ledger, Policy(**rules), plan)) == {"policy"}  # type: ignore[arg-type]
    agreed = Policy(**rules, release_evaluation=True)  # type: ignore[arg-type]
    assert failed(audit(ledger, agreed, plan)) == set()


def test_class_means_are_charged_as_the_plan_asks_and_only_if_it_does(ledger: Ledger) -> None:
    plan = make_plan(**{
        "head.training": "prototype", "privacy.mechanism": "distributed", "aggregation.sites": 3,
    })  # fmt: skip
    means = SamplingEvent(1.0, plan.head.start_noise, 1)
    ledger.reserve(charge(1, plan, "start", event=means))
    run(ledger, plan=plan, mechanism="distributed", shares=2, colluders=1)
    rules = Policy(maximum_epsilon=5, maximum_delta=1e-4, mechanisms=("distributed",))
    assert failed(audit(ledger, rules, plan)) == set()
    ledger.reserve(charge(1, plan, "start", event=SamplingEvent(1.0, 1.0, 1)))
    assert "noise multiplier 1, less than the 8" in audit(ledger, None, plan)["plan"].measured
    ledger.reserve(charge(1, PLAN, "start", event=means))
    assert "class means that the plan does not ask for" in audit(ledger)["plan"].measured


def test_the_part_reads_one_export_and_needs_no_run(ledger: Ledger, tmp_path: Path) -> None:
    run(ledger)
    file = tmp_path / "export.jsonl"
    file.write_text(export(ledger.entries()))
    plan = PLAN.replace(
        {"aggregation.sites": 16}
    )  # the audit's plan says how many; this one did not
    context = AuditContext(plan, tmp_path / "audit", ledger=file)
    result = LedgerPart().run(context, lambda *_: None)
    assert result.verdict == "pass"
    assert result.facts["ledgers"][0]["epsilon"] == pytest.approx(3.98, abs=0.03)
    assert not (tmp_path / "audit").exists()


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "export.jsonl"
    file.write_text("{}\n")
    with pytest.raises(LedgerError, match="ledger export"):
        LedgerPart().run(AuditContext(PLAN, tmp_path, ledger=file), lambda *_: None)
