"""A ledger changed, cut, rolled back or shared is noticed. Long, as the ledger is one file."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.synchronize import Barrier
from pathlib import Path
from shutil import copytree

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgraft_client.entry import (
    Charge,
    Entry,
    Kind,
    charges,
    find_faults,
    parse_entry,
    spent,
)
from fedgraft_client.ledger import Ledger
from fedgraft_client.witness import Witness
from fedgraft_common.accounting import SamplingEvent
from fedgraft_common.errors import LedgerError, SealedError

PLAN = "a" * 64


def charge(number: int = 1, sigma: float = 2.0, plan: str = PLAN, steps: int = 1) -> Charge:
    return Charge("run", plan, number, "train", "local", "record", SamplingEvent(0.5, sigma, steps))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "site", "x-rays") as made:
        yield made


def three_rounds(directory: Path, witness: Path | None = None) -> None:
    with Ledger(directory, "x-rays", witness=witness) as ledger:
        for number in (1, 2, 3):
            ledger.commit(ledger.reserve(charge(number)), PLAN, number, f"{number:064}", b"content")


def change(directory: Path, statement: str) -> None:
    with closing(sqlite3.connect(directory / "ledger.sqlite3")) as connection, connection:
        connection.execute(statement)


def test_a_round_is_charged_when_it_is_reserved(ledger: Ledger) -> None:
    assert ledger.spent() == []
    first = ledger.reserve(charge(1))
    assert ledger.spent() == [SamplingEvent(0.5, 2.0, 1)]
    ledger.commit(first, PLAN, 1, "d" * 64, b"bytes")
    assert ledger.spent() == [SamplingEvent(0.5, 2.0, 1)]
    finished = ledger.finished(PLAN)
    assert finished is not None
    assert (finished.round, finished.digest, finished.content) == (1, "d" * 64, b"bytes")
    ledger.reserve(charge(2))  # and the process dies: it stays spent
    ledger.reserve(charge(2))
    assert ledger.spent() == [SamplingEvent(0.5, 2.0, 3)]
    assert ledger.spent(PLAN) == ledger.spent()
    assert ledger.spent("b" * 64) == []


def test_a_void_reservation_costs_nothing(ledger: Ledger) -> None:
    ledger.reserve(charge(1))
    ledger.void(ledger.reserve(charge(2)))
    assert ledger.spent() == ledger.spent(PLAN) == [SamplingEvent(0.5, 2.0, 1)]


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    three_rounds(tmp_path)
    with Ledger(tmp_path, "x-rays") as ledger:
        assert [e.kind.value for e in ledger.entries()] == ["open"] + ["reserve", "commit"] * 3
        assert ledger.spent() == [SamplingEvent(0.5, 2.0, 3)]
        finished = ledger.finished(PLAN)
        assert finished is not None and finished.round == 3


def test_the_mechanism_that_grew_last_comes_last(ledger: Ledger) -> None:
    for sigma in (1.0, 2.0, 1.0):
        ledger.reserve(charge(sigma=sigma))
    assert ledger.spent() == [SamplingEvent(0.5, 2.0, 1), SamplingEvent(0.5, 1.0, 2)]
    assert ledger.spent() == spent(ledger.entries())


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE entries SET body = replace(body, '2.0', '9.0') WHERE seq = 4", "entry 4"),
        ("UPDATE entries SET kind = 'void' WHERE seq = 3", "entry 3"),
        ("UPDATE entries SET time = time + 5 WHERE seq = 5", "entry 5"),
        ("DELETE FROM entries WHERE seq = 4", "missing"),
        ("DELETE FROM entries WHERE seq >= 6", "5 entries"),
        ("DELETE FROM entries WHERE seq = 7", "6 entries"),
        ("DELETE FROM entries", "no entries"),
        ("UPDATE entries SET signature = zeroblob(64) WHERE seq = 2", "signature"),
        ("UPDATE entries SET seq = 99 WHERE seq = 7", "missing"),
    ],
)
def test_a_changed_ledger_is_refused(tmp_path: Path, statement: str, words: str) -> None:
    three_rounds(tmp_path)
    change(tmp_path, statement)
    with pytest.raises(LedgerError, match=words):
        Ledger(tmp_path, "x-rays")


def test_a_whole_forged_chain_is_refused(tmp_path: Path) -> None:
    """Someone without the key writes a history that is consistent in itself."""
    three_rounds(tmp_path)
    with Ledger(tmp_path, "x-rays") as ledger:
        genuine = ledger.entries()
    forger = Ed25519PrivateKey.generate()
    forged: list[Entry] = []
    for entry in genuine[:3]:
        previous = forged[-1].hash if forged else "0" * 64
        forged.append(Entry.signed(entry.seq, entry.time, entry.kind, entry.body, previous, forger))
    assert find_faults(forged, forger.public_key()) == []
    change(tmp_path, "DELETE FROM entries")
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite3")) as connection, connection:
        for e in forged:
            row = (e.seq, e.time, e.kind.value, json.dumps(e.body), e.previous, e.signature)
            connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", row)
    with pytest.raises(LedgerError, match="not this site's"):
        Ledger(tmp_path, "x-rays")


def test_an_old_copy_is_noticed_and_can_be_recovered(tmp_path: Path) -> None:
    home, witness = tmp_path / "home", tmp_path / "other disk" / "witness"
    three_rounds(home, witness)
    copytree(home, tmp_path / "backup")
    with Ledger(home, "x-rays", witness=witness) as ledger:
        ledger.reserve(charge(4))
        ledger.reserve(charge(5, sigma=3.0, steps=7))
        lost = ledger.spent()
    for file in home.iterdir():
        file.unlink()
    copytree(tmp_path / "backup", home, dirs_exist_ok=True)
    with pytest.raises(LedgerError, match=r"7 entries.*entry 9.*ledger recover"):
        Ledger(home, "x-rays", witness=witness)
    with Ledger(home, "x-rays", witness=witness, recover=True) as ledger:
        assert {(e.noise_multiplier, e.steps) for e in ledger.spent()} == {(2.0, 4), (3.0, 7)}
        assert sorted(map(str, ledger.spent())) == sorted(map(str, lost))
        assert ledger.spent(PLAN) == ledger.spent()  # the run's own limit holds on
        assert ledger.entries()[-1].kind is Kind.RECOVER
    with Ledger(home, "x-rays", witness=witness) as ledger:  # and the site goes on
        ledger.reserve(charge(6))
        assert find_faults(ledger.entries(), ledger.public_key) == []
    with Ledger(home, "x-rays", witness=witness, recover=True) as ledger:
        assert len(ledger.entries()) == 11  # nothing is missing: nothing is added


def test_a_lost_ledger_is_not_a_new_one(tmp_path: Path) -> None:
    three_rounds(tmp_path)
    (tmp_path / "ledger.sqlite3").unlink()
    for rest in tmp_path.glob("ledger.sqlite3-*"):
        rest.unlink()
    with pytest.raises(LedgerError, match="no entries"):
        Ledger(tmp_path, "x-rays")
    with Ledger(tmp_path, "x-rays", recover=True) as ledger:
        assert ledger.spent() == [SamplingEvent(0.5, 2.0, 3)]


def test_a_lost_witness_is_noticed(tmp_path: Path) -> None:
    three_rounds(tmp_path)
    (tmp_path / "ledger.witness").unlink()
    with pytest.raises(LedgerError, match="witness of this ledger"):
        Ledger(tmp_path, "x-rays")
    with Ledger(tmp_path, "x-rays", recover=True) as ledger:
        assert ledger.entries()[-1].body == {"lost": [], "witness": None}
    Ledger(tmp_path, "x-rays").close()


def test_a_copy_that_went_on_alone_is_charged_for_both(tmp_path: Path) -> None:
    """Ten rounds in common, twenty on one branch, thirty on the other: sixty were computed."""
    home, witness = tmp_path / "home", tmp_path / "witness"
    with Ledger(home, "x-rays", witness=witness) as ledger:
        for number in range(10):
            ledger.reserve(charge(number + 1))
    copytree(home, tmp_path / "copy")
    early = witness.read_bytes()
    with Ledger(home, "x-rays", witness=witness) as ledger:
        for number in range(20):
            ledger.reserve(charge(number + 11))
    late = witness.read_bytes()
    for file in home.iterdir():
        file.unlink()
    copytree(tmp_path / "copy", home, dirs_exist_ok=True)
    witness.write_bytes(early)
    with Ledger(home, "x-rays", witness=witness) as ledger:
        for number in range(30):
            ledger.reserve(charge(number + 11))
    witness.write_bytes(late)
    with pytest.raises(LedgerError, match="another history"):
        Ledger(home, "x-rays", witness=witness)
    with Ledger(home, "x-rays", witness=witness, recover=True) as ledger:
        assert ledger.spent() == [SamplingEvent(0.5, 2.0, 60)]
        assert ledger.spent(PLAN) == [SamplingEvent(0.5, 2.0, 60)]
    Ledger(home, "x-rays", witness=witness).close()


def test_a_recovery_that_is_killed_charges_at_least_what_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three_rounds(tmp_path)
    copytree(tmp_path, tmp_path / "copy")
    with Ledger(tmp_path, "x-rays") as ledger:
        ledger.reserve(charge(4))
    witness = (tmp_path / "ledger.witness").read_bytes()
    with Ledger(tmp_path / "copy", "x-rays") as ledger:
        ledger.reserve(charge(4))  # the copy goes on alone
    (tmp_path / "copy" / "ledger.witness").write_bytes(witness)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Witness, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Ledger(tmp_path / "copy", "x-rays", recover=True)
    with pytest.raises(LedgerError, match="another history"):
        Ledger(tmp_path / "copy", "x-rays")
    with Ledger(tmp_path / "copy", "x-rays", recover=True) as ledger:
        assert sum(event.steps for event in ledger.spent()) >= 5


def test_an_old_witness_is_noticed(tmp_path: Path) -> None:
    three_rounds(tmp_path)
    old = (tmp_path / "ledger.witness").read_bytes()
    with Ledger(tmp_path, "x-rays") as ledger:
        ledger.reserve(charge(4))
        ledger.reserve(charge(5))
    (tmp_path / "ledger.witness").write_bytes(old)
    with pytest.raises(LedgerError, match="An old copy of the witness"):
        Ledger(tmp_path, "x-rays")
    Ledger(tmp_path, "x-rays", recover=True).close()
    Ledger(tmp_path, "x-rays").close()


def test_a_torn_last_line_of_the_witness_is_what_a_crash_leaves(tmp_path: Path) -> None:
    three_rounds(tmp_path)
    witness = tmp_path / "ledger.witness"
    witness.write_bytes(witness.read_bytes()[:-20])
    Ledger(tmp_path, "x-rays").close()
    assert len(witness.read_bytes().splitlines()) == 7


def test_a_witness_that_cannot_be_written_spends_nothing(tmp_path: Path) -> None:
    witness = tmp_path / "disk" / "witness"
    with Ledger(tmp_path / "site", "x-rays", witness=witness) as ledger:
        ledger.reserve(charge(1))
        witness.unlink()
        witness.mkdir()
        for _ in range(3):
            with pytest.raises(LedgerError, match="nothing was spent"):
                ledger.reserve(charge(2))
        assert ledger.spent() == [SamplingEvent(0.5, 2.0, 1)]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE rounds SET digest = 'evil'",
        "UPDATE rounds SET round = 7",
        "UPDATE rounds SET round = 1, seq = 3",
        "UPDATE rounds SET plan = 'b' || substr(plan, 2)",
        "UPDATE rounds SET seq = 2",
        "UPDATE rounds SET seq = 99",
        "DELETE FROM rounds",
    ],
)
def test_a_stored_round_that_was_not_committed_is_refused(tmp_path: Path, statement: str) -> None:
    three_rounds(tmp_path)
    with Ledger(tmp_path, "x-rays") as ledger:
        before = ledger.finished(PLAN)
        assert before is not None and before.round == 3
        change(tmp_path, statement)
        if not statement.startswith("DELETE"):
            with pytest.raises(LedgerError, match="not what was committed"):
                ledger.finished("b" + PLAN[1:] if "plan" in statement else PLAN)
    with pytest.raises(LedgerError, match="stored round"):
        Ledger(tmp_path, "x-rays")


@pytest.mark.parametrize("damage", ["{\n", '{"seen": "{}", "signature": "00"}\n'])
def test_a_damaged_witness_is_refused(tmp_path: Path, damage: str) -> None:
    three_rounds(tmp_path)
    (tmp_path / "ledger.witness").write_text(damage)
    with pytest.raises(LedgerError, match=r"ledger\.witness"):
        Ledger(tmp_path, "x-rays")


def test_a_witness_one_entry_behind_is_what_a_crash_leaves(tmp_path: Path) -> None:
    three_rounds(tmp_path)
    before = (tmp_path / "ledger.witness").read_bytes()
    with Ledger(tmp_path, "x-rays") as ledger:
        ledger.reserve(charge(4))
    (tmp_path / "ledger.witness").write_bytes(before)
    with Ledger(tmp_path, "x-rays") as ledger:
        assert ledger.spent() == [SamplingEvent(0.5, 2.0, 4)]
    assert (tmp_path / "ledger.witness").read_bytes() != before


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    three_rounds(tmp_path)
    path = tmp_path / "ledger.sqlite3"
    path.write_bytes(b"SQLite format 3\x00" + b"\xff" * 4096)
    with pytest.raises(LedgerError, match=r"ledger\.sqlite3"):
        Ledger(tmp_path, "x-rays")


def test_the_key_is_needed(tmp_path: Path) -> None:
    three_rounds(tmp_path)
    key = (tmp_path / "ledger.key").read_bytes()
    (tmp_path / "ledger.key").unlink()
    with pytest.raises(LedgerError, match=r"ledger\.key: found 'no such file'"):
        Ledger(tmp_path, "x-rays")
    (tmp_path / "ledger.key").write_bytes(b"-----BEGIN")
    with pytest.raises(LedgerError, match="Ed25519 key in PEM"):
        Ledger(tmp_path, "x-rays")
    (tmp_path / "ledger.key").write_bytes(key)
    Ledger(tmp_path, "x-rays").close()
    assert stat.S_IMODE((tmp_path / "ledger.sqlite3").stat().st_mode) == 0o600


@pytest.mark.parametrize(("dataset", "unit"), [("ct-scans", "record"), ("x-rays", "patient")])
def test_a_ledger_belongs_to_one_data_set_and_unit(tmp_path: Path, dataset: str, unit: str) -> None:
    three_rounds(tmp_path)
    with pytest.raises(LedgerError, match="as the site file says"):
        Ledger(tmp_path, dataset, unit)


def test_another_unit_cannot_be_charged(ledger: Ledger) -> None:
    other = Charge("run", PLAN, 1, "train", "local", "patient", SamplingEvent(0.5, 2.0, 1))
    with pytest.raises(LedgerError, match="the unit of this ledger"):
        ledger.reserve(other)
    assert ledger.spent() == []


def test_a_clock_that_jumps_back_changes_nothing(tmp_path: Path) -> None:
    now = [1000.0]
    with Ledger(tmp_path, "x-rays", clock=lambda: now[0]) as ledger:
        ledger.reserve(charge(1))
        now[0] = 10.0
        ledger.reserve(charge(2))
        now[0] = 2000.0
        ledger.reserve(charge(3))
        assert [e.time for e in ledger.entries()] == [1000, 1000, 1000, 2000]
    Ledger(tmp_path, "x-rays").close()


def test_a_sealed_run_is_over(ledger: Ledger) -> None:
    ledger.reserve(charge(1))
    ledger.seal(PLAN)
    ledger.seal(PLAN)
    with pytest.raises(SealedError, match="never takes part again"):
        ledger.reserve(charge(2))
    assert ledger.spent() == [SamplingEvent(0.5, 2.0, 1)]
    ledger.reserve(charge(1, plan="b" * 64))


def test_approval_is_written_down(ledger: Ledger) -> None:
    assert not ledger.approved(PLAN)
    ledger.approve(PLAN, "run")
    assert ledger.approved(PLAN)
    assert not ledger.approved("b" * 64)
    ledger.approve("b" * 64, "run", by="policy")
    assert ledger.approved("b" * 64, by="policy")
    assert not ledger.approved("b" * 64)  # the operator's own word is another matter
    ledger.approve(PLAN, "run")
    said = [e.body for e in ledger.entries() if e.kind is Kind.APPROVE]
    assert [(body["plan"], body["by"]) for body in said] == [
        (PLAN, "operator"), ("b" * 64, "policy")
    ]  # fmt: skip


def _try_to_open(directory: Path, words: multiprocessing.Queue[str]) -> None:
    try:
        Ledger(directory, "x-rays").close()
        words.put("opened")
    except LedgerError as error:
        words.put(str(error))


def test_two_processes_cannot_share_a_ledger(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    words: multiprocessing.Queue[str] = context.Queue()
    with Ledger(tmp_path, "x-rays") as ledger:
        with pytest.raises(LedgerError, match="in use by another process"):
            Ledger(tmp_path, "x-rays")
        other = context.Process(target=_try_to_open, args=(tmp_path, words))
        other.start()
        assert "in use by another process" in words.get(timeout=60)
        other.join()
        ledger.reserve(charge(1))
    other = context.Process(target=_try_to_open, args=(tmp_path, words))
    other.start()
    assert words.get(timeout=60) == "opened"
    other.join()


def _make(directory: Path, keys: multiprocessing.Queue[str], together: Barrier) -> None:
    together.wait(60)
    ledger = Ledger(directory, "x-rays", durable=False)
    ledger.reserve(charge(1))
    keys.put(ledger.public_key.public_bytes_raw().hex())


def test_processes_of_a_simulation_agree_on_a_new_ledger(tmp_path: Path) -> None:
    """Ray's actors make the same site at the same time; all must sign with one key."""
    context = multiprocessing.get_context("fork")
    for attempt in range(12):
        keys: multiprocessing.Queue[str] = context.Queue()
        together = context.Barrier(4)
        directory = tmp_path / str(attempt)
        others = [context.Process(target=_make, args=(directory, keys, together)) for _ in range(4)]
        for other in others:
            other.start()
        found = {keys.get(timeout=60) for _ in others}
        for other in others:
            other.join()
        assert len(found) == 1
        ledger = Ledger(directory, "x-rays", durable=False)
        assert find_faults(ledger.entries(), ledger.public_key) == []
        assert ledger.spent() == [SamplingEvent(0.5, 2.0, 4)]


