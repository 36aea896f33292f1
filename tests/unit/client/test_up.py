"""The resident site's process, around its daemon; the daemon itself is in test_daemon.py."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedgraft_client import up
from fedgraft_client.daemon import Abandoned


@pytest.mark.parametrize(("error", "code"), [(None, 0), (Abandoned(), 130)])
def test_what_is_loaded_does_not_put_off_the_collection_of_garbage(
    error: BaseException | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[int] = []

    def run() -> None:
        frozen.append(gc.get_freeze_count())
        if error is not None:
            raise error

    @contextlib.contextmanager
    def resident(*_: object) -> Iterator[Any]:
        yield SimpleNamespace(run=run, signals=contextlib.nullcontext)

    monkeypatch.setattr(up, "resident", resident)
    before = gc.get_freeze_count()
    assert up.run_until_stopped(Path("site.toml")) == code
    assert frozen[0] > before + 100_000  # PyTorch alone is more
    assert gc.get_freeze_count() == 0
