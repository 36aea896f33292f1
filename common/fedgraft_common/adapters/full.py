"""Full fine-tuning of the chosen blocks: every weight in them is trained and sent.

PEFT keeps a trained copy beside the frozen block (`modules_to_save`) and saves it like any other
adapter. Running statistics of a BatchNorm are no weights; they stay frozen and public.
"""

from __future__ import annotations

from typing import Any

from fedgraft_common.adapters.method import AdapterMethod
from fedgraft_common.plan import Adapter


def _config(_: Adapter, targets: list[str]) -> Any:
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    return LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=targets)


FULL = AdapterMethod(
    name="full",
    suits=lambda _: True,
    config=_config,
    trains=lambda name: ".modules_to_save." in name,
    random=lambda _: False,
    place="blocks",
)
