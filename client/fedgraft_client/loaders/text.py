"""Texts, from a column of strings or of lists of words."""

from __future__ import annotations

from typing import Any

from fedgraft_client.loaders.table import Broken


class TextReader:
    """Reads one text.

    Args:
        column: that holds it.
    """

    def __init__(self, column: str) -> None:
        self.columns = (column,)

    def __call__(self, values: list[Any]) -> str:
        """The text; words of a list are joined by single spaces.

        Raises:
            Broken: nothing in it, no string, or a word with white space inside.
        """
        value = values[0]
        if isinstance(value, list):
            words = [str(word) for word in value]
            if any(not word or len(word.split()) != 1 for word in words):
                raise Broken("a word that is empty or has white space inside")
            value = " ".join(words)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise Broken("empty text")
        if not isinstance(value, str):
            raise Broken(f"{type(value).__name__} where a text should be")
        return value
