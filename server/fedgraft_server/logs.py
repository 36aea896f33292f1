"""Log lines on standard error: text for people, or one JSON object a line for machines.

Every line of ours carries an `action`, and a `site` where one is concerned. Never a data value.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import sys
from typing import Final

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class LineFormatter(logging.Formatter):
    """Time, level, message, then whatever was given as `extra`.

    Args:
        as_json: one JSON object a line.
    """

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        moment = dt.datetime.fromtimestamp(record.created, dt.UTC)
        facts = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        text = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")  # one line each
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        if self._as_json:
            stamp = moment.isoformat(timespec="milliseconds")
            line = {"time": stamp, "level": record.levelname, "message": text, **facts}
            return json.dumps(line, default=str)
        shown = "".join(f" {key}={value}" for key, value in facts.items())
        return f"{moment:%Y-%m-%dT%H:%M:%SZ} {record.levelname} {text}{shown}"


def configure(as_json: bool, level: int = logging.INFO) -> None:
    """Sends everything from `level` on to standard error; libraries only warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(as_json))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("fedgraft_server").setLevel(level)
