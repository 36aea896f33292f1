from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedgraft_common.errors import CheckpointError
from fedgraft_common.plan import Plan
from fedgraft_server.checkpoint import KEPT, Checkpoint, newest_checkpoint, save_checkpoint

PLAN = Plan()


def finished(number: int) -> Checkpoint:
    """After round `number`; adapter and strategy share a tensor name."""
    adapter = {"a": torch.full((3,), float(number)), "strategy/b": torch.ones(2)}
    return Checkpoint(number, adapter, {"momentum_vector/list/0": torch.tensor([number, 0.5])})


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("durable", [True, False])
def test_round_trip(tmp_path: Path, durable: bool) -> None:
    save_checkpoint(tmp_path / "run", PLAN, finished(3), durable)
    found = newest_checkpoint(tmp_path / "run", PLAN)
    assert found is not None
    assert found.round == 3
    for mine, theirs in (
        (found.adapter, finished(3).adapter),
        (found.strategy, finished(3).strategy),
    ):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], value) for name, value in theirs.items())


def test_before_the_first_round_there_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path, PLAN) is None
    assert newest_checkpoint(tmp_path / "not-made-yet", PLAN) is None


def test_newest_of_several_and_only_a_few_are_kept(tmp_path: Path) -> None:
    numbers = [1, 2, 9, 10, 99, 100, 1000]
    for number in numbers:
        save_checkpoint(tmp_path, PLAN, finished(number), durable=False)
        found = newest_checkpoint(tmp_path, PLAN)
        assert found is not None
        assert found.round == number
    assert files(tmp_path) == [f"round-{n:06d}.safetensors" for n in numbers[-KEPT:]]


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "round-notes.txt").write_text("mine")
    for number in range(1, 6):
        save_checkpoint(tmp_path, PLAN, finished(number), durable=False)
    assert (tmp_path / "round-notes.txt").exists()


def test_an_unfinished_write_is_not_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, PLAN, finished(1), durable=False)
    (tmp_path / ".round-000002.safetensors.77.tmp").write_bytes(b"half of it")
    found = newest_checkpoint(tmp_path, PLAN)
    assert found is not None
    assert found.round == 1


def test_damaged_newest_is_named_with_what_to_do(tmp_path: Path) -> None:
    for number in (1, 2):
        save_checkpoint(tmp_path, PLAN, finished(number), durable=False)
    newest = tmp_path / "round-000002.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        newest_checkpoint(tmp_path, PLAN)
    assert caught.value.field == str(newest)
    assert "delete it: an older checkpoint" in caught.value.action
    newest.unlink()  # the action works
    found = newest_checkpoint(tmp_path, PLAN)
    assert found is not None
    assert found.round == 1


def test_another_plan_s_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, PLAN, finished(1), durable=False)
    other = PLAN.replace({"privacy.epsilon": 3})
    with pytest.raises(CheckpointError) as caught:
        newest_checkpoint(tmp_path, other)
    assert PLAN.hash[:12] in str(caught.value.value)
    assert other.hash[:12] in caught.value.allowed
    assert "choose another directory" in caught.value.action


def test_a_simulation_s_tables_do_not_matter(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, PLAN, finished(1), durable=False)
    assert newest_checkpoint(tmp_path, PLAN.replace({"sites.count": 3})) is not None
