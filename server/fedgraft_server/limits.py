"""A token bucket: a steady rate with bursts."""

from __future__ import annotations

import time
from collections.abc import Callable


class TokenBucket:
    """Starts full.

    Args:
        rate: tokens a second.
        burst: tokens it holds.
        clock: seconds, monotonic.
    """

    __slots__ = ("_burst", "_clock", "_last", "_rate", "_tokens")

    def __init__(
        self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._tokens = burst
        self._last = clock()

    def take(self) -> bool:
        """Takes one token if there is one."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._last) * self._rate)
        self._last = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
