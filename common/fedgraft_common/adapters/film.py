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
ENDINGS = ("Norm", "Norm2d", "RMSNorm")
"""Names of the normalisation layers that models bring themselves, such as LlamaRMSNorm."""


def is_norm(module: nn.Module) -> bool:
    """Whether a module ends in a trainable scale per channel."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return False
    own = type(module).__name__.endswith(ENDINGS) and next(module.children(), None) is None
    return isinstance(module, NORMS) or own


def tuning(_: Adapter, targets: list[str]) -> Any:
    """PEFT's LN-tuning of the named layers."""
    from peft import LNTuningConfig

    return LNTuningConfig(target_modules=targets)


FILM = AdapterMethod(
    name="film",
    suits=is_norm,
    config=tuning,
    trains=lambda name: ".ln_tuning_layers." in name,
    random=lambda _: False,
)
