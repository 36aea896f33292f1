"""What the cryptographic noise costs: a DP LoRA step with it, against the step with torch.randn.

Both ways take the same step on the same model; only the noise is drawn differently. The secure way
draws four normals for each trained value from a ChaCha20 stream, in float64 on the CPU. Adapters on
all blocks leave nothing to cache; with fewer, both the step and the noise get cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from fedgraft_client.randomness import NoiseSource
from fedgraft_common.plan import Plan
from fedgraft_simulations.benchmarks.glyph_vit import CACHE, glyph_vit
from fedgraft_simulations.benchmarks.measure import Ratio, Report, Way, alternate, timed
from fedgraft_simulations.benchmarks.prefix_cache import Step

AIM = 0.05  # share of a step


class PlainNoise(NoiseSource):
    """Noise as most DP-SGD draws it: float32 from torch's generator, protected against nothing."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(simulation_key=0)
        self._device = device

    def gaussian(self, shape: Sequence[int], std: float) -> torch.Tensor:
        """N(0, std^2), float32 on the step's device."""
        return torch.randn(tuple(shape), device=self._device) * std


def measure(
    repetitions: int = 9,
    batch: int = 64,
    device: str = "cpu",
    dtype: str = "float32",
    cache: Path = CACHE,
    steps: int = 1,
) -> Report:
    """Times steps on random images; only shapes matter.

    Args:
        repetitions: pairs of measurements.
        batch: records of a step.
        device: where the step runs; the secure noise is drawn on the CPU.
        dtype: of the frozen layers.
        cache: where the model is kept; its weights are random.
        steps: in one measurement.
    """
    where = torch.device(device)
    step = Step(lora_plan(glyph_vit(cache, steps=0), dtype), where, batch, whole=False)
    secure, plain = NoiseSource.from_operating_system(), PlainNoise(where)

    def taking(noise: NoiseSource) -> float:
        step.noise = noise
        return step.time(steps)

    values = sum(parameter.numel() for parameter in step.parameters)
    taking(secure), taking(plain)
    slow, fast = alternate([lambda: taking(secure), lambda: taking(plain)], repetitions)
    draws = [timed(lambda: secure.gaussian((values,), 1.0)) for _ in range(repetitions)]
    ratio = Ratio(
        "LoRA, rank 8, every linear layer of 12 blocks",
        Way("NoiseSource", slow),
        Way("torch.randn", fast),
        1 / (1 - AIM),
    )
    return Report(
        "secure_noise",
        f"One DP step, ViT of 12 blocks, batch {batch}, {dtype} on {device}",
        ratios=(ratio,),
        figures={
            "trained values": values,
            "secure noise, % of the step (difference of the medians)": 100 * (1 - 1 / ratio.value),
            "secure noise, % of the step (median of pairs)": 100
            * median(1 - f / s for s, f in zip(slow, fast, strict=True)),
            "drawing it alone, ms": 1000 * median(draws),
            "drawing it alone, % of the step": 100 * median(draws) / ratio.slow.median,
        },
        notes=(
            f"The target is a ceiling: {AIM:.0%} of the step.",
            "A difference smaller than the spread of the pairs may come out negative; the draw "
            "alone does not.",
        ),
    )


def lora_plan(backbone: Path, dtype: str) -> Plan:
    """LoRA of rank 8 on all blocks and a privately trained head."""
    return Plan().replace(
        {
            "backbone.source": f"dir:{backbone}",
            "backbone.frozen_dtype": dtype,
            "adapter.method": "lora",
            "adapter.rank": 8,
            "adapter.layers": "all",
            "head.training": "private",
            "privacy.mechanism": "local",
        }
    )
