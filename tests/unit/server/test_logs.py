from __future__ import annotations

import json
import logging

from fedgraft_server.logs import LineFormatter


def record() -> logging.LogRecord:
    made = logging.LogRecord("n", logging.WARNING, "f", 1, "refused %s", ("x",), None)
    made.action, made.site, made.created = "refuse-path", "north", 0.0
    return made


def test_text() -> None:
    line = LineFormatter(as_json=False).format(record())
    assert line == "1970-01-01T00:00:00Z WARNING refused x action=refuse-path site=north"


def test_json() -> None:
    assert json.loads(LineFormatter(as_json=True).format(record())) == {
        "time": "1970-01-01T00:00:00.000+00:00",
        "level": "WARNING",
        "message": "refused x",
        "action": "refuse-path",
        "site": "north",
    }


def test_a_line_break_in_a_message_cannot_forge_a_line() -> None:
    forged = record()
    forged.args = ("x\n1970-01-01T00:00:00Z INFO joined",)
    assert "\n" not in LineFormatter(as_json=False).format(forged)
