"""FiLM: a trained scale and shift after each normalisation (Perez et al. 2018, section 2.1).

A normalisation layer in eval mode already ends in a scale and a shift per channel, so a second
pair behind it is the same function as retraining the first. PEFT's LN-tuning does that for any
layer with a weight and a bias, BatchNorm included; its running statistics stay frozen and public.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fedgraft_common.adapters.method import AdapterMethod
from fedgraft_common.plan import Adapter

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.RMSNorm)


def _config(_: Adapter, targets: list[str]) -> Any:
    from peft import LNTuningConfig

    return LNTuningConfig(target_modules=targets)


FILM = AdapterMethod(
    name="film",
    suits=lambda module: isinstance(module, NORMS) and module.weight is not None,
    config=_config,
    trains=lambda name: ".ln_tuning_layers." in name,
    random=lambda _: False,
)
