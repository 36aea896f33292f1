"""Lost rounds are counted across restarts; too many in a row end the run with names."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedgraft_common.errors import AggregationError
from fedgraft_server.secure_faults import RoundLostError, SecureFaults


def test_lost_rounds_in_a_row_are_counted_across_restarts(tmp_path: Path) -> None:
    for number, reason in ((3, "first"), (5, "second"), (6, "third")):
        faults = SecureFaults.read(tmp_path, durable=False)
        faults.lose(number, RoundLostError(reason, "east" if number == 3 else ""))
        faults.write()
        if number != 6:
            faults.check(1)
    again = SecureFaults.read(tmp_path)
    assert (again.lost, again.reasons, again.out) == (6, ["second", "third"], {"east": "first"})
    with pytest.raises(AggregationError) as caught:
        again.check(1)
    for text in ("rounds 5 to 6", "round 5: second; round 6: third", "server revoke", "round 7"):
        assert text in str(caught.value)
    with pytest.raises(AggregationError, match="a new plan without it"):
        again.check(0)
