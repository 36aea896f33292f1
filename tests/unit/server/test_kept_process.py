from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedgraft_server.kept_process import KeptProcess


def kept(program: str) -> KeptProcess:
    return KeptProcess("Program", [sys.executable, "-c", program], dict(os.environ))


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def test_a_killed_program_is_started_again_and_stopped_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> psutil.Process:
        made = kept("import time; time.sleep(60)")
        assert (made.pid, made.started, made.children()) == (None, 0.0, 0)
        task = asyncio.create_task(made.run())
        await until(lambda: made.pid is not None)
        first, started = made.pid, made.started
        assert first is not None and abs(started - time.time()) < 20
        psutil.Process(first).kill()
        await until(lambda: made.pid not in (None, first))
        assert made.started > started
        second = psutil.Process(made.pid)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert made.pid is None
        return second

    second = asyncio.run(main())
    assert not second.is_running()
    assert "Program ended with code -9; starting it again in 0.5 s" in caplog.text


def test_it_is_started_later_each_time_until_it_has_lived_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    slept: list[float] = []
    lives = [0.0] * 9 + [11.0, 0.0]

    class Dead:
        returncode = 1

        async def wait(self) -> int:
            clock[0] += lives[len(slept)]
            return 1

    async def create(*_: object, **__: object) -> Dead:
        return Dead()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == len(lives):
            raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "create_subprocess_exec", create)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr("fedgraft_server.kept_process.time.monotonic", lambda: clock[0])
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(kept("").run())
    assert slept == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 0.5, 1]


def test_its_children_are_counted_while_they_live(tmp_path: Path) -> None:
    go = tmp_path / "go"
    program = (
        "import subprocess, sys, time, pathlib\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "one, two = subprocess.Popen(sleep), subprocess.Popen(sleep)\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.02)\n"
        "one.kill()\n"  # and not waited for: a zombie
        "time.sleep(60)\n"
    )

    async def main() -> None:
        made = kept(program)
        task = asyncio.create_task(made.run())
        await until(lambda: made.children() == 2)
        children = psutil.Process(made.pid).children()
        go.touch()
        await until(lambda: made.children() == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert made.children() == 0
        for child in children:
            if child.is_running():
                child.kill()

    asyncio.run(main())
