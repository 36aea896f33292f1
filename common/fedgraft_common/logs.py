"""Log lines for people, or as JSON for machines.

Every line says what happened (`action`) and, where it applies, in which run and round and at which
site. Nothing else is taken from a record's extras: a data value, a count or a metric that somebody
put there by mistake is not written. A line is one line, whatever is in a message.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final, TextIO

FIELDS: Final = ("action", "run", "round", "site")
OURS: Final = ("fedgraft_common", "fedgraft_client", "fedgraft_server", "fedgraft_simulations")
AS_JSON: Final = "FEDGRAFT_LOG_JSON"
"""Environment variable that asks for JSON."""

_CONTEXT: Final[ContextVar[Mapping[str, object]]] = ContextVar("context")


@contextlib.contextmanager
def about(**facts: object) -> Iterator[None]:
    """Every line that this thread logs meanwhile has these fields, unless it has its own.

    Args:
        facts: some of `FIELDS`.
    """
    token = _CONTEXT.set({**_CONTEXT.get({}), **facts})
    try:
        yield
    finally:
        _CONTEXT.reset(token)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message and the known fields.

    Args:
        facts: fields of lines that have none of their own, for instance the site of a daemon.
        names: of sites that a line knows by Flower's number only.
    """

    def __init__(
        self, facts: Mapping[str, object] | None = None, names: Mapping[int, str] | None = None
    ) -> None:
        super().__init__()
        self._facts = facts or {}
        self._names: Mapping[Any, str] = names or {}

    def entry(self, record: logging.LogRecord) -> dict[str, object]:
        """What a line says."""
        entry: dict[str, object] = {
            "time": _time(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        context = {**self._facts, **_CONTEXT.get({})}
        for name in FIELDS:
            value = getattr(record, name, None)
            value = context.get(name) if value in (None, "") else value
            if value not in (None, ""):
                entry[name] = self._names.get(value, value) if name == "site" else value
        entry["message"] = record.getMessage()
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            entry["exception"] = record.exc_text
        return entry

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return json.dumps(self.entry(record), ensure_ascii=False, default=str)


class TextFormatter(JsonFormatter):
    """Time (UTC), level, message, and the known fields behind it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback follows it."""
        return as_text(self.entry(record))


def as_text(entry: Mapping[str, object]) -> str:
    """An entry as `TextFormatter` writes it."""
    message = str(entry["message"]).replace("\r", "\\r").replace("\n", "\\n")
    line = f"{entry['time']} {str(entry['level']).upper():<7} {message}"
    if facts := " ".join(f"{name}={entry[name]}" for name in FIELDS if name in entry):
        line += f"  [{facts}]"
    if "exception" in entry:
        line += f"\n{entry['exception']}"
    return line


def read_entry(line: str) -> dict[str, object] | None:
    """What a line of `JsonFormatter` says; None for any other line."""
    if not line.startswith('{"time": '):
        return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    texts = ("time", "level", "logger", "message")
    is_whole = isinstance(entry, dict) and all(isinstance(entry.get(t), str) for t in texts)
    return entry if is_whole else None


def set_up_logs(
    as_json: bool = False,
    level: int = logging.INFO,
    stream: TextIO | None = None,
    facts: Mapping[str, object] | None = None,
    names: Mapping[int, str] | None = None,
) -> logging.Handler:
    """Sends all log lines to one stream; those of other libraries from warnings on.

    Args:
        as_json: whether for machines.
        level: the least important lines of Fedgraft that are written.
        stream: standard error if absent, where systemd and containers look for it.
        facts: see `JsonFormatter`.
        names: see `JsonFormatter`.

    Returns:
        The handler, so that a caller can remove it again.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter((JsonFormatter if as_json else TextFormatter)(facts, names))
    for name in ("", *OURS, "flwr"):
        logger = logging.getLogger(name)
        for other in list(logger.handlers):
            if name or isinstance(other.formatter, JsonFormatter):  # pytest has its own at the root
                logger.removeHandler(other)  # Flower brings one
        logger.addHandler(handler)
        logger.setLevel(level if name in OURS else logging.WARNING)
        logger.propagate = False
    return handler


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
