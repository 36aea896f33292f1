"""LoRA (Hu et al. 2021) and FFA-LoRA (Sun et al. 2024, "Improving LoRA in privacy-preserving FL").

A layer W gets W + alpha/r * B A. FFA-LoRA freezes A at its public random start and trains B
only: under DP the noise of both factors would multiply, and averaging B and A separately is not
averaging their product.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedgraft_common.adapters.method import AdapterMethod
from fedgraft_common.plan import Adapter


def suits(module: nn.Module) -> bool:
    """Linear layers and convolutions, GPT-2's linear layer (`Conv1D`) among them.

    The output layer inside torch's own attention is left out: attention takes its weight and
    never calls it, so an adapter on it would do nothing.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        plain = set(module.dilation) == {1}  # PEFT's convolution has none
        return plain and module.groups == 1  # PEFT needs a rank that the groups divide
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _config(adapter: Adapter, targets: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=0.0, target_modules=targets
    )


LORA = AdapterMethod(
    name="lora",
    suits=suits,
    config=_config,
    trains=lambda name: ".lora_A." in name or ".lora_B." in name,
    random=lambda name: ".lora_A." in name,
)
FFA_LORA = AdapterMethod(
    name="ffa-lora",
    suits=suits,
    config=_config,
    trains=lambda name: ".lora_B." in name,
    random=lambda name: ".lora_A." in name,
)
