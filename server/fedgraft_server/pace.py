"""A steady rate in bytes a second, shared by all streams of one site."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Pace:
    """Says how long to wait before sending more.

    Args:
        rate: bytes a second.
        clock: seconds, monotonic.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._free_at = clock()
        self._lock = threading.Lock()

    def wait_for(self, size: int) -> float:
        """Books `size` bytes behind what is booked already.

        Returns:
            Seconds until they may be sent; 0 if they may be sent now.
        """
        with self._lock:
            now = self._clock()
            start = max(now, self._free_at)  # time not used is not saved up
            self._free_at = start + size / self._rate
            return start - now
