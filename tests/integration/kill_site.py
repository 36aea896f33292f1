"""A site process that can be killed at any line of its own code; run by test_kill.py.

It imports everything once and then forks a fresh child for each order on its standard input:

    {"home": DIR, "rounds": N, "kill": LINE or null, "distinct": whether each line counts once}

The child opens the site as the daemon does and answers the rounds in turn. Before each training it
writes down that the data is about to be looked at, and after the egress guard it keeps what would
be sent: files that the test compares with the ledger. With `kill` it counts the lines executed in
the modules of the round's path and sends itself SIGKILL at that line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402
from flwr.app import ConfigRecord, Message, RecordDict  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from fedgraft_client import site as site_module  # noqa: E402
from fedgraft_client.budget import affordable_rounds  # noqa: E402
from fedgraft_client.head import initial_head  # noqa: E402
from fedgraft_client.opening import open_site  # noqa: E402
from fedgraft_client.policy import Policy  # noqa: E402
from fedgraft_client.runtime import Runtime, Workbench  # noqa: E402
from fedgraft_client.training import train_round  # noqa: E402
from fedgraft_common.features import FeatureKind  # noqa: E402
from fedgraft_common.mechanism import step_noise  # noqa: E402
from fedgraft_common.messages import Status, to_record  # noqa: E402
from fedgraft_common.plan import Plan, load_plan  # noqa: E402

WATCHED = (
    "site.py", "store.py", "ledger.py", "entry.py", "witness.py", "budget.py", "egress.py",
    "training.py", "dp.py", "files.py", "randomness.py",
)  # fmt: skip


def request(plan: Plan, number: int, adapter: Any) -> Message:
    TaskIdentity.run_id = TaskIdentity.task_id = 1
    TaskIdentity.node_id = 0
    config = ConfigRecord({"plan": plan.canonical, "round": number})
    content = RecordDict({"adapter": to_record(adapter), "plan": config})
    message = Message(content, dst_node_id=7, message_type="train")
    message.metadata.__dict__["_message_id"] = "request"
    return message


def append(path: Path, line: str) -> None:
    """On the disk before anything goes on."""
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def answer(home: Path, rounds: int, kill: int | None, distinct: bool, bench: Workbench) -> int:
    """All rounds in turn; returns how many lines were executed."""
    counted = 0
    seen: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal counted
        if os.path.basename(frame.f_code.co_filename) not in WATCHED:  # noqa: PTH119
            return None
        place = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and not (distinct and place in seen):
            seen.add(place)
            counted += 1
            if counted == kill:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def touched(*arguments: Any, **options: Any) -> Any:
        append(home / "looked", str(arguments[2]))
        return train_round(*arguments, **options)

    site_module.train_round = touched  # type: ignore[attr-defined]
    plan = load_plan(home / "plan.toml")

    def workbench(self: Runtime, plan: Plan, features: FeatureKind = "pooled") -> Workbench:
        return bench

    Runtime.workbench = workbench  # type: ignore[method-assign]
    sys.settrace(trace)
    try:
        site = open_site(home / "site.toml")
        for number in range(1, rounds + 1):
            finished = site.store.ledger.finished(plan.hash)
            if finished is not None and number < finished.round:
                continue  # the server has it already
            reply = site.answer(request(plan, number, bench.initial))
            word = str(reply.content.config_records["status"]["status"])
            if word != Status.OK:
                append(home / "trouble", f"{word}: {site.last_error}")
                break
            arrays = reply.content.array_records["adapter"]
            sent = b"".join(arrays[name].data for name in sorted(arrays))
            append(home / f"sent-{number}", sent.hex())
        site.store.close()
    finally:
        sys.settrace(None)
    return counted


def warm(plan: Plan) -> Workbench:
    """Does once what every child would do again: the model, its check, the accounting."""
    bench = Workbench(plan, torch.device("cpu"))
    bench.trainer(initial_head(plan, ("odd", "even"), bench.adapted.feature_dim))
    step = step_noise(plan, 12, "north")
    assert step.event is not None
    for steps in range(1, 12):
        event = replace(step.event, steps=steps)
        affordable_rounds(Policy(maximum_epsilon=1000), plan, [step.event], [event], [event])
    return bench


def main() -> None:
    torch.set_num_threads(1)
    bench: Workbench | None = None
    for line in sys.stdin:
        order = json.loads(line)
        home = Path(order["home"])
        if bench is None:
            bench = warm(load_plan(home / "plan.toml"))
        child = os.fork()
        if child == 0:
            count = answer(home, order["rounds"], order["kill"], order["distinct"], bench)
            (home / "lines").write_text(str(count))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
