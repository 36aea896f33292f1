"""Bytes per second, for one site and for all of them together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

_BURST_SECONDS: Final = 0.25


class ByteRate:
    """A token bucket of bytes that many threads draw from, first come, first served.

    Args:
        bytes_per_second: None for no limit.
        clock: seconds, monotonic.
    """

    def __init__(
        self, bytes_per_second: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = bytes_per_second
        self._clock = clock
        self._free_at = clock()  # when everything drawn so far is paid for
        self._lock = threading.Lock()

    def draw(self, count: int) -> float:
        """Takes bytes at once and says how long to wait before they may be sent.

        Args:
            count: bytes.

        Returns:
            Seconds, 0 or more.
        """
        if self._rate is None:
            return 0.0
        with self._lock:
            now = self._clock()
            # An idle bucket has saved up a little; never more.
            self._free_at = max(self._free_at, now - _BURST_SECONDS) + count / self._rate
            return max(self._free_at - now, 0.0)

    def give_back(self, count: int) -> None:
        """Bytes that were drawn and then not sent."""
        if self._rate is not None:
            with self._lock:
                self._free_at -= count / self._rate


class Bandwidth:
    """The limits of a service.

    Args:
        total: bytes per second for all sites; None for no limit.
        per_site: bytes per second for each site, all its streams together; None for no limit.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: float | None = None,
        per_site: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = ByteRate(total, clock)
        self._per_site = per_site
        self._clock = clock
        self._sites: dict[str, ByteRate] = {}
        self._lock = threading.Lock()

    def draw(self, site: str, count: int) -> float:
        """Seconds to wait before a site may be sent `count` more bytes."""
        return max(self._site(site).draw(count), self._total.draw(count))

    def give_back(self, site: str, count: int) -> None:
        """Bytes that were drawn and then not sent, so that hanging up costs others nothing."""
        self._site(site).give_back(count)
        self._total.give_back(count)

    def _site(self, site: str) -> ByteRate:
        with self._lock:  # one entry per site that ever came: certificates bound their number
            return self._sites.setdefault(site, ByteRate(self._per_site, self._clock))
