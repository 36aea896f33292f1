"""A table's task is a class or numbers, and it says which."""

from __future__ import annotations

import pytest

from fedgraft_client.tasks import build_task
from fedgraft_client.tasks.regression import Regression
from fedgraft_client.tasks.single_label import SingleLabel
from fedgraft_common.errors import DataError
from fedgraft_common.task_spec import TaskSpec


def test_classes_or_targets() -> None:
    assert isinstance(build_task(TaskSpec(kind="tabular", classes=("a", "b"))), SingleLabel)
    spec = TaskSpec(kind="tabular", targets=("x",), low=(0,), high=(1,))
    assert isinstance(build_task(spec), Regression)


NEITHER = TaskSpec(kind="tabular")
BOTH = TaskSpec(kind="tabular", classes=("a", "b"), targets=("x",))


@pytest.mark.parametrize("spec", [NEITHER, BOTH])
def test_both_or_neither_is_refused(spec: TaskSpec) -> None:
    with pytest.raises(DataError, match=r"classes \(a class for each row\) or targets"):
        build_task(spec)
