"""A production daemon whose site does not train: what remains is what a round costs.

    python -m fedgraft_simulations.benchmarks.idle_site SITE_FILE PLAN NUMBER

Identity, mutual TLS, signed plan, policy, ledger, egress guard and, if the plan has it, secure
aggregation are those of production; in place of training it returns something at once.
"""

from __future__ import annotations

from typing import Any

import torch

from fedgraft_client import site
from fedgraft_client.runtime import Workbench
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan
from fedgraft_simulations.federation.site import main


def no_training(
    bench: Workbench, plan: Plan, number: int, adapter: Tensors, *_: Any, **__: Any
) -> Tensors:
    """Other values in every round, because equal ones would not travel; zeros to be masked."""
    if plan.secure:
        return {name: torch.zeros_like(value) for name, value in adapter.items()}
    return {name: value + 1e-6 * number for name, value in adapter.items()}


if __name__ == "__main__":
    setattr(site, "train_round", no_training)  # noqa: B010 - a name that `site` imports
    main()
