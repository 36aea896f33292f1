"""How a video becomes a backbone's input."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from fedgraft_common.modality import Raw
from fedgraft_common.preparations.image import ImagePreparation
from fedgraft_common.preparations.preparation import checked


class VideoPreparation(BaseModel):
    """Frames at even distances, each prepared as an image."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    modality: Literal["video"] = "video"
    frames: int = Field(ge=1, description="Frames that the model looks at.")
    image: ImagePreparation = Field(description="What happens to each of them.")

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the model calls its inputs."""
        return self.image.input_names

    def __call__(self, raw: Raw) -> tuple[torch.Tensor, ...]:
        """(N, frames, channels, size, size) float32.

        Args:
            raw: (N, any number of frames, C, H, W) float32 in [0, 1]; a short video's frames are
                repeated.

        Raises:
            DataError: another form.
        """
        video = checked(raw, "video")
        chosen = torch.linspace(0, video.shape[1] - 1, self.frames).round().long()
        (images,) = self.image(video[:, chosen].flatten(0, 1))
        return (images.unflatten(0, (len(video), self.frames)),)

    def example(self, records: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Synthetic videos, prepared."""
        (images,) = self.image.example(records * self.frames, generator)
        return (images.unflatten(0, (records, self.frames)),)
