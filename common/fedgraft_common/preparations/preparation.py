"""What stands between a site's raw records and a backbone's model."""

from __future__ import annotations

from typing import Protocol, cast

import torch

from fedgraft_common.errors import DataError
from fedgraft_common.modality import FORMS, Modality, Raw, fits, form_of


class Preparation(Protocol):
    """Makes a model's inputs of raw records, one record at a time and with public constants.

    What it makes of a record depends on that record alone, never on the others or on how many
    there are: padding goes to a fixed length.
    """

    @property
    def modality(self) -> Modality:
        """Which raw form it wants."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the model calls its inputs, in the order of the tensors."""

    def __call__(self, raw: Raw) -> tuple[torch.Tensor, ...]:
        """The model's input tensors, each with N records first.

        Raises:
            DataError: records of another form.
        """

    def example(self, records: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Synthetic prepared inputs of the same form, for checks without data."""


def checked(raw: Raw, modality: Modality) -> torch.Tensor:
    """Raw records that are one tensor, if they have the form of their modality.

    Raises:
        DataError: they have not.
    """
    if not fits(raw, modality):
        raise refused(raw, modality)
    return cast(torch.Tensor, raw)


def refused(raw: Raw, modality: Modality) -> DataError:
    """The error for raw records of another form than the backbone wants."""
    return DataError(
        "records", form_of(raw), FORMS[modality],
        "Load the data in the form that the backbone takes, or choose another backbone.",
    )  # fmt: skip
