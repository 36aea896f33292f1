"""Finished rounds on disk, so that a killed server resumes at the next one.

    <directory>/round-000012.safetensors    adapter and strategy state after round 12

Each is written in one step and carries the plan's hash and a SHA-256 of its content. The newest
few are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedgraft_common.errors import CheckpointError
from fedgraft_common.files import load_tensors, save_tensors
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan

KEPT = 3
_ADAPTER, _STATE = "adapter/", "strategy/"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A finished round.

    Attributes:
        round: its number; 0 is the start.
        adapter: the adapter after it.
        strategy: what the aggregation strategy remembers.
    """

    round: int
    adapter: Tensors
    strategy: Tensors


def save_checkpoint(directory: Path, plan: Plan, checkpoint: Checkpoint, durable: bool) -> None:
    """Writes a finished round and removes the oldest ones."""
    tensors = {_ADAPTER + name: value for name, value in checkpoint.adapter.items()}
    tensors |= {_STATE + name: value for name, value in checkpoint.strategy.items()}
    path = directory / f"round-{checkpoint.round:06d}.safetensors"
    save_tensors(path, tensors, {"plan": plan.hash, "round": str(checkpoint.round)}, durable)
    for old in sorted(directory.glob("round-*.safetensors"))[:-KEPT]:
        old.unlink()


def newest_checkpoint(directory: Path, plan: Plan) -> Checkpoint | None:
    """The newest finished round of this plan, or None before the first.

    Raises:
        CheckpointError: it is damaged, or belongs to another plan.
    """
    paths = sorted(directory.glob("round-*.safetensors"))
    if not paths:
        return None
    tensors, metadata = load_tensors(paths[-1])
    if metadata.get("plan") != plan.hash:
        raise CheckpointError(
            str(paths[-1]), f"plan {metadata.get('plan', 'unknown')[:12]}",
            f"plan {plan.hash[:12]}, the one to resume",
            "Resume with the plan that started the run, or choose another directory.",
        )  # fmt: skip
    return Checkpoint(
        int(metadata["round"]),
        {n.removeprefix(_ADAPTER): t for n, t in tensors.items() if n.startswith(_ADAPTER)},
        {n.removeprefix(_STATE): t for n, t in tensors.items() if n.startswith(_STATE)},
    )
