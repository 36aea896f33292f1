from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedgraft_server.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_first_piece_goes_at_once_and_the_next_waits_for_it() -> None:
    clock = Clock()
    pace = Pace(100.0, clock)
    assert pace.wait_for(50) == 0
    assert pace.wait_for(100) == 0.5
    assert pace.wait_for(1) == 1.5
    clock.now = 10.0
    assert pace.wait_for(1) == 0


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 3)), min_size=1))
def test_no_window_gets_more_than_the_rate_and_one_piece(pieces: list[tuple[int, float]]) -> None:
    clock = Clock()
    pace = Pace(100.0, clock)
    sent: list[tuple[float, int]] = []
    for size, pause in pieces:
        sent.append((clock.now + pace.wait_for(size), size))
        clock.now += pause
    for first, (begin, _) in enumerate(sent):
        for last in range(first, len(sent)):
            total = sum(size for _, size in sent[first:last])  # without the last piece
            assert total <= 100 * (sent[last][0] - begin) + 1e-6
