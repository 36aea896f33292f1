from __future__ import annotations

from fedgraft_server.limits import TokenBucket


def test_burst_then_rate() -> None:
    now = 0.0
    bucket = TokenBucket(rate=2.0, burst=3.0, clock=lambda: now)
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    now = 0.4
    assert not bucket.take()
    now = 0.5
    assert [bucket.take() for _ in range(2)] == [True, False]
    now = 1000.0
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
