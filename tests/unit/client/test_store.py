"""What a site keeps: whole, or refused; and a sealed head stays sealed."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch

from fedgraft_client.head import LinearHead
from fedgraft_client.store import SiteStore, load_sealed
from fedgraft_common.errors import CheckpointError
from fedgraft_common.plan import Plan

PLAN = Plan().replace({"head.training": "private"})


def head(value: float = 0.5) -> LinearHead:
    made = LinearHead(4, 2)
    torch.nn.init.constant_(made.linear.weight, value)
    torch.nn.init.constant_(made.linear.bias, -value)
    return made


REPLY = {"b.weight": torch.randn(3, 2), "a": torch.tensor([1.5])}


def test_before_the_first_round_nothing_is_changed(tmp_path: Path) -> None:
    own = head()
    assert SiteStore(tmp_path).last_round(PLAN, own) == (0, {})
    assert torch.equal(own.linear.weight, head().linear.weight)


@pytest.mark.parametrize("durable", [True, False])
def test_head_and_reply_come_back_from_one_file(tmp_path: Path, durable: bool) -> None:
    store = SiteStore(tmp_path, durable)
    store.save_round(PLAN, 1, head(0.1), {"a": torch.zeros(1)})
    store.save_round(PLAN, 2, head(0.7), REPLY)
    again = LinearHead(4, 2)
    number, reply = SiteStore(tmp_path).last_round(PLAN, again)
    assert number == 2
    assert set(reply) == set(REPLY)
    assert all(torch.equal(reply[name], REPLY[name]) for name in REPLY)
    assert torch.equal(again.linear.weight, head(0.7).linear.weight)
    assert torch.equal(again.linear.bias, head(0.7).linear.bias)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["round.safetensors"]


def test_plans_are_kept_apart(tmp_path: Path) -> None:
    store = SiteStore(tmp_path)
    store.save_round(PLAN, 3, head(), REPLY)
    assert store.last_round(PLAN.replace({"seed": 9}), head()) == (0, {})


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "metadata"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    store = SiteStore(tmp_path)
    store.save_round(PLAN, 1, head(), REPLY)
    (path,) = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[-1] ^= 1
    elif damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "empty":
        content.clear()
    else:
        content = bytearray(bytes(content).replace(b'"round":"1"', b'"round":"2"'))
    path.write_bytes(content)
    own = head(0.3)
    with pytest.raises(CheckpointError, match="undamaged"):
        store.last_round(PLAN, own)
    assert torch.equal(own.linear.weight, head(0.3).linear.weight)


def test_a_sealed_head_comes_back_with_its_class_names(tmp_path: Path) -> None:
    path = SiteStore(tmp_path).seal(PLAN, head(), ("ill, acute", "gesund – ok"))
    sealed = load_sealed(path)
    again = sealed.head
    assert sealed.backbone == PLAN.backbone
    assert sealed.classes == ("ill, acute", "gesund – ok")
    assert torch.equal(again.linear.weight, head().linear.weight)
    assert not any(p.requires_grad for p in again.parameters())


def test_a_sealed_head_never_takes_part_in_a_round(tmp_path: Path) -> None:
    store = SiteStore(tmp_path)
    store.seal(PLAN, head(0.9), ("a", "b"))
    own = head(0.2)
    assert store.last_round(PLAN, own) == (0, {})
    assert torch.equal(own.linear.weight, head(0.2).linear.weight)
    store.save_round(PLAN, 1, head(0.4), REPLY)
    store.seal(PLAN, head(0.9), ("a", "b"))
    store.last_round(PLAN, own)
    assert torch.equal(own.linear.weight, head(0.4).linear.weight)


def test_a_damaged_or_wrong_sealed_file_is_refused(tmp_path: Path) -> None:
    store = SiteStore(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_sealed(tmp_path / "nothing.safetensors")
    path = store.seal(PLAN, head(), ("a", "b"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_sealed(path)
    store.save_round(PLAN, 1, head(), REPLY)
    with pytest.raises(CheckpointError):  # a head of a round is not a sealed head
        load_sealed(path.with_name("round.safetensors"))


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    """A sealed head was fitted without noise: it is private data in another form."""
    store = SiteStore(tmp_path)
    store.save_round(PLAN, 1, head(), REPLY)
    store.seal(PLAN, head(), ("a", "b"))
    for path in tmp_path.rglob("*.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path.name
