"""A site's part of one round: DP-SGD on its own records, with either mechanism.

Each step samples units by Poisson (records, or the values of the plan's column, of which at most
`privacy.records_per_unit` records are used) and is one `JointOptimizer.noisy_sum`.

Shapes: N records of the site, first dimension of every cached tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from fedgraft_client.dp import JointOptimizer
from fedgraft_client.head import LinearHead
from fedgraft_client.prefix import Cached
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.runtime import Workbench
from fedgraft_client.task_head import initial_state
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
    views: int = 1,
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
        views: K rows of `cached` for each record, next to each other; their gradients are averaged
            before they are clipped.

    Returns:
        local and none: the adapter after the steps. distributed: the site's sum of adapter
        gradients, which must not leave as it is: with secure aggregation it has no noise yet, the
        share is added to its integers; summed, it has a share and is private only in the sum.

    Raises:
        PrivacyError: the plan protects a column and `units` is None; nothing was drawn.
    """
    index = unit_index(plan, units, "here")
    model, engine = bench.trainer(head, plan.training.dropout, plan.training.alignment)
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
    trained_head = {n: p for n, p in model.head.named_parameters() if p.requires_grad}
    start = initial_state(model.head) if plan.training.weight_decay else {}
    optimizer = torch.optim.SGD([group for group in groups if group["params"]])
    joint = JointOptimizer(optimizer, step.clipping_norm, noise)
    gradient_sum: Tensors = {}
    for _ in range(plan.training.local_steps):
        if index is None:
            batch = Batch(torch.from_numpy(noise.poisson_sample(len(labels), step.sample_rate)))
        else:
            batch = index.sample(noise, step.sample_rate, plan.privacy.records_per_unit)
        batch = _with_views(batch, views)
        chosen = tuple(tensor[batch.records] for tensor in cached)  # to the device part by part
        if plan.training.dropout:
            chosen = (_kept(len(batch.records), bench, plan.training.dropout, noise), *chosen)
        answers = labels[batch.records.div(views, rounding_mode="floor")]
        fitted = joint.noisy_sum(engine, chosen, answers, physical_batch, batch.sizes)
        if fitted < physical_batch:
            physical_batch = fitted
            remember(fitted)
        if distributed:  # the adapter takes its step at the server, from the sum over sites
            for name, parameter in bench.adapted.adapter.items():
                assert parameter.grad is not None  # noqa: S101 - noisy_sum sets it
                gradient_sum[name] = parameter.grad.cpu()
                parameter.grad = None
        else:
            _pull(bench.adapted.adapter, bench.initial, plan, plan.training.weight_decay)
            _pull(bench.adapted.adapter, adapter, plan, plan.training.proximal)
        _pull(trained_head, start, plan, plan.training.weight_decay)
        optimizer.step()
    joint.zero_grad(set_to_none=True)
    bench.rest()
    head.load_state_dict(model.head.state_dict())
    return gradient_sum if distributed else clamp(bench.adapted.state(), bench.initial)


def _with_views(batch: Batch, views: int) -> Batch:
    """The rows of a batch where each record has several, those of a unit next to each other."""
    if views == 1:
        return batch
    rows = (batch.records[:, None] * views + torch.arange(views)).flatten()
    sizes = torch.ones_like(batch.records) if batch.sizes is None else batch.sizes
    return Batch(rows, sizes * views)


def _kept(rows: int, bench: Workbench, dropout: float, noise: NoiseSource) -> torch.Tensor:
    """(rows, D) factors of the features: 0 with probability `dropout`, else 1 / (1 - dropout).

    They look at no record, and each row's are independent of all others: a unit's clipped
    gradient is a function of the unit and of randomness that would be the same without it.
    """
    size = rows * bench.adapted.feature_dim
    found = torch.zeros(size)
    found[torch.from_numpy(noise.poisson_sample(size, 1 - dropout))] = 1 / (1 - dropout)
    return found.view(rows, -1)


def _pull(
    parameters: Mapping[str, nn.Parameter], towards: Tensors, plan: Plan, strength: float
) -> None:
    """Adds to each noisy gradient sum what draws a parameter back.

    Post-processing: it looks at the parameters and at public numbers, after clipping and noise.
    The sum is divided by the expected batch later on, so the pull is multiplied by it here.
    """
    if strength == 0:
        return
    weight = strength * plan.training.expected_batch
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.grad is not None  # noqa: S101 - noisy_sum sets it
            parameter.grad += weight * (parameter - towards[name].to(parameter))
