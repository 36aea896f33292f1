"""Labels that depend on how a backbone cuts a record into tokens."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from fedgraft_client.data import Records
from fedgraft_client.tasks.task import Task
from fedgraft_common.backbone import Backbone
from fedgraft_common.modality import Raw


@runtime_checkable
class Aligned(Protocol):
    """A task whose labels belong to tokens."""

    def align(self, labels: torch.Tensor, inputs: Raw, backbone: Backbone) -> torch.Tensor:
        """Labels (N, T), one for each of the model's tokens.

        Args:
            labels: as they were loaded.
            inputs: raw records.
            backbone: cuts them into tokens.

        Raises:
            DataError: it does not, or they do not fit.
        """


def aligned(task: Task, records: Records, backbone: Backbone) -> torch.Tensor:
    """The labels as the task's loss takes them for this backbone."""
    if isinstance(task, Aligned):
        return task.align(records.labels, records.inputs, backbone)
    return records.labels
