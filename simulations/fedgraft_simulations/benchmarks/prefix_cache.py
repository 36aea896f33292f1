"""One DP step with the frozen prefix cached, against the same step without.

The arithmetic: with adapters on the last 2 of 12 blocks and F for the forward pass of a block, a
step costs 12 F forward and about 2 F backward (weights are frozen, so there is no weight gradient);
cached it costs 2 F and 2 F less the gradient that the first adapted block need not pass on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fedgraft_client.dp import JointOptimizer
from fedgraft_client.head import LinearHead
from fedgraft_client.prefix import Cached
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.runtime import Workbench
from fedgraft_common.adapted import AdaptedBackbone
from fedgraft_common.plan import Plan
from fedgraft_simulations.benchmarks.glyph_vit import CACHE, SIZE, glyph_vit
from fedgraft_simulations.benchmarks.measure import Ratio, Report, Way, alternate, timed

CLASSES = 10


def measure(
    repetitions: int = 7,
    batch: int = 64,
    device: str = "cpu",
    dtype: str = "float32",
    cache: Path = CACHE,
) -> Report:
    """Times steps on random images; only shapes matter."""
    cases = (
        ("adapters on the last 2 of 12 blocks", "lora", "last:2", 2.3),
        ("head only", "none", "all", 100.0),
    )
    ratios = []
    for name, method, layers, target in cases:
        plan = Plan().replace(
            {
                "backbone.source": f"dir:{glyph_vit(cache, steps=0)}",
                "backbone.frozen_dtype": dtype,
                "adapter.method": method,
                "adapter.layers": layers,
                "adapter.targets": ["q_proj", "v_proj"] if method == "lora" else "auto",
                "head.training": "private",
                "privacy.mechanism": "local",
            }
        )
        cached = Step(plan, torch.device(device), batch, whole=False)
        whole = Step(plan, torch.device(device), batch, whole=True)
        slow, fast = alternate([whole.time, cached.time], repetitions)
        ratios.append(
            Ratio(name, Way("whole model", slow), Way(f"from {cached.door}", fast), target)
        )
    return Report(
        "prefix_cache",
        f"One DP step, ViT of 12 blocks, batch {batch}, {dtype} on {device}",
        ratios=tuple(ratios),
    )


class Whole(nn.Module):
    """In place of a `Prefix`: keeps the inputs and runs the whole model each time."""

    door = "inputs"
    reason = "asked not to"

    def __init__(self, model: AdaptedBackbone) -> None:
        super().__init__()
        self.model = model

    def compute(self, inputs: torch.Tensor) -> Cached:
        """The inputs."""
        return (inputs,)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Features (N, D)."""
        features: torch.Tensor = self.model(inputs)
        return features


class Step:
    """A DP step that can be repeated.

    Attributes:
        door: where the step starts.
        parameters: what it trains; their `grad` is the last step's noisy sum.
        noise: where its noise comes from.
    """

    def __init__(self, plan: Plan, device: torch.device, batch: int, whole: bool) -> None:
        bench = Workbench(plan, device)
        if whole:
            bench.prefix = Whole(bench.adapted)  # type: ignore[assignment]
        self.door = bench.prefix.door
        self._model, self._engine = bench.trainer(LinearHead(bench.adapted.feature_dim, CLASSES))
        images = torch.rand(batch, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        self._cached = tuple(tensor.to(device) for tensor in bench.cache(images))
        self._labels = (torch.arange(batch) % CLASSES).to(device)
        self._batch = batch
        self._device = device
        self.parameters = [*bench.adapted.adapter.values(), *self._model.head.parameters()]
        self._groups = [{"params": self.parameters, "lr": 0.0, "noise_std": 1.0}]
        self.noise: NoiseSource = NoiseSource.for_simulation("benchmark")
        self.run()

    def run(self) -> None:
        """One step."""
        optimizer = torch.optim.SGD([dict(group) for group in self._groups])
        joint = JointOptimizer(optimizer, 1.0, self.noise)
        joint.noisy_sum(self._engine, self._cached, self._labels, self._batch)
        optimizer.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def time(self, steps: int = 3) -> float:
        """Seconds a step takes, over a few of them."""

        def several() -> None:
            for _ in range(steps):
                self.run()

        return timed(several) / steps
