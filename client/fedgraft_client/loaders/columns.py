"""Rows of a table as numbers, with public constants only.

Shapes: B rows of a batch, W numbers that a row becomes.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft_common.reading import Column, Reading


class ColumnsReader:
    """Encodes the columns that are described, in that order.

    A number becomes (value - mean) / std; a category one column of 0 and 1 for each of its values.
    A missing value is taken for the one that the description gives, with a column of its own that
    says so if that is asked for.

    Args:
        reading: `columns`, and how a missing value is written.
    """

    def __init__(self, reading: Reading) -> None:
        self.columns = tuple(reading.columns)
        self._described = reading.columns
        self._blank = frozenset(reading.missing)

    @property
    def width(self) -> int:
        """W."""
        return sum(column.width for column in self._described.values())

    @property
    def names(self) -> tuple[str, ...]:
        """What each of the W numbers is."""
        found: list[str] = []
        for name, column in self._described.items():
            found += [f"{name}={value}" for value in column.values] or [name]
            found += [f"{name} missing"] * column.indicator
        return tuple(found)

    def __call__(self, batch: dict[str, list[Any]]) -> tuple[torch.Tensor, dict[int, str]]:
        """Rows of a batch.

        Returns:
            (B, W) float32, zeros in rows that cannot be used; and why not, by row.
        """
        parts, problems = [], dict[int, str]()
        for name, column in self._described.items():
            encode = _categories if column.values else _numbers
            parts.append(encode(name, column, self._plain(batch[name]), problems))
        rows = np.concatenate(parts, axis=1)
        rows[list(problems)] = 0
        return torch.from_numpy(rows.astype(np.float32)), problems

    def _plain(self, values: list[Any]) -> list[Any]:
        """With None for what is missing."""
        return [
            None if v is None or v in self._blank or (isinstance(v, float) and v != v) else v
            for v in (v.strip() if isinstance(v, str) else v for v in values)
        ]


def _numbers(
    name: str, column: Column, values: list[Any], problems: dict[int, str]
) -> NDArray[np.float64]:
    found = np.zeros(len(values))
    gaps = np.zeros(len(values))
    for i, value in enumerate(values):
        if value is None:
            gaps[i] = 1
            if column.missing is None:
                problems.setdefault(i, _missing(name))
                continue
            value = column.missing
        try:
            found[i] = float(value)
        except (TypeError, ValueError):
            problems.setdefault(i, f"{value!r} in column {name} is no number")
    bad = ~np.isfinite(found)
    for i in bad.nonzero()[0].tolist():
        problems.setdefault(i, f"{found[i]} in column {name} is not finite")
    scaled = (np.where(bad, 0, found) - column.mean) / column.std
    return np.stack([scaled, gaps], axis=1) if column.indicator else scaled[:, None]


def _categories(
    name: str, column: Column, values: list[Any], problems: dict[int, str]
) -> NDArray[np.float64]:
    places = {value: i for i, value in enumerate(column.values)}
    places |= {word: places[value] for word, value in column.names.items() if value in places}
    found = np.zeros((len(values), len(column.values) + column.indicator))
    for i, value in enumerate(values):
        if value is None:
            if column.missing is None:
                problems.setdefault(i, _missing(name))
                continue
            found[i, len(column.values) :] = 1
            value = column.missing
        place = places.get(_word(value))
        if place is None:
            known = ", ".join(column.values)
            problems.setdefault(i, f"{value!r} in column {name} is none of {known}")
        else:
            found[i, place] = 1
    return found


def _word(value: Any) -> str:
    """A category's spelling; 3, 3.0 and "3.0" are the same one."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", str(value))


def _missing(name: str) -> str:
    return f"a missing value in column {name}, and data.columns.{name}.missing does not say what "\
        "stands for one"  # fmt: skip
