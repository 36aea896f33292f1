"""How a sound becomes a backbone's input."""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.nn import functional

from fedgraft_common.errors import BackboneError
from fedgraft_common.modality import Raw
from fedgraft_common.preparations.preparation import checked

PLAIN = ("wav2vec2", "hubert", "wavlm", "unispeech")
"""Models that take the wave itself."""


class AudioPreparation(BaseModel):
    """The backbone's own feature extractor; a sound is cut, or filled up with silence.

    Attributes:
        rate: samples a second that the backbone was trained with; data loaders resample to it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    modality: Literal["audio"] = "audio"
    length: int = Field(
        default=64_000, ge=1, le=1 << 26, description="Samples of a sound; 4 s at 16 kHz."
    )
    rate: int = Field(default=16_000, ge=1, description="Samples a second.")
    input_name: str = Field(default="input_values", description="What the model calls its input.")
    kind: str = Field(default="wav2vec2", description="The model's family.")
    directory: Path = Field(description="Where the feature extractor's settings are.")

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the model calls its inputs."""
        return (self.input_name,)

    @cached_property
    def _extractor(self) -> Any:
        import transformers

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if (self.directory / "preprocessor_config.json").is_file():
                    return transformers.AutoFeatureExtractor.from_pretrained(
                        self.directory, local_files_only=True, trust_remote_code=False
                    )
                if self.kind in PLAIN:
                    return transformers.Wav2Vec2FeatureExtractor(sampling_rate=self.rate)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise BackboneError(
                str(self.directory), reason, "a feature extractor that transformers can read",
                "Copy preprocessor_config.json again.",
            ) from None  # fmt: skip
        raise BackboneError(
            str(self.directory), "no preprocessor_config.json",
            f"the settings of the feature extractor of {self.kind}",
            "Save it there: feature_extractor.save_pretrained(directory).",
        )  # fmt: skip

    def __call__(self, raw: Raw) -> tuple[torch.Tensor, ...]:
        """Inputs of the model, one sound after the other.

        Args:
            raw: (N, samples) float32 at `rate` samples a second.

        Raises:
            DataError: another form.
            BackboneError: no feature extractor.
        """
        waves = checked(raw, "audio")[:, : self.length]
        waves = functional.pad(waves, (0, self.length - waves.shape[1]))
        rows = [
            self._extractor(wave.numpy(), sampling_rate=self.rate, return_tensors="pt")[
                self.input_name
            ]
            for wave in waves
        ]
        return (torch.cat(rows).float(),)

    def example(self, records: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Synthetic sounds, prepared: noise."""
        return self(0.1 * torch.randn(records, self.length, generator=generator))