def test_a_closed_ledger_says_so(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "x-rays")
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.reserve(charge())


def test_a_full_disk_spends_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger(tmp_path, "x-rays") as ledger:
        assert ledger._connection is not None
        pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
        ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(LedgerError, match="full"):
            for number in range(1, 500):
                ledger.reserve(charge(number))
        counted = ledger.spent()
        assert counted == spent(ledger.entries())
    with Ledger(tmp_path, "x-rays") as ledger:
        assert ledger.spent() == counted


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "commit", "void", "seal", "restart"]),
        st.sampled_from([0.8, 1.0, 2.0]),
        st.sampled_from(["a" * 64, "b" * 64]),
    ),
    max_size=25,
)


@settings(max_examples=25, deadline=None)
@given(actions=ACTIONS)
def test_the_account_in_memory_is_the_account_on_disk(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, float, str]]
) -> None:
    directory = tmp_path_factory.mktemp("ledger")
    ledger = Ledger(directory, "x-rays")
    pending: list[int] = []
    expected: dict[int, float] = {}
    sealed: set[str] = set()
    plans: dict[int, str] = {}
    for action, sigma, plan in actions:
        if action == "restart":
            ledger.close()
            ledger = Ledger(directory, "x-rays")
        elif action == "seal":
            ledger.seal(plan)
            sealed.add(plan)
        elif action == "reserve" and plan not in sealed:
            pending.append(ledger.reserve(charge(1, sigma, plan)))
            expected[pending[-1]] = sigma
            plans[pending[-1]] = plan
        elif action == "commit" and pending:
            seq = pending.pop()
            ledger.commit(seq, plans[seq], 1, "d" * 64, b"x")
        elif action == "void" and pending:
            expected.pop(seq := pending.pop())
            ledger.void(seq)
    total = {e.noise_multiplier: e.steps for e in ledger.spent()}
    assert total == {s: list(expected.values()).count(s) for s in set(expected.values())}
    assert sorted(map(str, ledger.spent())) == sorted(map(str, spent(ledger.entries())))
    assert find_faults(ledger.entries(), ledger.public_key) == []
    assert [parse_entry(json.loads(json.dumps(e.document()))) for e in ledger.entries()] == (
        ledger.entries()
    )
    ledger.close()


MUTATIONS: list[tuple[str, Callable[[list[Entry]], list[Entry]]]] = [
    ("a doubled line", lambda lines: [*lines[:3], lines[2], *lines[3:]]),
    ("a swapped pair", lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]]),
    ("a missing first line", lambda lines: lines[1:]),
]


@pytest.mark.parametrize("mutate", [m[1] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_faults_are_found(tmp_path: Path, mutate: Callable[[list[Entry]], list[Entry]]) -> None:
    three_rounds(tmp_path)
    with Ledger(tmp_path, "x-rays") as ledger:
        lines, key = ledger.entries(), ledger.public_key
    assert find_faults(lines, key) == []
    assert find_faults(mutate(lines), key) != []


def test_a_commit_needs_its_reservation(tmp_path: Path) -> None:
    with Ledger(tmp_path, "x-rays") as ledger:
        reservation = ledger.reserve(charge(1))
        ledger.commit(reservation, PLAN, 1, "d" * 64, b"x")
        ledger.void(reservation)  # would take back what has left
        faults = find_faults(ledger.entries(), ledger.public_key)
        assert faults == ["entry 4: void of entry 2, not reserved"]
        assert len(charges(ledger.entries())) == 1
