"""Boxes: what a cell is taught is what it says, and overlaps are torchvision's."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou

from fedgraft_client.tasks.detection import Detection, _overlap
from fedgraft_common.errors import DataError, PlanError
from fedgraft_common.task_spec import TaskSpec

TASK = Detection(TaskSpec(kind="detection", classes=("cat", "dog")))
LABELS = torch.tensor(
    [
        [[0, 0.05, 0.10, 0.45, 0.60], [1, 0.50, 0.40, 0.95, 0.90]],
        [[1, 0.30, 0.30, 0.33, 0.34], [-1, 0, 0, 0, 0]],  # smaller than a cell
    ]
)


def perfect(labels: torch.Tensor) -> torch.Tensor:
    """Outputs that say at each cell what the labels teach there."""
    outputs = torch.zeros(len(labels), 6, 8, 8)
    sides, kind, held = TASK._assign(outputs, labels)
    outputs[:, :2] = -9
    flat = outputs.flatten(2)
    flat[:, 2:] = sides.log()
    for k in range(2):
        flat[:, k][held & (kind == k)] = 9
    return flat.view_as(outputs)


def test_what_is_taught_comes_back() -> None:
    found = TASK._found(perfect(LABELS))
    assert [one["labels"].sort().values.tolist() for one in found] == [[0, 1], [1]]
    box = found[1]["boxes"][0]
    assert torch.allclose(box, LABELS[1, 0, 1:], atol=1e-3)
    scores = TASK.scores(perfect(LABELS), LABELS)
    assert scores["mAP"] == scores["mAP50"] == pytest.approx(1.0)


def test_the_perfect_answer_costs_next_to_nothing() -> None:
    assert float(TASK.loss(perfect(LABELS), LABELS).max()) < 1e-3
    wrong = LABELS.clone()
    wrong[0, 0, 0] = 1
    assert float(TASK.loss(perfect(LABELS), wrong)[0]) > 0.5


def test_a_box_without_a_cells_centre_is_still_taught() -> None:
    _, _, held = TASK._assign(torch.zeros(1, 6, 8, 8), LABELS[1:])
    assert int(held.sum()) == 1


def test_overlap_against_torchvision() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.rand(2, 1, 4, 20, generator=generator).unbind()
    corners = [torch.cat([-d[0, :2], d[0, 2:]]).T for d in (one, other)]
    assert torch.allclose(_overlap(one, other)[0], box_iou(*corners).diagonal(), atol=1e-6)


def test_an_image_without_boxes_teaches_that_there_is_nothing() -> None:
    empty = torch.full((1, 3, 5), -1.0)
    loud, silent = torch.full((1, 6, 4, 4), 3.0), torch.full((1, 6, 4, 4), -9.0)
    assert float(TASK.loss(loud, empty)) > 1
    assert float(TASK.loss(silent, empty)) < 1e-3


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ([2, 0.1, 0.1, 0.2, 0.2], r"0 to 1 \(cat, dog\)"),
        ([0, 0.3, 0.1, 0.2, 0.2], "x1 < x2"),
        ([0, 0.1, 0.1, 0.2, 1.2], "inside the image"),
    ],
)
def test_boxes_that_make_no_sense(label: list[float], words: str) -> None:
    with pytest.raises(DataError, match=words):
        TASK.check(torch.tensor([[label]]), "site north")


def test_a_fixed_head_is_refused() -> None:
    with pytest.raises(PlanError, match="the sides of a box cannot be agreed on"):
        TASK.prototype(0, 8)
