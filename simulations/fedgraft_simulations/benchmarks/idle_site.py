"""A production daemon whose site does not train: what remains is what a round costs.

    python -m fedgraft_simulations.benchmarks.idle_site SITE_FILE PLAN NUMBER

Identity, mutual TLS, signed plan, policy, ledger, egress guard and, if the plan has it, secure
aggregation are those of production; in place of training it returns something at once. What it
sent and received by the beginning of each round is left in `traffic.json` beside the site file.
"""

from __future__ import annotations

import atexit
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedgraft_client import connection, site
from fedgraft_client.runtime import Workbench
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan
from fedgraft_simulations.federation.site import main

TRAFFIC = "traffic.json"


@dataclass(slots=True)
class Traffic:
    """What went over the line.

    Attributes:
        totals: bytes sent, bytes received, calls so far.
        rounds: those totals at the beginning of each round.
    """

    totals: list[int] = field(default_factory=lambda: [0, 0, 0])
    rounds: list[list[int]] = field(default_factory=list)

    def watched(self, send: Callable[..., Any]) -> Callable[..., Any]:
        """Counts what this method of the connection's HTTP client carries."""

        def watching(client: Any, context: Any, **options: Any) -> Any:
            response = send(client, context, **options)
            headers = sum(len(name) + len(value) + 4 for name, value in context.request.headers.raw)
            for place, count in enumerate(
                (headers + len(context.request.content), len(response.content), 1)
            ):
                self.totals[place] += count
            return response

        return watching


traffic = Traffic()


def no_training(
    bench: Workbench, plan: Plan, number: int, adapter: Tensors, *_: Any, **__: Any
) -> Tensors:
    """Other values in every round, because equal ones would not travel; zeros to be masked."""
    traffic.rounds.append(list(traffic.totals))
    if plan.secure:
        return {name: torch.zeros_like(value) for name, value in adapter.items()}
    return {name: value + 1e-6 * number for name, value in adapter.items()}


if __name__ == "__main__":
    client = connection._Client
    client._send = traffic.watched(client._send)  # type: ignore[method-assign]
    setattr(site, "train_round", no_training)  # noqa: B010 - a name that `site` imports
    left = Path(sys.argv[1]).with_name(TRAFFIC)
    atexit.register(lambda: left.write_text(json.dumps(traffic.rounds), encoding="utf-8"))
    main()
