"""Whether a daemon is alive, from its status file."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fedgraft_client.health import STALE, Health, State, heartbeat, sight


def test_a_fresh_file_means_running_and_an_old_one_means_dead(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    assert sight(path, 0.0).word == "absent"
    health = Health(State.WORKING, connected=True, round=3, status="ok")
    health.write(path)
    os.utime(path, (1000.0, 1000.0))
    for now, word in ((1001.0, "running"), (990.0, "running"), (1000.0 + STALE, "stale")):
        found = sight(path, now)
        assert (found.word, found.is_running) == (word, word == "running")
        assert found.health == health
    assert sight(path, 1030.0).age == 30.0
    Health(State.STOPPED).write(path)
    assert sight(path, time.time()).word == "stopped"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="not a status file"):
        sight(path, 0.0)


def test_a_heartbeat_goes_on_over_a_full_disk_and_ends() -> None:
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        raise OSError("no space left")

    with heartbeat(beat, 0.01):
        end = time.monotonic() + 60
        while beats < 3 and time.monotonic() < end:
            time.sleep(0.01)
    counted = beats
    assert counted >= 3
    time.sleep(0.05)
    assert beats == counted


def test_a_file_of_an_older_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text('{"state": "waiting", "connected": true}', encoding="utf-8")
    found = sight(path, time.time()).health
    assert found is not None
    assert (found.connected, found.status) == (True, "")
