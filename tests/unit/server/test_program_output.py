"""Lines of Flower's programs become lines of ours."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from fedgraft_server.program_output import LONGEST, ProgramOutput

NODE = 3084468718327283957
LINES = [
    (
        b"\x1b[92mINFO \x1b[0m:      [Fleet.ActivateNode] Activated node_id=%d" % NODE,
        ("INFO", f"[Fleet.ActivateNode] Activated node_id={NODE}", None, "north"),
    ),
    (
        b"\x1b[91mERROR \x1b[0m:     (sqlite3.OperationalError) database is locked",
        ("ERROR", "(sqlite3.OperationalError) database is locked", None, None),
    ),
    (b"[SQL: SELECT 1]", ("ERROR", "[SQL: SELECT 1]", None, None)),  # it goes on
    (
        b'2026-11-28T08:34:36.170Z INFO [uvicorn.access] 127.0.0.1 - "POST /x HTTP/1.1" 200',
        ("INFO", '[uvicorn.access] 127.0.0.1 - "POST /x HTTP/1.1" 200', None, None),
    ),
    (
        b"INFO :      Created run 5220580784130121865 in federation @none/default",
        ("INFO", "Created run 5220580784130121865 in federation @none/default",
         "5220580784130121865", None),
    ),
    (b"something else \xff", ("INFO", "something else \ufffd", None, None)),
]  # fmt: skip


@pytest.fixture
def output() -> ProgramOutput:
    return ProgramOutput("SuperLink", {NODE: "north"}.get)


@pytest.fixture(autouse=True)
def level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fedgraft_server")


def facts(record: logging.LogRecord) -> tuple[str, str, object, object]:
    assert vars(record)["action"] == "superlink"
    return record.levelname, record.getMessage(), vars(record)["run"], vars(record)["site"]


def test_level_run_and_site_are_read(
    output: ProgramOutput, caplog: pytest.LogCaptureFixture
) -> None:
    for line, _ in LINES:
        output.write(line)
    assert [facts(record) for record in caplog.records] == [told for _, told in LINES]


def test_lines_come_in_pieces_and_may_be_long(
    output: ProgramOutput, caplog: pytest.LogCaptureFixture
) -> None:
    async def feed() -> None:
        stream = asyncio.StreamReader()
        for piece in (b"fir", b"st\n\n", b"x" * 5 * LONGEST, b"y\nlast"):
            stream.feed_data(piece)
        stream.feed_eof()
        await output.follow(stream)

    asyncio.run(feed())
    assert [len(record.getMessage()) for record in caplog.records] == [5, LONGEST, 4]


def test_our_own_lines_keep_what_they_say(
    output: ProgramOutput, caplog: pytest.LogCaptureFixture
) -> None:
    entry = {
        "time": "2026-11-28T08:34:36+00:00", "level": "warning", "logger": "fedgraft_server.app",
        "action": "round", "run": "7", "round": 3, "site": "north", "message": "100 % done",
        "exception": "ValueError: broken",
    }  # fmt: skip
    output.write(json.dumps(entry).encode())
    output.write(json.dumps(entry | {"logger": "elsewhere", "level": "odd"}).encode())
    output.write(json.dumps(entry | {"level": "debug"}).encode())  # nobody asked for it
    [record, other] = caplog.records
    assert (record.name, record.levelname) == ("fedgraft_server.app", "WARNING")
    assert record.getMessage() == "100 % done"
    assert [vars(record)[n] for n in ("action", "run", "round", "site")] == [
        "round",
        "7",
        3,
        "north",
    ]
    assert record.exc_text == "ValueError: broken"
    assert (other.name, other.levelname) == ("elsewhere", "INFO")
