"""What a site keeps between rounds and restarts: ledger, head, last reply, sealed heads.

    <directory>/ledger.sqlite3                   the account; head and reply of the last round
    <directory>/<plan hash>/sealed.safetensors   the refitted head: for predictions at home only

Head, reply and the ledger's commit are one transaction: after a crash they are from the same
round, and a request that comes again gets the same bytes again instead of a second look at the
data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedgraft_client.head import LinearHead
from fedgraft_client.ledger import Ledger
from fedgraft_client.task_head import empty_head
from fedgraft_client.tasks import Task, build_task
from fedgraft_common.errors import CheckpointError
from fedgraft_common.files import load_tensors, save_tensors, write_atomically
from fedgraft_common.messages import Tensors, digest, to_record
from fedgraft_common.plan import Backbone, Plan
from fedgraft_common.secure_aggregation import SiteState
from fedgraft_common.task_spec import TaskSpec

_HEAD, _REPLY = "head.", "reply."


class SiteStore:
    """One site's files.

    Args:
        directory: private to the site.
        durable: whether a write waits for the disk; a simulation need not.
        dataset: the site's own name for its data.
        unit: what the promise protects: `record`, or a column.
        witness: where the ledger's witness is kept; see `Ledger`.

    Raises:
        LedgerError: the ledger is damaged, was rolled back or is in use.
    """

    def __init__(
        self,
        directory: Path,
        durable: bool = True,
        dataset: str = "data",
        unit: str = "record",
        witness: Path | None = None,
    ) -> None:
        self.directory = directory
        self.ledger = Ledger(directory, dataset, unit, witness, durable)
        self._durable = durable

    def close(self) -> None:
        """Lets another process have it."""
        self.ledger.close()

    def save_round(
        self,
        plan: Plan,
        number: int,
        head: LinearHead,
        reply: Tensors,
        reservation: int | None,
        state: SiteState | None = None,
    ) -> None:
        """Keeps what a finished round left behind, before the reply is sent.

        Args:
            plan: the run.
            number: of the round.
            head: the site's own, after the round.
            reply: what will leave.
            reservation: the ledger entry that charged for it; None without DP.
            state: of secure aggregation, after this reply.
        """
        tensors = {_HEAD + name: value for name, value in head.state_dict().items()}
        tensors |= {_REPLY + name: value for name, value in reply.items()}
        content = save({n: t.detach().cpu().contiguous() for n, t in sorted(tensors.items())})
        seal = digest(to_record(reply))
        if reservation is None:
            self.ledger.keep(plan.hash, number, seal, content)
        else:
            self.ledger.commit(reservation, plan.hash, number, seal, content, state)

    def last_round(self, plan: Plan, head: LinearHead) -> tuple[int, Tensors]:
        """Sets `head` to the stored one.

        Returns:
            Number and reply of the last finished round; (0, {}) and an untouched head before it.

        Raises:
            CheckpointError: what is stored is damaged, or is for other classes.
        """
        finished = self.ledger.finished(plan.hash)
        if finished is None:
            return 0, {}
        try:
            tensors = load(finished.content)
        except SafetensorError as error:
            raise self._damaged(str(error)) from None
        reply = _with_prefix(tensors, _REPLY)
        if digest(to_record(reply)) != finished.digest:
            raise self._damaged("a reply that is not the one the ledger committed")
        try:
            head.load_state_dict(_with_prefix(tensors, _HEAD))
        except RuntimeError:
            raise CheckpointError(
                f"{self.ledger.path}: head", f"{len(tensors[_HEAD + 'linear.bias'])} classes",
                f"{head.linear.out_features} classes, as the site file says now",
                "A run keeps the classes it began with; put them back, or start a new run.",
            ) from None  # fmt: skip
        return finished.round, reply

    def _damaged(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.ledger.path}: last round", found, "what this site wrote",
            "Restore the ledger from a backup, then `fedgraft ledger recover`.",
        )  # fmt: skip

    def save_final(self, plan: Plan, adapter: Tensors) -> None:
        """Keeps the run's final adapter, as the server sent it."""
        path = self.directory / plan.hash / "final.safetensors"
        save_tensors(path, adapter, {"plan": plan.hash}, self._durable)

    def final(self, plan: Plan) -> Tensors:
        """The run's final adapter.

        Raises:
            CheckpointError: it has not arrived, or is damaged.
        """
        return load_tensors(self.directory / plan.hash / "final.safetensors")[0]

    def approved(self, plan: Plan) -> bool:
        """Whether the operator agreed to a plan; if not, it is kept for them to look at.

        The operator's word comes as a file, since only the daemon writes to the ledger; it is
        written down there when it is first seen.
        """
        if self.ledger.approved(plan.hash):
            return True
        waiting = self.directory / "plans" / f"{plan.hash}.json"
        if not waiting.exists():
            write_atomically(waiting, plan.canonical.encode(), self._durable)
        if not waiting.with_suffix(".approved").exists():
            return False
        self.ledger.approve(plan.hash, plan.name)
        return True

    def seal(self, plan: Plan, head: LinearHead) -> Path:
        """Keeps a refitted head for predictions at home, and ends the run at this site."""
        path = self.directory / plan.hash / "sealed.safetensors"
        facts = {
            "task": head.task.spec.model_dump_json(),
            "backbone": plan.backbone.model_dump_json(),
            "plan": plan.hash,
        }
        self.ledger.seal(plan.hash)
        save_tensors(path, head.state_dict(), facts, self._durable)
        return path


@dataclass(frozen=True, slots=True)
class SealedHead:
    """A refitted head and what it belongs to.

    Attributes:
        head: frozen; knows its task.
        backbone: the plan's backbone, pooling and hash included.
    """

    head: LinearHead
    backbone: Backbone

    @property
    def task(self) -> Task:
        """What it predicts."""
        return self.head.task

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, K of them; empty if the task has none."""
        return self.task.spec.classes


def load_sealed(path: Path) -> SealedHead:
    """Reads what `SiteStore.seal` wrote.

    Raises:
        CheckpointError: missing, damaged, or another kind of file.
    """
    tensors, metadata = load_tensors(path)
    if not {"task", "classes"} & set(metadata) or "linear.weight" not in tensors:
        raise CheckpointError(
            str(path), "no head with a task", "a sealed.safetensors of a site",
            "Name the sealed head, not the file of a round.",
        )  # fmt: skip
    outputs, features = tensors["linear.weight"].shape
    head = empty_head(build_task(_spec(metadata)), features, outputs)
    head = head.with_affine() if "affine.weight" in tensors else head
    head.load_state_dict(tensors)
    return SealedHead(
        head.requires_grad_(False), Backbone.model_validate_json(metadata["backbone"])
    )


def _spec(metadata: Mapping[str, str]) -> TaskSpec:
    """The task of a sealed head; version 0.1 knew classes only."""
    if "task" in metadata:
        return TaskSpec.model_validate_json(metadata["task"])
    return TaskSpec(classes=tuple(json.loads(metadata["classes"])))


def _with_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
