"""How a row of a table becomes a backbone's input."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

from fedgraft_common.errors import DataError
from fedgraft_common.modality import Raw
from fedgraft_common.preparations.preparation import checked


class TablePreparation(BaseModel):
    """Columns in public units: the constants are the plan's, never those of a site's table."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    modality: Literal["tabular"] = "tabular"
    columns: int = Field(ge=1, description="Number of columns.")
    mean: tuple[float, ...] = Field(default=(), description="Subtracted per column; empty: 0.")
    std: tuple[PositiveFloat, ...] = Field(default=(), description="Divided by; empty: 1.")

    @model_validator(mode="after")
    def _one_constant_per_column(self) -> TablePreparation:
        for values in (self.mean, self.std):
            if len(values) not in (0, self.columns):
                raise ValueError(f"mean and std need {self.columns} values, one per column")
        return self

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the model calls its inputs."""
        return ("values",)

    def __call__(self, raw: Raw) -> tuple[torch.Tensor, ...]:
        """(N, columns) float32.

        Raises:
            DataError: another form, or another number of columns.
        """
        rows = checked(raw, "tabular")
        if rows.shape[1] != self.columns:
            raise DataError(
                "records", f"{rows.shape[1]} columns", f"{self.columns}, as the backbone has",
                "Choose the columns, or correct backbone.options.columns.",
            )  # fmt: skip
        if self.mean:
            rows = rows - torch.tensor(self.mean)
        if self.std:
            rows = rows / torch.tensor(self.std)
        return (rows,)

    def example(self, records: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Synthetic rows."""
        return (torch.randn(records, self.columns, generator=generator),)
