"""LN-tuning: layer normalisations only (Qi et al. 2022, "Parameter-efficient tuning on LayerNorm").

What FiLM does to every normalisation, done to those of a transformer: LayerNorm and RMSNorm.
"""

from __future__ import annotations

from torch import nn

from fedgraft_common.adapters.film import is_norm, tuning
from fedgraft_common.adapters.method import AdapterMethod

OTHERS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)

LN_TUNING = AdapterMethod(
    name="ln-tuning",
    suits=lambda module: is_norm(module) and not isinstance(module, OTHERS),
    config=tuning,
    trains=lambda name: ".ln_tuning_layers." in name,
    random=lambda _: False,
)
