"""A class for a sequence: the mean over its steps, padding left out."""

from __future__ import annotations

import torch

from fedgraft_client.task_head import empty_head
from fedgraft_client.tasks import build_task
from fedgraft_common.task_spec import TaskSpec

TASK = build_task(TaskSpec(kind="sequence-to-class", classes=("a", "b")))


def test_padding_changes_nothing() -> None:
    head = empty_head(TASK, 4)
    torch.nn.init.normal_(head.linear.weight)
    torch.nn.init.normal_(head.linear.bias)
    steps = torch.randn(1, 3, 4)
    padded = torch.cat([steps, torch.zeros(1, 5, 4)], dim=1)
    assert torch.allclose(head(steps), head(padded), atol=1e-6)
    assert torch.allclose(head(steps)[0], torch.stack([head(s[None]) for s in steps[0][:, None]])
                          .mean(dim=0)[0], atol=1e-6)  # fmt: skip
    assert TASK.features == "tokens"
