"""A bad network between sites and their server: a TCP proxy that misbehaves when it is told to.

It sees TLS records and nothing inside them, as a failing switch or a firewall between a hospital
and its federation would. What it does to a connection is drawn from a seed, for each piece of bytes
and each direction.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Final

from fedgraft_common.errors import LinkError

HOST: Final = "127.0.0.1"
PIECE: Final = 16 * 1024  # bytes read at once
_TICK: Final = 0.05  # seconds between two looks at whether a silent network speaks again
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER with no time left: close sends RST


@dataclass(frozen=True, slots=True)
class Weather:
    """How the network behaves from now on.

    Attributes:
        delay: seconds that every piece waits.
        jitter: seconds more, at most; so one connection's bytes overtake another's.
        rate: bytes a second, of one connection in one direction.
        cut: chance that a piece is the last of its connection, and arrives by half or not at all.
        swap: chance that the halves of a piece change places.
        silent: nothing arrives and nothing is closed, as behind a firewall that forgot.
        closed: new connections are refused.
    """

    delay: float = 0.0
    jitter: float = 0.0
    rate: float = math.inf
    cut: float = 0.0
    swap: float = 0.0
    silent: bool = False
    closed: bool = False


class BadNetwork:
    """Listens on loopback and carries every connection to one address; a context manager.

    Args:
        target: `host:port` that is reached through it.
        seed: of everything that is drawn.

    Attributes:
        weather: may be replaced at any time, from any thread.
        seen: how often something happened: `connections`, `refused`, `cuts`, `swaps`, `late`
            (pieces that waited); and bytes: `sent` by who connects, `received`, `bytes` of both.
    """

    def __init__(self, target: str, seed: int = 0) -> None:
        self.weather = Weather()
        self.seen: Counter[str] = Counter()
        self._target = target
        self._random = random.Random(seed)  # noqa: S311 - weather, not a secret
        self._open: set[asyncio.StreamWriter] = set()
        self._listening = socket.create_server((HOST, 0))
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="bad network")

    @property
    def address(self) -> str:
        """`host:port` to connect to instead of the target."""
        return f"{HOST}:{self._listening.getsockname()[1]}"

    def __enter__(self) -> BadNetwork:
        """Starts to carry."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Drops every connection."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        if self._thread.is_alive():
            raise LinkError("bad network", "a thread that hangs", "its end", "This is a bug.")

    def cut(self) -> None:
        """Resets every connection that is open now."""

        def reset() -> None:
            self.seen["cuts"] += len(self._open) // 2
            for writer in list(self._open):
                _reset(writer)

        self._loop.call_soon_threadsafe(reset)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._carry, sock=self._listening)
        async with server:
            await self._stop.wait()
            for writer in list(self._open):
                _reset(writer)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.weather.closed:
            self.seen["refused"] += 1
            _reset(writer)
            return
        host, _, port = self._target.rpartition(":")
        try:
            there, away = await asyncio.open_connection(host, int(port))
        except OSError:
            self.seen["refused"] += 1
            _reset(writer)
            return
        self.seen["connections"] += 1
        ends = {writer, away}
        self._open |= ends
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump("sent", reader, away, writer))
                both.create_task(self._pump("received", there, writer, away))
        except* (OSError, asyncio.CancelledError):  # Python 3.11 would log a cancelled connection
            pass
        finally:
            self._open -= ends
            for end in ends:
                _reset(end)

    async def _pump(
        self,
        direction: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        other: asyncio.StreamWriter,
    ) -> None:
        while piece := await reader.read(PIECE):
            weather = self.weather
            self.seen["bytes"] += len(piece)
            self.seen[direction] += len(piece)
            if self._draws(weather.swap) and len(piece) > 1:
                self.seen["swaps"] += 1
                piece = piece[len(piece) // 2 :] + piece[: len(piece) // 2]
            wait = weather.delay + weather.jitter * self._random.random()
            wait += len(piece) / weather.rate
            if wait:
                self.seen["late"] += 1
                await asyncio.sleep(wait)
            while self.weather.silent:
                await asyncio.sleep(_TICK)
            if self._draws(weather.cut):
                self.seen["cuts"] += 1
                writer.write(piece[: len(piece) // 2])
                await asyncio.sleep(0)
                _reset(writer)
                _reset(other)
                return
            writer.write(piece)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    def _draws(self, chance: float) -> bool:
        return chance > 0 and self._random.random() < chance


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None and not writer.is_closing():
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
