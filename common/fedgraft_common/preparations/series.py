"""How a time series becomes a backbone's input."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.nn import functional

from fedgraft_common.errors import DataError
from fedgraft_common.modality import Raw
from fedgraft_common.preparations.preparation import checked


class SeriesPreparation(BaseModel):
    """The last `length` steps; what a shorter series lacks in front is marked as not observed."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    modality: Literal["series"] = "series"
    length: int = Field(ge=1, description="Steps that the model looks at.")
    channels: int = Field(ge=1, description="Values in each step.")

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the model calls its inputs."""
        return ("past_values", "past_observed_mask")

    def __call__(self, raw: Raw) -> tuple[torch.Tensor, ...]:
        """Values and mask, (N, length, channels) float32 and bool.

        Args:
            raw: (N, time, channels) float32.

        Raises:
            DataError: another form, or another number of channels.
        """
        series = checked(raw, "series")
        if series.shape[2] != self.channels:
            raise DataError(
                "records", f"{series.shape[2]} channels", f"{self.channels}, as the backbone has",
                "Choose the channels, or another backbone.",
            )  # fmt: skip
        series = series[:, -self.length :]
        missing = self.length - series.shape[1]
        mask = torch.ones_like(series, dtype=torch.bool)
        return functional.pad(series, (0, 0, missing, 0)), functional.pad(mask, (0, 0, missing, 0))

    def example(self, records: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Synthetic series, the first half of every second one not observed."""
        shape = (records, self.length, self.channels)
        mask = torch.ones(shape, dtype=torch.bool)
        mask[1::2, : self.length // 2] = False
        return torch.randn(shape, generator=generator) * mask, mask
