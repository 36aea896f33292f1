"""An adapter and a sealed head as a federation leaves them, for any small backbone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedgraft_client.exporting.deployed import Parts, assemble
from fedgraft_client.task_head import empty_head
from fedgraft_client.tasks import build_task
from fedgraft_common.adapted import AdaptedBackbone
from fedgraft_common.backbone import load_backbone
from fedgraft_common.features import FeatureKind
from fedgraft_common.files import save_tensors
from fedgraft_common.plan import Adapter, Backbone
from fedgraft_common.task_spec import TaskSpec
from fedgraft_simulations.families import FAMILIES

KINDS: dict[FeatureKind, str] = {
    "pooled": "single-label", "tokens": "token-classification", "map": "segmentation"
}  # fmt: skip


def leave_behind(
    config: Backbone, directory: Path, method: str = "ffa-lora", features: FeatureKind = "pooled",
    affine: bool = False,
) -> tuple[Path, Path]:  # fmt: skip
    """A trained adapter and a head: (adapter directory, sealed file)."""
    adapter = Adapter(method=method, rank=2, tokens=3, layers="last:1")
    adapted = AdaptedBackbone(load_backbone(config), adapter, 0, features)
    generator = torch.Generator().manual_seed(1)
    adapted.load(
        {n: t + 0.2 * torch.randn(t.shape, generator=generator) for n, t in adapted.state().items()}
    )
    adapted.save(directory / "adapter")
    task = build_task(TaskSpec(kind=KINDS[features], classes=("ill", "well", "unclear")))
    head = empty_head(task, adapted.feature_dim)
    with torch.no_grad():
        head.linear.weight.normal_(generator=generator)
        head.linear.bias.normal_(generator=generator)
    if affine:
        for parameter in head.with_affine().affine.parameters():  # type: ignore[union-attr]
            torch.nn.init.normal_(parameter, mean=1.0, generator=generator)
    facts = {
        "task": task.spec.model_dump_json(),
        "backbone": config.model_dump_json(),
        "plan": "0" * 64,
    }
    save_tensors(directory / "sealed.safetensors", head.state_dict(), facts, durable=False)
    return directory / "adapter", directory / "sealed.safetensors"


@pytest.fixture
def left(tmp_path: Path) -> Callable[..., Parts]:
    """Makes a small backbone of a family and what a federation left behind of it."""

    def make(name: str, **changes: Any) -> Parts:
        (family,) = (family for family in FAMILIES if family.name == name)
        (tmp_path / "model").mkdir()
        config = family.make(tmp_path / "model")
        return assemble(*leave_behind(config, tmp_path, features=family.features, **changes))

    return make
