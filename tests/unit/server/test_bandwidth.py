"""Bandwidth limits, on a clock of their own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fedgraft_server.bandwidth import Bandwidth, ByteRate


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def test_no_limit_is_no_wait() -> None:
    assert ByteRate(None).draw(10**12) == 0.0


def test_a_stream_gets_its_rate() -> None:
    clock = Clock()
    rate = ByteRate(1000.0, clock)
    for _ in range(50):
        clock.now += rate.draw(100)
    assert clock.now - 100.0 == pytest.approx(5.0)


def test_an_idle_bucket_saves_no_more_than_a_quarter_second() -> None:
    clock = Clock()
    rate = ByteRate(1000.0, clock)
    clock.now += 3600
    assert rate.draw(1250) == pytest.approx(1.0)


def test_sites_share_the_total_and_have_their_own() -> None:
    clock = Clock()
    bandwidth = Bandwidth(total=2000.0, per_site=1000.0, clock=clock)
    assert bandwidth.draw("a", 1250) == pytest.approx(1.25)
    assert bandwidth.draw("b", 250) == pytest.approx(0.75)  # 1500 of the total
    assert bandwidth.draw("b", 250) == pytest.approx(0.875)
    assert bandwidth.draw("a", 1000) == pytest.approx(2.25)


def test_what_is_given_back_delays_nobody() -> None:
    bandwidth = Bandwidth(total=1000.0, per_site=1000.0, clock=Clock())
    for _ in range(100):
        assert bandwidth.draw("a", 1000) == pytest.approx(1.0)
        bandwidth.give_back("a", 1000)
    assert bandwidth.draw("b", 500) == pytest.approx(0.5)
    Bandwidth().give_back("a", 1000)
