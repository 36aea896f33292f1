"""A site's records, checked before they are used.

Shapes: N records, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedgraft_common.errors import DataError


@dataclass(frozen=True, slots=True)
class Records:
    """Labelled images of one site.

    Attributes:
        images: (N, C, H, W) float32 in [0, 1].
        labels: (N,) int64, indices into the site's classes.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


def check_records(records: Records, classes: tuple[str, ...], site: str) -> None:
    """Refuses records that cannot be trained on.

    Raises:
        DataError: no records, a value that is not finite or outside [0, 1], a label outside the
            site's classes, or fewer than two classes.
    """
    where = f"site {site}"
    if len(classes) < 2:
        raise DataError(
            f"{where}: classes", ", ".join(classes) or "none", "at least two classes",
            "A head needs something to tell apart: list every class the task has, even if no "
            "record of it is here, or leave the site out.",
        )  # fmt: skip
    if len(records) == 0:
        raise DataError(
            f"{where}: records", 0, "at least one record",
            "Check the data source, or leave the site out.",
        )  # fmt: skip
    if records.images.dim() != 4 or len(records.images) != len(records.labels):
        raise DataError(
            f"{where}: images", tuple(records.images.shape),
            f"(records, channels, height, width) with {len(records.labels)} records",
            "Give one image and one label for each record.",
        )  # fmt: skip
    finite = torch.isfinite(records.images).flatten(1).all(dim=1)
    if not finite.all():
        broken = (~finite).nonzero().flatten().tolist()
        raise DataError(
            f"{where}: images", f"NaN or infinity in {len(broken)} records, first at {broken[0]}",
            "finite values", "Repair or remove these records.",
        )  # fmt: skip
    low, high = float(records.images.min()), float(records.images.max())
    if low < 0 or high > 1:
        raise DataError(
            f"{where}: images", f"values from {low:g} to {high:g}", "values in [0, 1]",
            "Scale by a public constant (255 for 8-bit images), never by the data's own range.",
        )  # fmt: skip
    outside = (records.labels < 0) | (records.labels >= len(classes))
    if outside.any():
        raise DataError(
            f"{where}: labels", int(records.labels[outside][0]),
            f"0 to {len(classes) - 1} ({', '.join(classes)})", "Correct the label map.",
        )  # fmt: skip
