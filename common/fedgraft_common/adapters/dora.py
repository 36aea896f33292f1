"""DoRA (Liu et al. 2024): LoRA for the direction of a weight, and a trained length of each output.

Under DP the noise of both of LoRA's factors multiplies, as it does for plain LoRA, and the mean of
two sites' adapters is not the adapter of the mean. Only layers whose per-example gradient is exact
are trained; DoRA's products do not go through the layer that a hook watches, so that is `vmap`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fedgraft_common.adapters import lora
from fedgraft_common.adapters.method import AdapterMethod
from fedgraft_common.plan import Adapter


def _config(adapter: Adapter, targets: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=0.0, use_dora=True,
        target_modules=targets,
    )  # fmt: skip


DORA = AdapterMethod(
    name="dora",
    suits=lambda module: lora.suits(module) and not isinstance(module, nn.Conv1d),
    config=_config,
    trains=lambda name: any(f".lora_{part}." in name for part in ("A", "B", "magnitude_vector")),
    random=lambda name: ".lora_A." in name,
)
