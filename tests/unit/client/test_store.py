"""What a site keeps: whole, or refused; and a sealed head stays sealed."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from fedgraft_client.entry import Charge
from fedgraft_client.head import LinearHead
from fedgraft_client.store import SiteStore, load_sealed
from fedgraft_client.tasks import build_task
from fedgraft_common.accounting import SamplingEvent
from fedgraft_common.errors import CheckpointError, LedgerError, SealedError
from fedgraft_common.plan import Plan
from fedgraft_common.task_spec import TaskSpec

PLAN = Plan().replace({"head.training": "private"})


def head(value: float = 0.5, classes: tuple[str, ...] = ("a", "b")) -> LinearHead:
    made = LinearHead(4, 2, build_task(TaskSpec(classes=classes)))
    torch.nn.init.constant_(made.linear.weight, value)
    torch.nn.init.constant_(made.linear.bias, -value)
    return made


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SiteStore]:
    with closing(SiteStore(tmp_path / "site")) as made:
        yield made


REPLY = {"b.weight": torch.randn(3, 2), "a": torch.tensor([1.5])}


def test_before_the_first_round_nothing_is_changed(store: SiteStore) -> None:
    own = head()
    assert store.last_round(PLAN, own) == (0, {})
    assert torch.equal(own.linear.weight, head().linear.weight)


def charge(store: SiteStore, plan: Plan, number: int = 1) -> int:
    event = SamplingEvent(0.5, 2.0, 1)
    return store.ledger.reserve(
        Charge("run", plan.hash, number, "train", "local", store.ledger.unit, event)
    )


@pytest.mark.parametrize("durable", [True, False])
def test_head_and_reply_come_back_from_one_transaction(tmp_path: Path, durable: bool) -> None:
    store = SiteStore(tmp_path, durable)
    store.save_round(PLAN, 1, head(0.1), {"a": torch.zeros(1)}, charge(store, PLAN, 1))
    store.save_round(PLAN, 2, head(0.7), REPLY, charge(store, PLAN, 2))
    store.close()
    again = LinearHead(4, 2)
    with closing(SiteStore(tmp_path, durable)) as store:
        number, reply = store.last_round(PLAN, again)
    assert number == 2
    assert set(reply) == set(REPLY)
    assert all(torch.equal(reply[name], REPLY[name]) for name in REPLY)
    assert torch.equal(again.linear.weight, head(0.7).linear.weight)
    assert torch.equal(again.linear.bias, head(0.7).linear.bias)


def test_plans_are_kept_apart(store: SiteStore) -> None:
    store.save_round(PLAN, 3, head(), REPLY, charge(store, PLAN))
    assert store.last_round(PLAN.replace({"seed": 9}), head()) == (0, {})


def test_a_round_without_a_charge_is_for_simulations(tmp_path: Path, store: SiteStore) -> None:
    with pytest.raises(LedgerError, match="without a charge"):
        store.save_round(PLAN, 1, head(), REPLY, None)
    simulated = SiteStore(tmp_path / "simulated", durable=False)
    simulated.save_round(PLAN, 1, head(), REPLY, None)
    assert simulated.last_round(PLAN, head())[0] == 1
    assert simulated.ledger.spent() == []


@pytest.mark.parametrize("damage", ["reply", "cut", "empty", "digest"])
def test_a_damaged_round_is_refused(store: SiteStore, damage: str) -> None:
    store.save_round(PLAN, 1, head(), REPLY, charge(store, PLAN))
    with closing(sqlite3.connect(store.ledger.path)) as connection, connection:
        content = bytearray(connection.execute("SELECT content FROM rounds").fetchone()[0])
        if damage == "digest":
            connection.execute("UPDATE rounds SET digest = ?", ("0" * 64,))
        if damage == "reply":
            content[-1] ^= 1
        elif damage == "cut":
            del content[len(content) // 2 :]
        elif damage == "empty":
            content.clear()
        connection.execute("UPDATE rounds SET content = ?", (bytes(content),))
    own = head(0.3)
    with pytest.raises((CheckpointError, LedgerError), match=r"what this site wrote|committed"):
        store.last_round(PLAN, own)
    assert torch.equal(own.linear.weight, head(0.3).linear.weight)


def test_a_run_keeps_its_classes(store: SiteStore) -> None:
    store.save_round(PLAN, 1, head(), REPLY, charge(store, PLAN))
    with pytest.raises(CheckpointError, match="found '2 classes'; allowed: 3 classes"):
        store.last_round(PLAN, LinearHead(4, 3))


def test_a_plan_waits_for_the_operators_word(store: SiteStore) -> None:
    assert not store.approved(PLAN)
    waiting = store.directory / "plans" / f"{PLAN.hash}.json"
    assert waiting.read_text() == PLAN.canonical
    waiting.with_suffix(".approved").touch()
    assert store.approved(PLAN)
    waiting.with_suffix(".approved").unlink()
    assert store.approved(PLAN)  # it is in the ledger now
    assert not store.approved(PLAN.replace({"privacy.epsilon": 9}))


def test_a_sealed_head_comes_back_with_its_class_names(store: SiteStore) -> None:
    path = store.seal(PLAN, head(classes=("ill, acute", "gesund – ok")))
    sealed = load_sealed(path)
    again = sealed.head
    assert sealed.backbone == PLAN.backbone
    assert sealed.classes == ("ill, acute", "gesund – ok")
    assert torch.equal(again.linear.weight, head().linear.weight)
    assert not any(p.requires_grad for p in again.parameters())


def test_a_sealed_head_never_takes_part_in_a_round(store: SiteStore) -> None:
    store.save_round(PLAN, 1, head(0.4), REPLY, charge(store, PLAN))
    store.seal(PLAN, head(0.9))
    own = head(0.2)
    store.last_round(PLAN, own)
    assert torch.equal(own.linear.weight, head(0.4).linear.weight)
    before = store.ledger.spent()
    with pytest.raises(SealedError, match="never takes part again"):
        charge(store, PLAN, 2)
    assert store.ledger.spent() == before


def test_a_damaged_or_wrong_sealed_file_is_refused(tmp_path: Path, store: SiteStore) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_sealed(tmp_path / "nothing.safetensors")
    path = store.seal(PLAN, head())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_sealed(path)
    with pytest.raises(CheckpointError):  # a head of a round is not a sealed head
        load_sealed(store.ledger.path)


def test_files_are_for_their_owner_only(store: SiteStore) -> None:
    """A sealed head was fitted without noise: it is private data in another form."""
    store.save_round(PLAN, 1, head(), REPLY, charge(store, PLAN))
    store.seal(PLAN, head())
    names = set()
    for path in filter(Path.is_file, store.directory.rglob("*")):
        names.add(path.name)
        assert path.name == "ledger.lock" or stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, (
            path.name
        )
    assert {"ledger.sqlite3", "ledger.key", "ledger.witness", "sealed.safetensors"} <= names
