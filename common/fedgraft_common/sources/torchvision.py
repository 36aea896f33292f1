"""`torchvision:NAME`: networks of torchvision, with weights from a local safetensors file.

torchvision publishes pickles only, and a pickle is never opened here; the file is converted once,
where it is trusted. Its parameter names are torchvision's. The layer that knows the classes of the
pre-training is left out, auxiliary classifiers of Inception and GoogLeNet too.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from fedgraft_common import plan as plans
from fedgraft_common.description import read_manifest
from fedgraft_common.errors import BackboneError
from fedgraft_common.modality import Modality
from fedgraft_common.preparations import build
from fedgraft_common.sources import weights
from fedgraft_common.sources.blocks import find_stages
from fedgraft_common.sources.source import Loaded, Output, Read, base_of

PROPOSALS = 64
"""Boxes that a Faster R-CNN looks at in each image, unless `rpn_post_nms_top_n_test` says."""
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
AS_TRAINED: dict[str, dict[str, Any]] = {
    "inception_v3": {"transform_input": True, "aux_logits": False, "init_weights": False},
    "googlenet": {"transform_input": True, "aux_logits": False, "init_weights": False},
}
"""Options of the published weights, which the constructors do not assume by themselves."""
WHOLE = (
    "encoder", "features", "trunk_output", "layer4", "Mixed_7c", "inception5b", "conv5", "layers"
)  # fmt: skip
"""Modules whose output is the last map, or the tokens, of a classifier."""


def load(name: str, config: plans.Backbone) -> Loaded:
    """Builds the named network and fills it from `backbone.weights`.

    Raises:
        BackboneError: torchvision knows no such network or option, it is of a kind that gives no
            features, there are no weights, or they do not fit or are not the plan's.
    """
    model = _build(name, config)
    if config.weights is None:
        raise BackboneError(
            "backbone.weights", "none, and torchvision publishes pickles only",
            "a safetensors file",
            "Convert them once where you trust them: safetensors.torch.save_file("
            "torchvision.models.get_model(NAME, weights='DEFAULT').state_dict(), path).",
        )  # fmt: skip
    file = weights.file_of(Path(config.weights))
    digest = weights.check_hash((file,), config.sha256)
    weights.fill(model, weights.read(file), file)
    manifest = read_manifest(file.parent, f"torchvision:{name}")
    modality, read = _kind(model)
    found = {"channels": 3, **IMAGENET, **_published(name)}
    if modality == "video":
        found = {"frames": 16} | found
    settings = manifest.preprocessing or found
    preparation = build(settings, modality, file.parent, str(file), config.preprocessing)
    blocks = manifest.blocks or _blocks(model)
    frozen = model.requires_grad_(False).eval()
    return Loaded(frozen, manifest, preparation, read, blocks, digest, file.parent)


def _build(name: str, config: plans.Backbone) -> Any:
    from torchvision import models

    if name not in models.list_models():
        raise BackboneError(
            "backbone.source", f"torchvision:{name}",
            "a name that torchvision.models.list_models() lists", "Correct the plan.",
        )  # fmt: skip
    detects = name in models.list_models(module=models.detection)
    if detects and "rcnn" not in name:
        raise BackboneError(
            "backbone.source", f"torchvision:{name}",
            "a classifier, a segmenter with one classifier, or an R-CNN: this detector's heads "
            "give no features of single objects", "Choose another network, YOLOS or DETR for one.",
        )  # fmt: skip
    options = {**AS_TRAINED.get(name, {}), **config.options, "weights": None}
    if detects:
        options = {"rpn_post_nms_top_n_test": PROPOSALS, **options}
    if detects or name in models.list_models(module=models.segmentation):
        options["weights_backbone"] = None  # else it would be fetched, as a pickle
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = models.get_model(name, **options)
            return _without_output_layer(model)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise BackboneError(
            "backbone.options", dict(config.options), f"what torchvision's {name} takes ({error})",
            "Correct the plan.",
        ) from None  # fmt: skip


def _without_output_layer(model: Any) -> Any:
    """The same network, its last layer, the one with an output for each class, left out."""
    if hasattr(model, "roi_heads"):
        model.roi_heads.box_predictor = nn.Identity()
        return model
    if getattr(model, "aux_classifier", None) is not None:
        model.aux_classifier = None
    last = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not path.startswith("backbone.")
    ][-1]
    parent, _, child = last.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, child, nn.Identity())
    return model


def _published(name: str) -> dict[str, Any]:
    """Size and constants that torchvision states for its own weights."""
    from torchvision import models

    if "rcnn" in name:
        return {"size": 320 if "320" in name else 800, **IMAGENET}
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    crop = getattr(transforms, "crop_size", None) or getattr(transforms, "resize_size", [224])
    return {
        "size": int(crop[0] if isinstance(crop, list | tuple) else crop),
        "mean": tuple(transforms.mean),
        "std": tuple(transforms.std),
    }


def _kind(model: nn.Module) -> tuple[Modality, Read]:
    if hasattr(model, "roi_heads"):
        return "image", _boxes
    if hasattr(model, "backbone") and hasattr(model, "classifier"):
        return "image", _segmenter
    if any(isinstance(module, nn.Conv3d) for module in model.modules()):
        return "video", _classifier(video=True)
    return "image", _classifier(video=False)


def _blocks(model: nn.Module) -> tuple[str, ...]:
    if not hasattr(model, "backbone"):
        return find_stages(model)
    body: nn.Module = model.backbone  # type: ignore[assignment]
    inner = tuple(f"backbone.{name}" for name in find_stages(body))
    if not hasattr(model, "roi_heads"):
        return (*inner, "classifier")
    modules = dict(model.named_modules())
    path = "backbone.body" if "backbone.body" in modules else "backbone"
    stages = tuple(f"{path}.{name}" for name in find_stages(modules[path]))
    return (*stages, "roi_heads.box_head")


def _classifier(video: bool) -> Read:
    def read(model: nn.Module, named: dict[str, torch.Tensor]) -> Output:
        """The last map or the tokens, and what went into the classifier."""
        base = base_of(model)
        pixels = named["pixel_values"].transpose(1, 2) if video else named["pixel_values"]
        seen: list[torch.Tensor] = []
        handle = _last(base).register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            pooled = base(pixels)
        finally:
            handle.remove()
        hidden = seen[-1]
        if type(base).__name__ == "SwinTransformer":  # channels last
            hidden = hidden.permute(0, 3, 1, 2)
        if hidden.dim() == 5:
            hidden = hidden.flatten(2).transpose(1, 2)
        return Output(hidden, pooled)

    return read


def _last(base: nn.Module) -> nn.Module:
    for name in WHOLE:
        if hasattr(base, name):
            found: nn.Module = getattr(base, name)
            return found
    return base.get_submodule(find_stages(base)[-1])


def _segmenter(model: nn.Module, named: dict[str, torch.Tensor]) -> Output:
    """The map before the last convolution, at the resolution of the decoder."""
    base = base_of(model)
    return Output(base.classifier(base.backbone(named["pixel_values"])["out"]))


def _boxes(model: nn.Module, named: dict[str, torch.Tensor]) -> Output:
    """Faster R-CNN: features and place of the proposed boxes, (N, proposals, D + 4).

    Where there are fewer boxes than the most, rows of zeros follow. The last four numbers are
    centre, width and height of the proposal as shares of the image.
    """
    from torchvision.models.detection.image_list import ImageList

    base = base_of(model)
    pixels = named["pixel_values"]
    side = pixels.shape[-1]
    shapes = [(side, side)] * len(pixels)
    maps = base.backbone(pixels)
    proposals, _ = base.rpn(ImageList(pixels, shapes), maps, None)
    regions = base.roi_heads.box_roi_pool(maps, proposals, shapes)
    features = base.roi_heads.box_head(regions)
    corners = torch.cat(proposals) / side
    centre, extent = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    rows = torch.cat([features, centre, extent], dim=1).split([len(p) for p in proposals])
    most = base.rpn.post_nms_top_n()
    blank = rows[0].new_zeros(most, rows[0].shape[1])
    return Output(pad_sequence([blank, *rows], batch_first=True)[1:])
