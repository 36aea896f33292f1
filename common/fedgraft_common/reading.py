"""How files become records: what `[data]` of a site file and of a simulation's plan share.

Every constant here is public: sizes, ranges, means and the values that stand for a missing one are
written down by whoever designs the task. Taken from the records, they would tell of them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

SOURCES = ("npz", "imagefolder", "audiofolder", "csv", "parquet", "json", "webdataset", "saved",
           "dicom")  # fmt: skip


class Column(BaseModel):
    """One column of a table: a number, or a category if `values` are listed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mean: float = Field(default=0.0, description="Subtracted, in the column's own unit.")
    std: PositiveFloat = Field(default=1.0, description="Divided by, in the column's own unit.")
    missing: float | str | None = Field(
        default=None,
        description="What stands for a missing value: a number, or one of `values`. Absent: a "
        "missing value is an error.",
    )
    indicator: bool = Field(
        default=False, description="Adds a column that is 1 where the value was missing."
    )
    values: tuple[str, ...] = Field(
        default=(),
        description="The categories; each becomes a column of 0 and 1. Another value is an error.",
    )
    names: dict[str, str] = Field(
        default_factory=dict,
        description="Other spellings of categories, e.g. { f = 'female', F = 'female' }.",
    )

    @model_validator(mode="after")
    def _missing_is_of_the_column(self) -> Column:
        given = self.missing
        if self.values and given is not None and str(given) not in self.values:
            raise ValueError(f"missing={given!r} is none of the values {', '.join(self.values)}")
        if not self.values and isinstance(given, str):
            raise ValueError(f"missing={given!r} is no number, and the column lists no values")
        return self

    @property
    def width(self) -> int:
        """How many columns of the model's input it becomes."""
        return max(1, len(self.values)) + self.indicator


class Reading(BaseModel):
    """What is in a source and which constants bring it into form."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    modality: Literal["auto", "image", "audio", "series", "tabular", "video", "text",
                      "image-text"] = Field(
        default="auto",
        description="What a record is. `auto`: images of an imagefolder, webdataset or DICOM "
        "folder, audio of an audiofolder; of a table, tabular if `columns` are described, else "
        "text; of an npz file, what its array is called (images, audio, series, tabular, video).",
    )  # fmt: skip
    input: str | tuple[str, ...] = Field(
        default="auto",
        description="The column (for image-text: image and text column; for series: one column for "
        "each channel, or one of nested lists) that holds the record. `auto`: image, audio or "
        "text. Of tabular data it is the keys of `columns`.",
    )
    label: str | tuple[str, ...] = Field(
        default="label",
        description="The column or columns that hold the answer. In a folder without metadata, "
        "`label` is the name of the file's own folder.",
    )
    label_map: dict[str, str] = Field(
        default_factory=dict,
        description="Values of the label column and the class each of them means, e.g. "
        "{ '0' = 'healthy', '1' = 'ill' }. A value that is a class's own name need not be listed.",
    )
    columns: dict[str, Column] = Field(
        default_factory=dict, description="The columns of tabular data, in the model's order."
    )
    delimiter: str = Field(
        default=",", min_length=1, max_length=1, description="Between the fields of a CSV file."
    )
    header: tuple[str, ...] = Field(
        default=(), description="Names of the columns of a CSV file without a first line of names."
    )
    missing: tuple[str, ...] = Field(
        default=("", "?", "NA", "NaN", "null"),
        description="Spellings of a missing value in a table.",
    )
    size: int | None = Field(
        default=None,
        ge=1,
        le=8192,
        description="Side in pixels of the square that images are brought to while they are read "
        "(shorter side to this length, then the middle), for images of different sizes. The "
        "backbone's manifest decides on the size that the model sees.",
    )
    channels: Literal[1, 3] | None = Field(
        default=None,
        description="Grey (1) or colour (3) images, for folders that hold both. Absent: all alike.",
    )
    bits: int | None = Field(
        default=None,
        ge=9,
        le=16,
        description="Bits that are in use of 16-bit images: 12 for most scanners. The largest "
        "value then is 2**bits - 1, whatever the images hold.",
    )
    window: tuple[float, float] | None = Field(
        default=None,
        description="DICOM: centre and width of the grey window, in the modality's unit (HU). "
        "Absent: the window in the file, else the range of its stored bits.",
    )
    sample_rate: int | None = Field(
        default=None,
        ge=100,
        le=384_000,
        description="Hertz. Audio of other rates is resampled to it; absent: all must be alike.",
    )
    samples: int | None = Field(
        default=None,
        ge=1,
        description="Length of audio or series in samples: longer ones are cut, shorter ones "
        "filled with zeros. Absent: all must be alike.",
    )
    skip_broken: bool = Field(
        default=False,
        description="Leave broken records out (`fedgraft data check` lists them) instead of "
        "refusing the source.",
    )


def split_source(source: str) -> tuple[str, str]:
    """Kind and path of a source: `csv:train.csv`; a bare path is an npz file."""
    kind, separator, path = source.partition(":")
    return (kind, path) if separator and kind in SOURCES else ("npz", source)
