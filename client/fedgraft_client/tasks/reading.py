"""Labels as they are written in a table, as the numbers that a loss takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Written:
    """The label columns of some records.

    Attributes:
        columns: values of each label column.
        names: the label map: how a class is written, and which it is.
        sizes: height and width of each record's image before it was brought to size; empty for
            other records.
        size: side of the square that images were brought to; None if they were left alone.
        mask: reads a record's second image: (H, W) int64, already at size.
        texts: of each record; empty for other records.
    """

    columns: list[list[Any]]
    names: Mapping[str, str] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    size: int | None = None
    mask: Callable[[Any], torch.Tensor] | None = None
    texts: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Labels:
    """What was made of them.

    Attributes:
        values: B records first; of records with a problem, anything.
        broken: why a record has no label, by its number in the batch.
        unknown: values that the task does not know, by record.
    """

    values: torch.Tensor
    broken: dict[int, str] = field(default_factory=dict)
    unknown: dict[int, str] = field(default_factory=dict)

    def note_unknown(self, record: int, found: Mapping[int, str]) -> None:
        """Keeps the first of the values that one record has and the task does not know."""
        for word in found.values():
            self.unknown.setdefault(record, word)


def class_numbers(
    values: list[Any], classes: tuple[str, ...], names: Mapping[str, str]
) -> tuple[list[int], dict[int, str], dict[int, str]]:
    """Numbers of classes that are written in any of the ways a table has.

    A value is looked up in the label map, then among the classes' own names; if there is no label
    map and it is a whole number, it is the class's number.

    Returns:
        The numbers (-1 where there is none), what is broken, and what is unknown.
    """
    places = {name: i for i, name in enumerate(classes)}
    known = places | {written: places[name] for written, name in names.items() if name in places}
    if not names and not any(name.lstrip("-").isdigit() for name in classes):
        known |= {str(i): i for i in range(len(classes))}
    found, broken, unknown = [], dict[int, str](), dict[int, str]()
    for i, value in enumerate(values):
        if value is None:
            broken[i] = "no label"
            found.append(-1)
            continue
        word = as_word(value)
        place = known.get(word, -1)
        if place < 0:
            unknown[i] = word
        found.append(place)
    return found, broken, unknown


def as_word(value: Any) -> str:
    """How a value is written in a label map; 1.0, "1.0" and True are 1."""
    if isinstance(value, bool):
        return str(int(value))
    return re.sub(r"^(-?\d+)\.0+$", r"\1", str(value).strip())


def numbers(columns: list[list[Any]]) -> Labels:
    """Label columns that hold numbers: (B, columns) float32."""
    count = len(columns[0]) if columns else 0
    found = torch.zeros(count, len(columns))
    labels = Labels(found)
    for k, column in enumerate(columns):
        for i, value in enumerate(column):
            if value is None or value == "":
                labels.broken[i] = "no label"
                continue
            try:
                found[i, k] = float(value)
            except (TypeError, ValueError):
                labels.unknown[i] = str(value)
    return labels
