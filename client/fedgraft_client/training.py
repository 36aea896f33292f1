"""A site's part of one round: DP-SGD on its own records, with either mechanism.

Each step samples units by Poisson (records, or the values of the plan's column, of which at most
`privacy.records_per_unit` records are used) and is one `JointOptimizer.noisy_sum`.

Shapes: N records of the site, first dimension of every cached tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedgraft_client.dp import JointOptimizer
from fedgraft_client.head import LinearHead
from fedgraft_client.prefix import Cached
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.runtime import Workbench
from fedgraft_client.units import Batch, unit_index
from fedgraft_common.mechanism import StepNoise
from fedgraft_common.messages import Tensors, clamp
from fedgraft_common.plan import Plan


def train_round(
    bench: Workbench,
    plan: Plan,
    number: int,
    adapter: Tensors,
    head: LinearHead,
    cached: Cached,
    labels: torch.Tensor,
    step: StepNoise,
    noise: NoiseSource,
    physical_batch: int,
    units: torch.Tensor | None = None,
    remember: Callable[[int], None] = lambda _: None,
) -> Tensors:
    """Takes the round's steps; `head` is trained in place if the plan trains it.

    Formal guarantee: see `fedgraft_common.mechanism`; each step is one `JointOptimizer.noisy_sum`.

    Args:
        bench: the plan's model.
        plan: the run.
        number: of the round, from 1.
        adapter: where the round starts, by schema name.
        head: the site's own head.
        cached: what the prefix kept of the site's records.
        labels: (N,) int64.
        step: sample rate, clipping norm and noise.
        noise: randomness of sampling and noise.
        physical_batch: records whose gradients are held in memory at once.
        units: (N,) int64, the unit of each record (`Records.units`); needed if the plan protects
            a column, ignored if it protects records.
        remember: told when the device had room for a smaller physical batch only.

    Returns:
        local and none: the adapter after the steps. distributed: the site's sum of adapter
        gradients, which must not leave as it is: with secure aggregation it has no noise yet, the
        share is added to its integers; summed, it has a share and is private only in the sum.

    Raises:
        PrivacyError: the plan protects a column and `units` is None; nothing was drawn.
    """
    index = unit_index(plan, units, "here")
    model, engine = bench.trainer(head)
    bench.adapted.load(adapter)
    scale = plan.step_scale(number) / plan.training.expected_batch
    distributed = plan.privacy.mechanism == "distributed"
    groups = [
        {
            "params": list(bench.adapted.adapter.values()),
            "lr": plan.training.learning_rate * scale,
            "noise_std": 0.0 if plan.secure else step.adapter_std,
        },
        {
            "params": [p for p in model.head.parameters() if p.requires_grad],
            "lr": plan.training.head_learning_rate * scale,
            "noise_std": step.head_std,
        },
    ]
    optimizer = torch.optim.SGD([group for group in groups if group["params"]])
    joint = JointOptimizer(optimizer, step.clipping_norm, noise)
    gradient_sum: Tensors = {}
    for _ in range(plan.training.local_steps):
        if index is None:
            batch = Batch(torch.from_numpy(noise.poisson_sample(len(labels), step.sample_rate)))
        else:
            batch = index.sample(noise, step.sample_rate, plan.privacy.records_per_unit)
        chosen = tuple(tensor[batch.records] for tensor in cached)  # to the device part by part
        fitted = joint.noisy_sum(engine, chosen, labels[batch.records], physical_batch, batch.sizes)
        if fitted < physical_batch:
            physical_batch = fitted
            remember(fitted)
        if distributed:  # the adapter takes its step at the server, from the sum over sites
            for name, parameter in bench.adapted.adapter.items():
                assert parameter.grad is not None  # noqa: S101 - noisy_sum sets it
                gradient_sum[name] = parameter.grad.cpu()
                parameter.grad = None
        optimizer.step()
    joint.zero_grad(set_to_none=True)
    head.load_state_dict(model.head.state_dict())
    return gradient_sum if distributed else clamp(bench.adapted.state(), bench.initial)
