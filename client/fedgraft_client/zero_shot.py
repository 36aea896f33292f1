"""A head made of the names of the classes, by a backbone that has learnt images and texts together.

No record is looked at, so it costs no privacy: the head is a function of the backbone, of the
site's class names and of the plan's prompt (Radford et al. 2021, "Learning transferable visual
models from natural language supervision", section 3.1).

Shapes: K classes, D features.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from fedgraft_client.head import LinearHead
from fedgraft_common.adapted import AdaptedBackbone
from fedgraft_common.backbone import load_backbone
from fedgraft_common.errors import BackboneError, PlanError
from fedgraft_common.plan import Backbone, Plan


def text_prototypes(plan: Plan, classes: tuple[str, ...], adapted: AdaptedBackbone) -> torch.Tensor:
    """(K, D) float32 rows of length 1: the backbone's text features of each class's prompt.

    Raises:
        PlanError: the backbone has no texts, its texts have other features than its images, or
            the task has no classes.
    """
    if not classes:
        raise _refused("a task without classes")
    if adapted.backbone.manifest.feature_mean or adapted.features != "pooled":
        raise _refused("features of a record that are not those of a text")
    prompts = tuple(plan.head.prompt.replace("{}", name) for name in classes)
    directory = adapted.backbone.directory
    try:
        found = _features(plan.backbone.model_dump_json(), str(directory), prompts)
    except BackboneError as error:
        raise _refused(f"{error.field}: {error.value}") from None
    if found.shape[1] != adapted.feature_dim:
        raise _refused(f"{found.shape[1]} features of a text, {adapted.feature_dim} of a record")
    return LinearHead.normalise(found)


@lru_cache(maxsize=16)
def _features(backbone: str, directory: str, prompts: tuple[str, ...]) -> torch.Tensor:
    settings = {"modality": "text", "pooling": "auto", "preprocessing": {}, "options": {}}
    config = Backbone.model_validate_json(backbone).model_copy(update=settings)
    where = None if config.source.partition(":")[0] == "hf" else Path(directory)
    loaded = load_backbone(config, where)
    with torch.no_grad():
        return loaded.features(loaded.model, loaded.prepare(list(prompts)))


def _refused(found: str) -> PlanError:
    return PlanError(
        "head.training", f"text, with {found}",
        "text with a backbone of images and texts, such as CLIP, and a task with classes",
        "Choose another head or another backbone.",
    )  # fmt: skip
