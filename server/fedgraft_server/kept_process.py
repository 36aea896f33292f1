"""A program that the server keeps running: started again when it dies, stopped with the server."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Final

import psutil

from fedgraft_server.program_output import ProgramOutput

LOG = logging.getLogger(__name__)

_SETTLED: Final = 10.0  # seconds of life after which a death counts as the first
_MAX_DELAY: Final = 30.0  # seconds between two starts
_STOP_TIMEOUT: Final = 10.0  # seconds from SIGTERM to SIGKILL


class KeptProcess:
    """One child process, tied to this one: it dies when this process is killed.

    Args:
        name: for the log.
        command: program and arguments.
        environment: all of the child's variables.
        output: what becomes of what it prints; nobody's business but the log's by default.

    Attributes:
        started: seconds since the epoch, of the newest start; 0 before the first.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        output: ProgramOutput | None = None,
    ) -> None:
        self.name = name
        self.started = 0.0
        self._command = command
        self._environment = environment
        self._output = output or ProgramOutput(name)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if running and self._process else None

    def children(self) -> int:
        """How many processes of its own are alive."""
        pid = self.pid
        if pid is None:
            return 0
        try:
            found = psutil.Process(pid).children()
            return sum(child.status() != psutil.STATUS_ZOMBIE for child in found)
        except psutil.NoSuchProcess:
            return 0

    async def run(self) -> None:
        """Starts it again whenever it dies, later each time, until cancelled; then stops it."""
        deaths = 0
        word = self.name.lower()
        readers: list[tuple[asyncio.Task[None], asyncio.ReadTransport]] = []
        try:
            while True:
                began = time.monotonic()
                self.started = time.time()
                output, pipe, end = await _pipe()
                try:
                    self._process = await asyncio.create_subprocess_exec(
                        sys.executable, "-m", "fedgraft_server.tied", str(os.getpid()),
                        *self._command, env=self._environment,
                        stdin=asyncio.subprocess.DEVNULL,
                        stdout=end, stderr=asyncio.subprocess.STDOUT,
                    )  # fmt: skip
                finally:
                    os.close(end)
                LOG.info("%s started", self.name, extra={"action": f"{word}-start"})
                reading = asyncio.create_task(self._output.follow(output))
                readers.append((reading, pipe))  # its children may print when it is dead
                code = await self._process.wait()
                readers[:] = [one for one in readers if not one[0].done()]
                deaths = 1 if time.monotonic() - began > _SETTLED else deaths + 1
                delay = min(_MAX_DELAY, 0.5 * 2 ** min(deaths - 1, 10))
                LOG.error(
                    "%s ended with code %s; starting it again in %.1f s", self.name, code, delay,
                    extra={"action": f"{word}-died"},
                )  # fmt: skip
                await asyncio.sleep(delay)
        finally:
            await self._stop()
            for reading, pipe in readers:
                reading.cancel()
                pipe.close()
            await asyncio.gather(*(one for one, _ in readers), return_exceptions=True)

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(_STOP_TIMEOUT):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        LOG.info("%s stopped", self.name, extra={"action": f"{self.name.lower()}-stop"})


async def _pipe() -> tuple[asyncio.StreamReader, asyncio.ReadTransport, int]:
    """A pipe whose reading end can be closed while a grandchild still holds the other."""
    reading, writing = os.pipe()
    output = asyncio.StreamReader()
    pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(output), os.fdopen(reading, "rb", 0)
    )
    return output, pipe, writing
