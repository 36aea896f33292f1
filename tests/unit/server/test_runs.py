from __future__ import annotations

from typing import Any, cast

from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, ListRunsResponse
from flwr.proto.run_pb2 import Run, RunStatus

from fedgraft_server.runs import Runs


class Control:
    """A SuperLink's list of runs: newest first, at most so many at once, 20 if nobody says."""

    def __init__(self, count: int) -> None:
        self.runs = [
            Run(
                run_id=number,
                pending_at=f"2030-01-01T00:{number // 60:02d}:{number % 60:02d}+00:00",
                status=RunStatus(status="finished", sub_status="failed"),
                override_config=user_config_to_proto(
                    {"directory": f"/srv/runs/plan-{number % 3}"} if number else {}
                ),
            )
            for number in range(count)
        ]
        self.calls = 0

    def ListRuns(self, request: ListRunsRequest) -> ListRunsResponse:  # noqa: N802
        self.calls += 1
        limit = request.limit if request.HasField("limit") else 20
        page = self.runs[::-1][request.skip :][:limit]
        return ListRunsResponse(run_dict={run.run_id: run for run in page})

    def close(self) -> None: ...


def runs_of(control: Control) -> Runs:
    runs = Runs("127.0.0.1:1")
    runs._client.close()
    runs._client = cast(Any, control)
    return runs


def test_every_run_is_listed_however_many_there_are() -> None:
    for count, calls in ((0, 1), (21, 1), (200, 2), (450, 3)):
        control = Control(count)
        with runs_of(control) as runs:
            assert [state.id for state in runs.all()] == list(range(count))
        assert control.calls == calls


def test_a_run_is_found_by_its_directory_wherever_that_lies() -> None:
    with runs_of(Control(9)) as runs:
        assert [state.id for state in runs.of("plan-1")] == [1, 4, 7]
        assert [state.id for state in runs.of("")] == [0]  # started by something else
        assert all(state.is_over for state in runs.all())
