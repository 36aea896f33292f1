from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from fedgraft_common.logs import about, as_text, read_entry, set_up_logs

NAMES = (
    "",
    "fedgraft_common",
    "fedgraft_client",
    "fedgraft_server",
    "fedgraft_simulations",
    "flwr",
)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = {}
    for name in NAMES:
        logger = logging.getLogger(name)
        before[name] = (list(logger.handlers), logger.level, logger.propagate)
    yield
    for name, (handlers, level, propagate) in before.items():
        logger = logging.getLogger(name)
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


def lines(as_json: bool) -> list[str]:
    stream = io.StringIO()
    set_up_logs(as_json, stream=stream)
    log = logging.getLogger("fedgraft_client.daemon")
    extra = {"action": "answer", "run": "7", "round": 3, "site": "ward 3", "accuracy": 0.91}
    log.info("answered: %s", "ok", extra=extra)
    log.info("two\nlines")
    logging.getLogger("a_library.part").warning("of a library")
    log.debug("not written")
    logging.getLogger("flwr").info("not written either")
    logging.getLogger("flwr").warning("of Flower's")
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("it failed", extra={"action": "fail", "round": None})
    return stream.getvalue().splitlines()


def test_json_lines_hold_the_known_fields_and_nothing_else() -> None:
    found = [json.loads(line) for line in lines(as_json=True)]
    assert [line["message"] for line in found] == [
        "answered: ok", "two\nlines", "of a library", "of Flower's", "it failed"
    ]  # fmt: skip
    first = found[0]
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info", "logger": "fedgraft_client.daemon", "action": "answer", "run": "7",
        "round": 3, "site": "ward 3", "message": "answered: ok",
    }  # fmt: skip
    assert "round" not in found[4]
    assert "ValueError: broken" in found[4]["exception"]


def test_text_lines_are_for_people() -> None:
    found = lines(as_json=False)
    assert found[0].endswith("INFO    answered: ok  [action=answer run=7 round=3 site=ward 3]")
    assert found[1].endswith("INFO    two\\nlines  [action=daemon]")  # nobody forges a line
    assert not any("accuracy" in line or "not written" in line for line in found)
    assert "ValueError: broken" in found[-1]


def test_setting_up_again_replaces_the_handler() -> None:
    first, second = io.StringIO(), io.StringIO()
    set_up_logs(stream=first)
    set_up_logs(stream=second)
    logging.getLogger("fedgraft_server.x").info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_fields_come_from_the_line_then_the_work_at_hand_then_the_process() -> None:
    stream = io.StringIO()
    set_up_logs(True, stream=stream, facts={"site": "north", "run": "1"}, names={7: "south"})
    log = logging.getLogger("fedgraft_client.x")
    with about(run="2", round=3):
        log.info("inside", extra={"round": 4})
        with about(round=5):
            log.info("deeper")
    log.info("outside", extra={"site": 7})
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    facts = [[line.get(name) for name in ("run", "round", "site")] for line in found]
    assert facts == [["2", 4, "north"], ["2", 5, "north"], ["1", None, "south"]]


def test_a_json_line_is_read_and_shown_as_text() -> None:
    as_json, text = lines(as_json=True), lines(as_json=False)
    shown = [as_text(entry) for line in as_json if (entry := read_entry(line))]
    without_time = [line.partition(" ")[2] for line in "\n".join(shown).splitlines()]
    assert without_time == [line.partition(" ")[2] for line in text]
    for other in ("INFO: text", '{"time": 1}', '{"time": ' + "[" * 100_000, "{}", "[1]", ""):
        assert read_entry(other) is None
