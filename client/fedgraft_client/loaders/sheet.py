"""A look at the data: a sheet of pictures or a page of text, for people at the site only."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedgraft_client.loaders.load import Loaded
from fedgraft_client.tasks import Task
from fedgraft_common.atomic import write_atomically
from fedgraft_common.modality import take

PICTURES = 48
LINES = 20
ACROSS = 8


def write_sheet(loaded: Loaded, task: Task, names: tuple[str, ...], directory: Path) -> Path | None:
    """Pictures, curves or lines of records from all over the source, with their labels.

    It shows private records, so it is readable by its owner only.

    Args:
        loaded: what was read.
        task: what the labels mean.
        names: of the columns of tabular data.
        directory: where the file is put.

    Returns:
        The file: contact-sheet.png or sample.txt; None without records.
    """
    count = len(loaded.records)
    if count == 0:
        return None
    most = PICTURES if loaded.modality not in ("text", "tabular") else LINES
    chosen = torch.linspace(0, count - 1, min(count, most)).round().long().unique()
    raw: Any = take(loaded.records.inputs, chosen)
    labels = loaded.records.labels[chosen]
    captions = [label_words(label, task) for label in labels]
    directory.mkdir(parents=True, exist_ok=True)
    if loaded.modality in ("text", "tabular"):
        lines = [f"{where + 1}\t{caption}\t{text}" for where, caption, text in zip(
            chosen.tolist(), captions, _lines(raw, names), strict=True)]  # fmt: skip
        path = directory / "sample.txt"
        write_atomically(path, ("\n".join(lines) + "\n").encode())
        return path
    images = raw[0] if loaded.modality == "image-text" else raw
    draw = _curve if loaded.modality in ("audio", "series") else _picture
    path = directory / "contact-sheet.png"
    write_atomically(path, _sheet(images, captions, draw, labels, task))
    return path


def label_words(label: torch.Tensor, task: Task) -> str:
    """A label for people: a class's name, several, or numbers."""
    classes = task.spec.classes
    if label.dim() == 0 and not label.is_floating_point():
        return classes[int(label)]
    if task.spec.kind == "multi-label":
        return ", ".join(name for name, one in zip(classes, label.tolist(), strict=True) if one)
    if task.spec.kind == "detection":
        kinds = [classes[int(k)] for k in label[:, 0].tolist() if k >= 0]
        return ", ".join(kinds) or "nothing"
    if label.dim() == 1 and label.is_floating_point():
        return ", ".join(f"{value:g}" for value in label.tolist())
    return ""


def _lines(raw: Any, names: tuple[str, ...]) -> list[str]:
    if isinstance(raw, torch.Tensor):
        return [
            ", ".join(f"{name} {v:.3g}" for name, v in zip(names, row, strict=True))
            for row in raw.tolist()
        ]
    return [" ".join(text.split()) for text in raw]


def _sheet(
    images: torch.Tensor,
    captions: list[str],
    draw: Callable[[Any, torch.Tensor], None],
    labels: torch.Tensor,
    task: Task,
) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    down = -(-len(captions) // ACROSS)
    figure = Figure(figsize=(1.5 * ACROSS, 1.75 * down), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, ACROSS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, caption, label in zip(axes, images, captions, labels, strict=False):
        draw(axis, image)
        if task.spec.kind == "segmentation":
            axis.imshow(label.numpy(), alpha=0.4, vmin=0, vmax=len(task.spec.classes) - 1)
        if task.spec.kind == "detection":
            _boxes(axis, label, image)
        axis.set_title(caption if len(caption) < 22 else caption[:20] + "…", fontsize=8)
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()


def _picture(axis: Any, image: torch.Tensor) -> None:
    frame = image[len(image) // 2] if image.dim() == 4 else image  # the middle of a video
    shown = frame.movedim(0, -1).squeeze(-1) if len(frame) in (1, 3) else frame.mean(dim=0)
    axis.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _curve(axis: Any, series: torch.Tensor) -> None:
    axis.plot(series.numpy(), linewidth=0.5)


def _boxes(axis: Any, label: torch.Tensor, image: torch.Tensor) -> None:
    from matplotlib.patches import Rectangle

    height, width = image.shape[-2:]
    for kind, left, up, right, down in label.tolist():
        if kind >= 0:
            corner = (left * width - 0.5, up * height - 0.5)
            size = ((right - left) * width, (down - up) * height)
            axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=f"C{int(kind)}"))
