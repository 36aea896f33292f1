"""How an image becomes a backbone's input."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from torch.nn import functional

from fedgraft_common.modality import Raw
from fedgraft_common.preparations.preparation import checked


class ImagePreparation(BaseModel):
    """Resizing and normalising; the constants are public, never from site data."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    modality: Literal["image"] = "image"
    channels: int = Field(ge=1, description="Colour channels.")
    size: int = Field(ge=1, description="Side of the square input in pixels.")
    mean: tuple[float, ...] = Field(description="Subtracted per channel, of values in [0, 1].")
    std: tuple[PositiveFloat, ...] = Field(description="Divided by per channel.")
    order: Literal["RGB", "BGR"] = Field(
        default="RGB", description="Order in which the model wants colours; mean and std follow it."
    )

    @model_validator(mode="after")
    def _one_constant_per_channel(self) -> ImagePreparation:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std need {self.channels} values, one per channel")
        return self

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the model calls its inputs."""
        return ("pixel_values",)

    def __call__(self, raw: Raw) -> tuple[torch.Tensor, ...]:
        """Resizes and normalises.

        Args:
            raw: (N, C, H, W) float32 in [0, 1]; one channel is repeated if more are needed, and
                any other number of channels than the model's becomes grey first.

        Returns:
            (N, channels, size, size) float32.
        """
        images = checked(raw, "image")
        if images.shape[1] == 1 and self.channels > 1:
            images = images.expand(-1, self.channels, -1, -1)
        elif images.shape[1] != self.channels:
            images = images.mean(dim=1, keepdim=True).expand(-1, self.channels, -1, -1)
        if images.shape[-2:] != (self.size, self.size):
            images = functional.interpolate(
                images, size=(self.size, self.size), mode="bilinear", antialias=True
            )
        if self.order == "BGR":
            images = images.flip(1)
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        return ((images - mean) / std,)

    def example(self, records: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Synthetic prepared inputs, (records, channels, size, size) float32."""
        shape = (records, self.channels, self.size, self.size)
        return (torch.randn(shape, generator=generator),)
