"""How an image with a text becomes a backbone's input."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from fedgraft_common.modality import Raw, fits, is_pair
from fedgraft_common.preparations.image import ImagePreparation
from fedgraft_common.preparations.preparation import refused
from fedgraft_common.preparations.text import TextPreparation


class PairPreparation(BaseModel):
    """Both, side by side."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    modality: Literal["image-text"] = "image-text"
    image: ImagePreparation = Field(description="What happens to the image.")
    text: TextPreparation = Field(description="What happens to the text.")

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the model calls its inputs."""
        return (*self.image.input_names, *self.text.input_names)

    def __call__(self, raw: Raw) -> tuple[torch.Tensor, ...]:
        """Pixels (N, channels, size, size), token numbers and mask (N, length).

        Raises:
            DataError: no pair, or not as many texts as images.
        """
        if not (is_pair(raw) and fits(raw, "image-text")):
            raise refused(raw, "image-text")
        return (*self.image(raw[0]), *self.text(raw[1]))

    def example(self, records: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Synthetic pairs, prepared."""
        return (*self.image.example(records, generator), *self.text.example(records, generator))
