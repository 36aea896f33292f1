"""Time series: recordings of sensors, ECGs, prices."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedgraft_client.loaders.audio import fit_length
from fedgraft_client.loaders.table import Broken
from fedgraft_common.reading import Reading


class SeriesReader:
    """Reads one series from lists in a table.

    Args:
        columns: one list of numbers for each channel, or a single column of lists (time) or of
            lists of lists (time, channels).
        reading: length.
    """

    def __init__(self, columns: tuple[str, ...], reading: Reading) -> None:
        self.columns = columns
        self._reading = reading

    def __call__(self, values: list[Any]) -> torch.Tensor:
        """(time, channels) float32.

        Raises:
            Broken: not numbers, channels of different lengths, a gap, or nothing.
        """
        try:
            parts = [np.asarray(value, dtype=np.float32) for value in values]
            series = parts[0] if len(parts) == 1 else np.stack(parts, axis=1)
        except (TypeError, ValueError):
            raise Broken("not a list of numbers, or channels of different lengths") from None
        series = series[:, None] if series.ndim == 1 else series
        if series.ndim != 2 or len(series) == 0:
            raise Broken(f"shape {series.shape} where (time, channels) should be")
        if not np.isfinite(series).all():
            raise Broken("NaN, infinity or a gap in the series")
        return fit_length(torch.from_numpy(series), self._reading.samples)
