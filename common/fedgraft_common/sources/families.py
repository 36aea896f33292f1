"""What is particular about families of transformers' models, and nothing else.

Most models need none of it: `AutoModel`, keyword inputs, `last_hidden_state`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from fedgraft_common.errors import BackboneError
from fedgraft_common.modality import Modality
from fedgraft_common.sources.source import Output, Read, base_of

BY_INPUT: Final[dict[str, Modality]] = {
    "pixel_values": "image",
    "pixel_values_videos": "video",
    "input_ids": "text",
    "input_values": "audio",
    "input_features": "audio",
    "past_values": "series",
}
"""Modality by the name of a model's main input."""
VIDEO: Final = ("videomae", "timesformer", "vivit")
PAIRS: Final = ("clip", "siglip", "chinese_clip")
"""Two towers, one for images and one for texts; an image task uses the first."""
ENCODERS: Final = (
    "bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra", "t5", "mt5"
)  # fmt: skip
"""Encoders whose tokens see one another in both directions."""
LEFT: Final = ("xlnet",)
"""Texts are padded on the left."""
OUTPUT_LAYER: Final = "decode_head.classifier."
"""Where a segmenter keeps the layer that knows the classes it was trained on."""
LAYERS: Final[dict[str, tuple[str, ...]]] = {
    "wav2vec2": ("encoder.layers",),
    "hubert": ("encoder.layers",),
    "wavlm": ("encoder.layers",),
    "patchtst": ("encoder.layers",),
    "detr": ("encoder.layers", "decoder.layers"),
    "conditional_detr": ("encoder.layers", "decoder.layers"),
    "segformer": ("stages", "segformer.stages", "decode_head"),
}
"""Lists of layers, or single parts, in the order they run, where the longest list is another."""


def settle(config: Any) -> None:
    """Settings that make an output a function of the record and the weights alone.

    Dropout, layer drop, stochastic depth and SpecAugment act in train mode only, and a backbone
    is in eval mode; what remains is a cache of earlier tokens and masking for pre-training.
    """
    for name in ("use_cache", "use_mems_eval", "do_mask_input"):
        if getattr(config, name, None):
            setattr(config, name, False)


def class_of(config: Any) -> Any:
    """The class that gives features: the encoder of an encoder-decoder, a segmenter whole."""
    import transformers

    names = getattr(config, "architectures", None) or []
    if any(str(name).endswith("ForSemanticSegmentation") for name in names):
        return transformers.AutoModelForSemanticSegmentation
    if config.model_type.endswith("t5"):
        return transformers.AutoModelForTextEncoding
    return transformers.AutoModel


def without_output_layer(model: Any) -> Any:
    """A segmenter without the layer that knows the classes it was trained on."""
    decoder = getattr(model, "decode_head", None)
    if decoder is not None:
        decoder.classifier = nn.Identity()
    return model


def modality_of(model: Any, chosen: str) -> Modality:
    """What the model takes; a model with two towers does as the plan says, and images by default.

    Raises:
        BackboneError: the plan asks for a modality that the model has not.
    """
    kind = model.config.model_type
    found = BY_INPUT.get(model.main_input_name, "text")
    possible: tuple[Modality, ...] = (found,)
    if kind in PAIRS:
        possible = ("image", "text", "image-text")
    elif kind in VIDEO:
        possible = ("video",)
    if chosen == "auto":
        return possible[0]
    for modality in possible:
        if modality == chosen:
            return modality
    raise BackboneError(
        "backbone.modality", chosen, f"auto, or for {kind}: {', '.join(possible)}",
        "Correct the plan.",
    )  # fmt: skip


def blocks_of(model: nn.Module, modality: Modality) -> tuple[str, ...]:
    """The layers of models where the longest list is something else; empty: look for it."""
    modules = dict(model.named_modules())
    paths: tuple[str, ...] = LAYERS.get(_kind(model), ())
    if _kind(model) in PAIRS:
        towers = {"image": ("vision_model",), "text": ("text_model",)}
        chosen = towers.get(modality, ("vision_model", "text_model"))
        paths = tuple(f"{tower}.encoder.layers" for tower in chosen)
    found: list[str] = []
    for path in paths:
        if isinstance(modules.get(path), nn.ModuleList):
            found += [f"{path}.{name}" for name, _ in modules[path].named_children()]
        elif path in modules:
            found.append(path)
    return tuple(found)


def preparation_settings(model: Any, directory: Path, modality: Modality) -> dict[str, Any]:
    """What the model and its processor say about the preparation of its inputs."""
    config = model.config
    processor = _processor(directory)
    text = getattr(config, "text_config", config)
    if modality == "text":
        return _text(text, config.model_type)
    if modality == "image-text":
        return {"image": _image(config, processor), "text": _text(text, config.model_type)}
    if modality == "audio":
        found = {"rate": processor.get("sampling_rate", getattr(config, "sampling_rate", 16_000))}
        return found | {"input_name": model.main_input_name, "kind": config.model_type}
    if modality == "series":
        return {"length": config.context_length, "channels": config.num_input_channels}
    image = _image(config, processor)
    return image | {"frames": config.num_frames} if modality == "video" else image


