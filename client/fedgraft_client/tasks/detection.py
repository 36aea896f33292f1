"""Boxes with a class each, any number in an image.

Labels: (N, M, 5) float32: class number and the box x1, y1, x2, y2 as shares of the image's width
and height; the class is -1 where an image has fewer than M boxes. Outputs: (N, K + 4, h, w): at
each cell of the feature map the log-odds of each class, and the logarithm of the distances to the
left, upper, right and lower side of its box, in cells.

One stage, without anchors (Tian et al. 2019, "FCOS"), because then a record's loss is a sum over
its own cells: no matching between records, no sampling, no normaliser over the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from fedgraft_client.tasks.reading import Labels, Written, class_numbers
from fedgraft_client.tasks.task import (
    Answer,
    Prototype,
    check_form,
    need_classes,
    no_count,
    no_prototype,
    weights_of,
)
from fedgraft_common.errors import DataError
from fedgraft_common.features import FeatureKind
from fedgraft_common.task_spec import TaskSpec

SURE = 0.05  # probability from which a box is an answer
OVERLAP = 0.5  # boxes of one class that overlap more are one
MOST = 100  # answers of one image
RARE = 0.01  # share of cells that hold something, to begin with (Lin et al. 2017, section 4.1)


class Detection:
    """A class and a box at each cell of the feature map.

    Args:
        spec: `classes`, at least one, and `boxes`.
        weights: the plan's weight of each class by name.

    Raises:
        DataError: no class, or two of one name.
    """

    features: FeatureKind = "map"
    primary: ClassVar[str] = "mAP"
    countable: ClassVar[bool] = False
    dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, spec: TaskSpec, weights: Mapping[str, float] | None = None) -> None:
        self.spec = spec
        self.classes = need_classes(spec, "task", least=1)
        self.weights = weights_of(self.classes, weights or {})

    @property
    def outputs(self) -> int:
        """K + 4."""
        return len(self.classes) + 4

    @property
    def start(self) -> torch.Tensor:
        """(K + 4,) bias of a new head: nearly every cell is empty."""
        bias = torch.zeros(self.outputs)
        bias[: len(self.classes)] = torch.logit(torch.tensor(RARE))
        return bias

    def prototype(self, seed: int, features: int) -> Prototype:
        """None: where a box ends is no direction that could be agreed on beforehand."""
        raise no_prototype(self, "the sides of a box cannot be agreed on beforehand")

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Focal loss of the classes plus minus the logarithm of the boxes' overlap."""
        from torchvision.ops import sigmoid_focal_loss

        kinds = len(self.classes)
        box, chosen, held = self._assign(outputs, labels)
        wanted = torch.arange(kinds, device=outputs.device)[None, :, None] == chosen[:, None]
        wanted = (wanted & held[:, None]).to(outputs)
        scores = outputs[:, :kinds].flatten(2)
        focal = sigmoid_focal_loss(scores, wanted, alpha=0.25, gamma=2.0, reduction="none")
        focal = focal * outputs.new_tensor(self.weights)[:, None]
        count = held.sum(dim=1).clamp(min=1)
        distances = outputs[:, kinds:].flatten(2).clamp(-6, 6).exp()
        overlap = -_overlap(distances, box).clamp(min=1e-6).log()
        found: torch.Tensor = (focal.sum(dim=(1, 2)) + (overlap * held).sum(dim=1)) / count
        return found

    def _assign(
        self, outputs: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What each cell should say: distances (N, 4, P), class (N, P), whether anything (N, P).

        A cell belongs to the smallest box that its centre is in, or that has its centre in it.
        """
        height, width = outputs.shape[-2:]
        scale = outputs.new_tensor([width, height, width, height])
        boxes = labels[:, :, 1:].to(outputs) * scale  # in cells
        x, y = _centres(outputs)
        low, high = boxes[:, :, None, :2], boxes[:, :, None, 2:]
        point = torch.stack([x, y], dim=-1)
        sides = torch.cat([point - low, high - point], dim=-1)  # (N, M, P, 4)
        middle = (low + high) / 2
        inside = (sides.amin(dim=-1) > 0) | ((point - middle).abs().amax(dim=-1) <= 0.5)
        inside = inside & (labels[:, :, :1] >= 0)
        area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
        size = torch.where(inside, area[:, :, None], torch.inf)
        first = size.argmin(dim=1)  # (N, P)
        at = first[:, None, :, None].expand(-1, 1, -1, 4)
        found = sides.gather(1, at)[:, 0].clamp(min=1e-3).transpose(1, 2)
        chosen = labels[:, :, 0].gather(1, first).long()
        return found, chosen, inside.any(dim=1)

    def read(self, written: Written) -> Labels:
        """A column of {bbox, category}: lists of [x, y, width, height] in pixels and of classes.

        That is how `datasets` writes COCO's boxes; `categories` and `label` are understood too.
        """
        labels = Labels(torch.zeros(len(written.columns[0]), self.spec.boxes, 5))
        labels.values[:, :, 0] = -1
        for i, value in enumerate(written.columns[0]):
            if value is None:
                labels.broken[i] = "no boxes; an image without any has empty lists"
                continue
            key = next((k for k in ("category", "categories", "label") if k in value), "category")
            boxes, kinds = value.get("bbox", []), value.get(key, [])
            if len(boxes) != len(kinds) or len(boxes) > self.spec.boxes:
                labels.broken[i] = (
                    f"{len(boxes)} boxes and {len(kinds)} classes; as many of both are needed, at "
                    f"most task.boxes = {self.spec.boxes}"
                )
                continue
            found, _, unknown = class_numbers(list(kinds), self.classes, written.names)
            labels.note_unknown(i, unknown)
            if boxes:
                corners = _in_view(torch.tensor(boxes).float(), written.sizes[i], written.size)
                seen = (corners[:, 2:] > corners[:, :2]).all(dim=1)  # not cut off with the margin
                count = int(seen.sum())
                labels.values[i, :count, 0] = torch.tensor(found).float()[seen]
                labels.values[i, :count, 1:] = corners[seen]
        return labels

    def check(self, labels: torch.Tensor, where: str) -> None:
        """Classes in range, boxes inside the image."""
        fits = labels.dim() == 3 and labels.shape[2] == 5 and labels.dtype is torch.float32
        form = "(records, boxes, 5) float32: class, x1, y1, x2, y2 as shares of the image"
        check_form(labels, form, fits, where)
        kind, boxes = labels[:, :, 0], labels[:, :, 1:]
        held = kind != -1
        wrong = held & ((kind < 0) | (kind >= len(self.classes)) | (kind != kind.floor()))
        if wrong.any():
            raise DataError(
                f"{where}: labels", float(kind[wrong][0]),
                f"0 to {len(self.classes) - 1} ({', '.join(self.classes)})",
                "Correct the label map.",
            )  # fmt: skip
        ordered = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
        wrong = held & ~(ordered & ((boxes >= 0) & (boxes <= 1)).all(dim=-1))
        if wrong.any():
            raise DataError(
                f"{where}: labels", [round(v, 4) for v in boxes[wrong][0].tolist()],
                "a box inside the image with x1 < x2 and y1 < y2, as shares of its size",
                "Correct this box, or leave the record out.",
            )  # fmt: skip

    def example(self, outputs: torch.Tensor) -> torch.Tensor:
        """Two boxes an image, the second missing in every other one."""
        count = len(outputs)
        labels = outputs.new_zeros(count, 2, 5)
        labels[:, 0, 1:] = labels.new_tensor([0.1, 0.1, 0.6, 0.7])
        labels[:, 1, 1:] = labels.new_tensor([0.5, 0.4, 0.9, 0.9])
        labels[:, :, 0] = torch.arange(count, device=outputs.device)[:, None] % len(self.classes)
        labels[::2, 1, 0] = -1
        return labels

    def _found(self, outputs: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """Boxes, scores and classes of each image, overlaps removed."""
        from torchvision.ops import batched_nms

        kinds, (height, width) = len(self.classes), outputs.shape[-2:]
        x, y = _centres(outputs)
        left, up, right, down = outputs[:, kinds:].flatten(2).clamp(-6, 6).exp().unbind(dim=1)
        corners = torch.stack(
            [(x - left) / width, (y - up) / height, (x + right) / width, (y + down) / height], -1
        ).clamp(0, 1)
        chances = outputs[:, :kinds].flatten(2).sigmoid()
        found = []
        for boxes, chance in zip(corners, chances, strict=True):
            kind, cell = (chance > SURE).nonzero(as_tuple=True)
            scores = chance[kind, cell]
            kept = batched_nms(boxes[cell], scores, kind, OVERLAP)[:MOST]
            found.append({"boxes": boxes[cell][kept], "scores": scores[kept], "labels": kind[kept]})
        return found

    def scores(self, outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """COCO's mean average precision (over overlaps of .5 to .95), and that at .5."""
        metric = _mean_average_precision()
        truth: list[dict[str, torch.Tensor]] = []
        for one in labels:
            held = one[:, 0] >= 0
            truth.append({"boxes": one[held, 1:] * 1000, "labels": one[held, 0].long()})
        found = [{**one, "boxes": one["boxes"] * 1000} for one in self._found(outputs)]
        metric.update(found, truth)
        values = metric.compute()
        named = {"mAP": float(values["map"]), "mAP50": float(values["map_50"])}
        return {k: v if v >= 0 else float("nan") for k, v in named.items()}  # -1: no box at all

    def correct(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """None: how right a set of boxes is, is no share of anything."""
        raise no_count(self, "how right a set of boxes is, is not a count of records")

    def answers(self, outputs: torch.Tensor) -> list[Answer]:
        """Class, probability and box (shares of the image) of what was found."""
        return [
            {
                "boxes": [
                    {
                        "label": self.classes[k],
                        "probability": round(p, 6),
                        "box": [round(v, 4) for v in b],
                    }
                    for k, p, b in zip(
                        one["labels"].tolist(),
                        one["scores"].tolist(),
                        one["boxes"].tolist(),
                        strict=True,
                    )
                ]
            }
            for one in self._found(outputs)
        ]


def _in_view(boxes: torch.Tensor, image: tuple[int, int], size: int | None) -> torch.Tensor:
    """[x, y, width, height] in pixels as corners in shares of what is seen of the image.

    Args:
        boxes: (M, 4).
        image: height and width in pixels.
        size: the shorter side was brought to it and the middle square kept; None: all is seen.
    """
    height, width = image
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    seen_width, seen_height = (width, height) if size is None else (min(image), min(image))
    left, up = (width - seen_width) / 2, (height - seen_height) / 2
    corners = corners - torch.tensor([left, up, left, up])
    scale = torch.tensor([seen_width, seen_height, seen_width, seen_height])
    return (corners / scale).clamp(0, 1)


def _centres(outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The centres of the cells, x and y, in cells: (P,) each, row by row."""
    height, width = outputs.shape[-2:]
    rows = torch.arange(height, device=outputs.device) + 0.5
    columns = torch.arange(width, device=outputs.device) + 0.5
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return x.flatten(), y.flatten()


def _overlap(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes around the same point: distances (N, 4, P) to (N, P)."""
    least = torch.minimum(one, other)
    shared = (least[:, 0] + least[:, 2]) * (least[:, 1] + least[:, 3])
    first = (one[:, 0] + one[:, 2]) * (one[:, 1] + one[:, 3])
    second = (other[:, 0] + other[:, 2]) * (other[:, 1] + other[:, 3])
    return shared / (first + second - shared)


def _mean_average_precision() -> Any:
    try:
        from torchmetrics.detection import MeanAveragePrecision

        return MeanAveragePrecision(box_format="xyxy", iou_type="bbox")
    except (ImportError, ModuleNotFoundError):
        raise DataError(
            "task: detection", "no pycocotools on this machine", "pycocotools, which counts boxes",
            "Install it: pip install 'fedgraft[detection]'.",
        ) from None  # fmt: skip
