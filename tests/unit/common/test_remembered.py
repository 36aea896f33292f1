from __future__ import annotations

from fedgraft_common.remembered import SMALL, Remembered


def test_the_newest_small_objects_are_kept() -> None:
    known = Remembered(count=2)
    for name in ("a", "b", "c"):
        known.keep(name, name.encode())
    assert [known.get(name) for name in ("a", "b", "c")] == [None, b"b", b"c"]
    known.keep("large", bytes(SMALL + 1))
    assert known.get("large") is None
    assert known.get("b") == b"b"