def _text(config: Any, kind: str) -> dict[str, Any]:
    most = getattr(config, "max_position_embeddings", None) or 128
    if kind in ("roberta", "xlm-roberta", "camembert"):
        most -= 2  # their positions begin behind the padding index
    pad = getattr(config, "pad_token_id", None)
    return {
        "length": max(1, min(128, most)),
        "vocabulary": config.vocab_size,
        "pad": 0 if pad is None or not 0 <= pad < config.vocab_size else pad,
        "side": "left" if kind in LEFT else "right",
    }


def _image(config: Any, processor: dict[str, Any]) -> dict[str, Any]:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or processor.get("size", 224)
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    channels = int(getattr(config, "num_channels", 3))
    return {
        "channels": channels,
        "size": int(size[0] if isinstance(size, list | tuple) else size),
        "mean": tuple(processor.get("image_mean", [0.5] * channels)),
        "std": tuple(processor.get("image_std", [0.5] * channels)),
    }


def _processor(directory: Path) -> dict[str, Any]:
    path = directory / "preprocessor_config.json"
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise BackboneError(str(path), str(error), "JSON", "Correct or remove the file.") from None
    return found if isinstance(found, dict) else {}


def reader_of(model: nn.Module, modality: Modality) -> Read:
    """How a model is run."""
    kind = _kind(model)
    if kind in PAIRS:
        return {"image": _image_tower, "text": _text_tower}.get(modality, _both_towers)
    if getattr(model, "decode_head", None) is not None:
        return _segmenter
    if kind in ENCODERS:
        return _encoder
    special: dict[str, Read] = {
        "yolos": _yolos, "patchtst": _channels_of_patches, "xlnet": _xlnet
    }  # fmt: skip
    return special.get(kind, _by_name)


def _kind(model: Any) -> str:
    return str(model.config.model_type)


def _by_name(model: nn.Module, named: dict[str, torch.Tensor]) -> Any:
    return model(**named)


def _prompts(model: Any) -> bool:
    """Whether PEFT puts tokens or keys in front, and lengthens the mask for them."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _encoder(model: nn.Module, named: dict[str, torch.Tensor]) -> Any:
    """With the mask as attention wants it, (N, 1, 1, T), so that nothing looks into it on the way.

    Transformers skips a mask without padding; whether it does would depend on the records, and
    `vmap` cannot follow that. A prompt lengthens the mask and needs it as it is.
    """
    if _prompts(model):
        return model(**named)
    hidden = (named["attention_mask"] == 0)[:, None, None, :]
    mask = torch.zeros(hidden.shape, device=hidden.device)
    mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    return model(**(named | {"attention_mask": mask}))


def _xlnet(model: nn.Module, named: dict[str, torch.Tensor]) -> Any:
    """With the mask that XLNet makes of the other one in a way that ONNX has no word for."""
    if _prompts(model):
        return model(**named)
    mask = (named["attention_mask"] == 0).float()
    return model(input_ids=named["input_ids"], input_mask=mask)


def _segmenter(model: nn.Module, named: dict[str, torch.Tensor]) -> Output:
    """The decoder's map, before the layer that knew classes: (N, D, H/4, W/4)."""
    return Output(model(**named).logits)


def _yolos(model: nn.Module, named: dict[str, torch.Tensor]) -> Output:
    """The detection tokens, which stand at the end: (N, queries, D)."""
    found = model(**named)
    queries = base_of(model).config.num_detection_tokens
    return Output(found.last_hidden_state[:, -queries:], getattr(found, "pooler_output", None))


def _channels_of_patches(model: nn.Module, named: dict[str, torch.Tensor]) -> Output:
    """PatchTST gives (N, channels, patches, D): all of them are tokens."""
    return Output(model(**named).last_hidden_state.flatten(1, 2))


def _image_tower(model: nn.Module, named: dict[str, torch.Tensor]) -> Output:
    base = base_of(model)
    found = base.vision_model(pixel_values=named["pixel_values"])
    return Output(found.last_hidden_state, _projected(base, "visual", found.pooler_output))


def _text_tower(model: nn.Module, named: dict[str, torch.Tensor]) -> Output:
    base = base_of(model)
    found = base.text_model(**named)
    return Output(found.last_hidden_state, _projected(base, "text", found.pooler_output))


def _both_towers(model: nn.Module, named: dict[str, torch.Tensor]) -> Output:
    """Both projections side by side, and the image's tokens."""
    pixels = {"pixel_values": named["pixel_values"]}
    image = _image_tower(model, pixels)
    text = _text_tower(model, {n: t for n, t in named.items() if n not in pixels})
    assert image.pooler_output is not None and text.pooler_output is not None  # noqa: S101
    both = torch.cat([image.pooler_output, text.pooler_output], dim=1)
    return Output(image.last_hidden_state, both)


def _projected(base: Any, tower: str, pooled: torch.Tensor) -> torch.Tensor:
    """Into the space that both towers share; SigLIP's towers end there already."""
    projection = getattr(base, f"{tower}_projection", None)
    result: torch.Tensor = pooled if projection is None else projection(pooled)
    return result
