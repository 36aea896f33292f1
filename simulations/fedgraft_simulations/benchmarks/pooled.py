"""A federation with all its sites' steps in one call: the same in distribution, and much cheaper.

With one step in a round and the same q at every site, all sites' Poisson samples are one Poisson
sample of all records; a record's clipped gradient does not depend on who holds it; the server adds
up all sums, whose noise is one Gaussian of n times the variance. Heads differ between sites, so
they are the blocks of one large head, of which a record sees its own site's block only: the
gradient of the others is zero, and each block gets its own site's noise. The local mechanism is the
same with more noise, because the mean of adapters one step away is one step along the sum.

For studies of accuracy only: no messages, no ledgers, no secure aggregation. A test holds it
against `simulate` without noise.

Shapes: N records of all sites, n sites, K classes, D features.
"""

from __future__ import annotations

import math

import torch
from flwr.clientapp import ClientApp

from fedgraft_client.dp import JointOptimizer
from fedgraft_client.gradients import Vmap
from fedgraft_client.head import LinearHead
from fedgraft_client.prefix import Prefix
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.runtime import SiteModel
from fedgraft_client.site import Site
from fedgraft_common.messages import Tensors, clamp
from fedgraft_common.plan import Plan
from fedgraft_server.aggregation import Aggregator
from fedgraft_simulations.local_grid import LocalGrid

PHYSICAL_BATCH = 128


class BlockModel(SiteModel):
    """Logits (N, n K) of cached tensors and a site number (N,); minus infinity outside its block.

    Args:
        prefix: the remainder of the backbone.
        heads: the sites' own, all of K classes.
        device: where it runs.
    """

    def __init__(self, prefix: Prefix, heads: list[LinearHead], device: torch.device) -> None:
        classes = heads[0].linear.out_features
        whole = LinearHead(heads[0].linear.in_features, classes * len(heads))
        with torch.no_grad():
            whole.linear.weight.copy_(torch.cat([head.linear.weight for head in heads]))
            whole.linear.bias.copy_(torch.cat([head.linear.bias for head in heads]))
        whole.requires_grad_(heads[0].linear.weight.requires_grad)
        super().__init__(prefix, whole, device)
        self.owner = torch.arange(len(heads), device=device).repeat_interleave(classes)

    def forward(self, *cached: torch.Tensor) -> torch.Tensor:
        """As the class says; the site number comes last."""
        *inputs, site = cached
        logits: torch.Tensor = super().forward(*inputs)
        return logits.masked_fill(self.owner != site[:, None], -math.inf)

    def split(self, heads: list[LinearHead]) -> None:
        """Sets the sites' heads to their blocks."""
        classes = heads[0].linear.out_features
        weights, biases = (p.detach().cpu().split(classes) for p in self.head.linear.parameters())
        with torch.no_grad():
            for head, weight, bias in zip(heads, weights, biases, strict=True):
                head.linear.weight.copy_(weight)
                head.linear.bias.copy_(bias)


def pooled(plan: Plan, sites: list[Site]) -> tuple[Tensors, list[LinearHead]]:
    """The adapter that a federation ends with, and the heads that it leaves at its sites.

    Args:
        plan: one step in a round; states q.
        sites: all of the same classes; their stores are not touched.
    """
    if plan.training.local_steps != 1 or plan.training.sample_rate is None:
        raise ValueError("a pool needs one step in a round and a common sample rate")
    later = plan.training.model_dump(include={"weight_decay", "dropout", "alignment"}).values()
    if any(later) or plan.augmentation.views > 1 or plan.head.local_affine:
        raise ValueError("a pool has no views, weight decay, dropout, alignment or local affine")
    count, bench = len(sites), sites[0].bench(plan)
    step = sites[0].step(plan.replace({"aggregation.sites": count}))
    summed = plan.replace(
        {
            "privacy.mechanism": "distributed",
            "privacy.secure_aggregation": "summed",
            "aggregation.sites": count,
        }
    )
    heads = [site.start_head(plan) for site in sites]
    bench.release()  # hooks of a site's trainer would see these passes
    model = BlockModel(bench.prefix, heads, bench.device)
    model.dtype = bench.dtype
    engine = Vmap(model)
    owner = torch.arange(count).repeat_interleave(torch.tensor([len(s.records) for s in sites]))
    parts = zip(*(site.cached(bench) for site in sites), strict=True)
    cached = (*(torch.cat(part) for part in parts), owner)
    labels = torch.cat([site.labels(bench) for site in sites])
    labels = labels + owner * heads[0].linear.out_features
    own = [p for p in model.head.parameters() if p.requires_grad]
    aggregator, adapter = Aggregator(summed, bench.adapted.schema), bench.initial
    grid = LocalGrid(ClientApp(), count)  # nothing is sent
    for number in range(1, plan.rounds.count + 1):
        aggregator.requests(number, adapter, grid)  # the strategy notes where the round starts
        bench.adapted.load(adapter)
        scale = plan.step_scale(number) / plan.training.expected_batch
        groups = [
            {
                "params": list(bench.adapted.adapter.values()),
                "noise_std": math.sqrt(count) * step.adapter_std,
            },
            {
                "params": own,
                "noise_std": step.head_std,
                "lr": plan.training.head_learning_rate * scale,
            },
        ]
        optimizer = torch.optim.SGD([group for group in groups if group["params"]], lr=0.0)
        noise = NoiseSource.for_simulation("pooled", plan.hash, number)
        joint = JointOptimizer(optimizer, step.clipping_norm, noise)
        batch = torch.from_numpy(noise.poisson_sample(len(labels), step.sample_rate))
        chosen = tuple(tensor[batch] for tensor in cached)
        joint.noisy_sum(engine, chosen, labels[batch], PHYSICAL_BATCH)
        update = {}
        for name, parameter in bench.adapted.adapter.items():
            assert parameter.grad is not None  # noqa: S101 - noisy_sum sets it
            update[name] = parameter.grad.cpu()
            parameter.grad = None
        optimizer.step()
        adapter = clamp(aggregator.next_adapter(number, adapter, [update]), bench.initial)
        joint.zero_grad(set_to_none=True)
    model.split(heads)
    return adapter, heads
