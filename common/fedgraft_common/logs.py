"""Log lines for people, or as JSON for machines.

Every line says what happened (`action`) and, where it applies, in which run and round and at which
site. Nothing else is taken from a record's extras: a data value, a count or a metric that somebody
put there by mistake is not written.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Final, TextIO

FIELDS: Final = ("action", "run", "round", "site")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message and the known fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            **_fields(record),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Time (UTC), level, message, and the known fields behind it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        facts = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname:<7} {record.getMessage()}"
        if facts:
            line += f"  [{facts}]"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def set_up_logs(
    as_json: bool = False, level: int = logging.INFO, stream: TextIO | None = None
) -> logging.Handler:
    """Sends Fedgraft's and Flower's log lines to one stream, Flower's from warnings on.

    Args:
        as_json: whether for machines.
        level: the least important lines of Fedgraft that are written.
        stream: standard error if absent, where systemd and containers look for it.

    Returns:
        The handler, so that a caller can remove it again.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    ours = ("fedgraft_common", "fedgraft_client", "fedgraft_server", "fedgraft_simulations")
    for name in (*ours, "flwr"):
        logger = logging.getLogger(name)
        for other in list(logger.handlers):
            logger.removeHandler(other)  # Flower brings one of its own
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING if name == "flwr" else level)
        logger.propagate = False
    return handler


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {
        name: value for name in FIELDS if (value := getattr(record, name, None)) not in (None, "")
    }


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
