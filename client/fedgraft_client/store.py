"""What a site keeps between rounds and restarts: its head and its last reply, and sealed heads.

    <directory>/<plan hash>/round.safetensors    head and reply of the last finished round
    <directory>/<plan hash>/sealed.safetensors   the refitted head: for predictions at home only

Head and reply are one file, written in one step: after a crash they are from the same round, and
a request that comes again gets the same bytes again instead of a second look at the data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fedgraft_client.head import LinearHead
from fedgraft_common.errors import CheckpointError
from fedgraft_common.files import load_tensors, save_tensors
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Backbone, Plan

_HEAD, _REPLY = "head.", "reply."


class SiteStore:
    """One site's files.

    Args:
        directory: private to the site.
        durable: whether a write waits for the disk; a simulation need not.
    """

    def __init__(self, directory: Path, durable: bool = True) -> None:
        self.directory = directory
        self._durable = durable

    def _folder(self, plan: Plan) -> Path:
        return self.directory / plan.hash

    def save_round(self, plan: Plan, number: int, head: LinearHead, reply: Tensors) -> None:
        """Keeps what a finished round left behind, before the reply is sent."""
        tensors = {_HEAD + name: value for name, value in head.state_dict().items()}
        tensors |= {_REPLY + name: value for name, value in reply.items()}
        path = self._folder(plan) / "round.safetensors"
        save_tensors(path, tensors, {"round": str(number)}, self._durable)

    def last_round(self, plan: Plan, head: LinearHead) -> tuple[int, Tensors]:
        """Sets `head` to the stored one.

        Returns:
            Number and reply of the last finished round; (0, {}) and an untouched head before it.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self._folder(plan) / "round.safetensors"
        if not path.exists():
            return 0, {}
        tensors, metadata = load_tensors(path)
        head.load_state_dict(_with_prefix(tensors, _HEAD))
        return int(metadata["round"]), _with_prefix(tensors, _REPLY)

    def seal(self, plan: Plan, head: LinearHead, classes: tuple[str, ...]) -> Path:
        """Keeps a refitted head for predictions at home."""
        path = self._folder(plan) / "sealed.safetensors"
        facts = {
            "classes": json.dumps(classes),
            "backbone": plan.backbone.model_dump_json(),
            "plan": plan.hash,
        }
        save_tensors(path, head.state_dict(), facts, self._durable)
        return path


@dataclass(frozen=True, slots=True)
class SealedHead:
    """A refitted head and what it belongs to.

    Attributes:
        head: frozen.
        classes: names, K of them.
        backbone: the plan's backbone, pooling and hash included.
    """

    head: LinearHead
    classes: tuple[str, ...]
    backbone: Backbone


def load_sealed(path: Path) -> SealedHead:
    """Reads what `SiteStore.seal` wrote.

    Raises:
        CheckpointError: missing, damaged, or another kind of file.
    """
    tensors, metadata = load_tensors(path)
    if "classes" not in metadata or "linear.weight" not in tensors:
        raise CheckpointError(
            str(path), "no head with class names", "a sealed.safetensors of a site",
            "Name the sealed head, not the file of a round.",
        )  # fmt: skip
    classes, features = tensors["linear.weight"].shape
    head = LinearHead(features, classes)
    head.load_state_dict(tensors)
    return SealedHead(
        head.requires_grad_(False),
        tuple(json.loads(metadata["classes"])),
        Backbone.model_validate_json(metadata["backbone"]),
    )


def _with_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
