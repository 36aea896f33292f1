"""How a text becomes a backbone's input."""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from fedgraft_common.errors import BackboneError
from fedgraft_common.modality import Raw, fits
from fedgraft_common.preparations.preparation import refused


class TextPreparation(BaseModel):
    """The backbone's own tokenizer; every text is cut or padded to one public length.

    The length is the plan's, never that of the longest text at a site: what becomes of a record
    depends on that record alone.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    modality: Literal["text"] = "text"
    length: int = Field(default=128, ge=1, le=1 << 20, description="Tokens of a text.")
    vocabulary: int = Field(ge=1, description="Number of tokens that exist.")
    pad: int = Field(default=0, ge=0, description="Token that fills up.")
    side: Literal["left", "right"] = Field(default="right", description="Where it fills up.")
    directory: Path = Field(description="Where the tokenizer's files are.")

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the model calls its inputs."""
        return ("input_ids", "attention_mask")

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, which fills up where this preparation says.

        Raises:
            BackboneError: the directory has none.
        """
        from transformers import AutoTokenizer

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = AutoTokenizer.from_pretrained(
                    self.directory, local_files_only=True, trust_remote_code=False
                )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BackboneError(
                str(self.directory), f"no tokenizer that can be read ({reason})",
                "the tokenizer's files beside the weights",
                "Save it there: tokenizer.save_pretrained(directory).",
            ) from None  # fmt: skip
        if found.pad_token_id is None:  # the mask hides them, so any token will do
            found.pad_token = found.eos_token or found.convert_ids_to_tokens(self.pad)
        found.padding_side = self.side
        return found

    def __call__(self, raw: Raw) -> tuple[torch.Tensor, ...]:
        """Token numbers and mask, (N, length) int64 each.

        Raises:
            DataError: no strings.
            BackboneError: no tokenizer.
        """
        if not fits(raw, "text"):
            raise refused(raw, "text")
        found = self.tokenizer(
            list(raw), padding="max_length", truncation=True, max_length=self.length,
            return_tensors="pt",
        )  # fmt: skip
        return found["input_ids"], found["attention_mask"]

    def words(self, raw: Raw) -> torch.Tensor:
        """Which word each token belongs to: (N, length) int64, -1 for padding and marks.

        Words are what single white spaces separate; they count from 0.

        Raises:
            DataError: no strings.
            BackboneError: no tokenizer, or a slow one, which does not say where its tokens are.
        """
        if not fits(raw, "text"):
            raise refused(raw, "text")
        if not self.tokenizer.is_fast:
            raise BackboneError(
                str(self.directory), "a tokenizer that does not say where its tokens are",
                "tokenizer.json, of a fast tokenizer", "Choose another backbone for this task.",
            )  # fmt: skip
        texts = [str(text) for text in raw]
        found = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.length,
            return_offsets_mapping=True, return_tensors="pt",
        )  # fmt: skip
        rows = [
            [text.count(" ", 0, end - 1) if end > begin else -1 for begin, end in spans]
            for text, spans in zip(texts, found["offset_mapping"].tolist(), strict=True)
        ]
        return torch.where(found["attention_mask"] != 0, torch.tensor(rows), -1)

    def example(self, records: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Synthetic texts of different lengths, as they come out of the tokenizer."""
        ids = torch.randint(0, self.vocabulary, (records, self.length), generator=generator)
        lengths = torch.randint(
            (self.length + 1) // 2, self.length + 1, (records, 1), generator=generator
        )
        places = torch.arange(self.length)[None]
        if self.side == "left":
            places = places.flip(1)
        mask = places < lengths
        ids = torch.where(ids == self.pad, (self.pad + 1) % self.vocabulary, ids)
        return torch.where(mask, ids, self.pad), mask.long()
