"""The malicious server as a Flower ServerApp, which a real SuperLink runs in a process of its own.

What it needs is in its run's configuration: the honest plan, the node id of the site, and a
directory with `job.json` (server directory, altered backbone). What was answered it leaves there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedgraft_common.adapted import adapted_backbone
from fedgraft_common.messages import ADAPTER, read_status
from fedgraft_common.packing import pack
from fedgraft_server.app import read_run_config
from fedgraft_server.settings import ServerDirectory
from fedgraft_simulations.audit.hostile import Attempt, HostileServer

JOB, ANSWERS = "job.json", "answers.json"
PATIENCE = 120.0  # seconds for the answers to one batch of messages
MANY = 1000  # tensors beyond which a message is not packed
OF_EACH = 2  # attempts of each kind: a message takes seconds on a busy machine
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Tries everything on one site."""
    plan, directory, sites = read_run_config(context.run_config)
    job = json.loads((directory / JOB).read_text(encoding="utf-8"))
    operator = ServerDirectory(Path(job["server"])).operator_private_key()
    initial = adapted_backbone(plan).state()
    server = HostileServer(plan, operator, initial, job["altered"], job["altered_sha256"])
    (node,) = sites
    answers: list[dict[str, str]] = []
    for stage in stages(server):
        answers += [
            {"title": attempt.title, "group": attempt.group, "answer": word}
            for attempt, word in zip(stage, ask(grid, node, stage), strict=True)
        ]
    text = json.dumps(answers, indent=1)
    (directory / ANSWERS).write_text(text + "\n", encoding="utf-8")


def stages(server: HostileServer) -> list[list[Attempt]]:
    """Batches of messages, the first few of each kind; the order within one does not matter."""
    every = [
        server.before(), [server.honest(1)], server.again(), server.between(), server.greedy(),
        [server.honest(2)],
    ]  # fmt: skip
    return [few_of_each(stage) for stage in every]


def few_of_each(stage: Sequence[Attempt]) -> list[Attempt]:
    """The first attempts of each group."""
    kept: dict[str, list[Attempt]] = {}
    for attempt in stage:
        kept.setdefault(attempt.group, []).append(attempt)
    return [attempt for group in kept.values() for attempt in group[:OF_EACH]]


def packed(content: RecordDict) -> RecordDict:
    """The message as an honest server packs it, if its tensors can be packed."""
    adapter = content.array_records.get(ADAPTER)
    if adapter is None or len(adapter) > MANY:
        return content
    try:
        package = pack(adapter)
    except Exception:  # what is not an array travels as it is
        return content
    return RecordDict({ADAPTER: package, **{n: r for n, r in content.items() if n != ADAPTER}})


def ask(grid: Grid, node: int, attempts: Sequence[Attempt]) -> list[str]:
    """Sends messages at once and waits for what the site answers; `none` where it does not."""
    messages = [Message(packed(a.content), node, a.kind) for a in attempts]
    names = list(grid.push_messages(messages))
    answers: dict[str, str] = {}
    end = time.monotonic() + PATIENCE
    while len(answers) < len(names) and time.monotonic() < end:
        for reply in grid.pull_messages([name for name in names if name not in answers]):
            told = "error" if reply.has_error() else read_status(reply).value
            answers[reply.metadata.reply_to_message_id] = told
        time.sleep(0.1)
    return [answers.get(name, "none") for name in names]
