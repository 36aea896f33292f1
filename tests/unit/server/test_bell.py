from __future__ import annotations

from pathlib import Path

from fedgraft_server.bell import Bell, Bells


def test_every_ring_is_heard_by_everybody(tmp_path: Path) -> None:
    bell, other = Bell(tmp_path / "bell"), Bell(tmp_path / "bell")
    heard = [bell.rung()]
    for _ in range(100):
        other.ring()
        heard.append(bell.rung())
    assert len(set(heard)) == 101  # finer than the clock of most file systems


def test_where_it_cannot_hang_nobody_hears_it(tmp_path: Path) -> None:
    bells = Bells.of(tmp_path / "missing")
    bells.asked.ring()
    assert bells.asked.rung() == 0
    (tmp_path / "missing").mkdir()
    bells.asked.ring()
    assert bells.asked.rung() > 0
    assert bells.answered.rung() == 0
