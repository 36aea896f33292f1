"""Prefix tuning (Li and Liang 2021): trained keys and values in front of every attention layer.

For language models that attend to keys and values of earlier tokens.
"""

from __future__ import annotations

from typing import Any

from fedgraft_common.adapters.method import AdapterMethod
from fedgraft_common.plan import Adapter


def _config(adapter: Adapter, _: list[str]) -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=adapter.tokens)


PREFIX = AdapterMethod(
    name="prefix",
    suits=lambda _: False,
    config=_config,
    trains=lambda name: name.startswith("prompt_encoder."),
    random=lambda name: name.startswith("prompt_encoder."),
    place="model",
)
