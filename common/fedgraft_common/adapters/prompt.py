"""Prompt tuning (Lester et al. 2021): trained vectors in front of a text's tokens.

For language models. They stand before the first block, so nothing of the model can be cached.
"""

from __future__ import annotations

from typing import Any

from fedgraft_common.adapters.method import AdapterMethod
from fedgraft_common.plan import Adapter


def _config(adapter: Adapter, _: list[str]) -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=adapter.tokens)


PROMPT = AdapterMethod(
    name="prompt",
    suits=lambda _: False,
    config=_config,
    trains=lambda name: name.startswith("prompt_encoder."),
    random=lambda name: name.startswith("prompt_encoder."),
    place="model",
)
