"""IA3 (Liu et al. 2022, section 3.3): a trained factor for each output of a layer."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedgraft_common.adapters.method import AdapterMethod
from fedgraft_common.plan import Adapter


def _suits(module: nn.Module) -> bool:
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False  # attention takes its weight and never calls it
    return isinstance(module, nn.Linear | nn.Conv2d) or type(module).__name__ == "Conv1D"


def _config(_: Adapter, targets: list[str]) -> Any:
    from peft import IA3Config

    return IA3Config(target_modules=targets, feedforward_modules=[])


IA3 = AdapterMethod(
    name="ia3",
    suits=_suits,
    config=_config,
    trains=lambda name: ".ia3_l." in name,
    random=lambda _: False,
)
