"""One answer for each row of a table: a class if the task has classes, else numbers.

`single-label` or `regression` on the features of a tabular backbone, whichever the task describes.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedgraft_client.tasks.regression import Regression
from fedgraft_client.tasks.single_label import SingleLabel
from fedgraft_common.errors import DataError
from fedgraft_common.task_spec import TaskSpec


def tabular(spec: TaskSpec, weights: Mapping[str, float] | None = None) -> SingleLabel | Regression:
    """The task of a table.

    Raises:
        DataError: both classes and targets, or neither; or what the task itself refuses.
    """
    if bool(spec.classes) == bool(spec.targets):
        raise DataError(
            "task", "classes and targets" if spec.classes else "neither classes nor targets",
            "classes (a class for each row) or targets (numbers for each row)",
            "State one of the two.",
        )  # fmt: skip
    return SingleLabel(spec, weights) if spec.classes else Regression(spec, weights)
