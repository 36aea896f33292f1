"""Networks of torchvision from a local file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image
from torch import nn
from torchvision import models

from fedgraft_common.backbone import Backbone, load_backbone
from fedgraft_common.errors import BackboneError
from fedgraft_common.plan import Backbone as Config

CAFFE = {
    "size": 227,
    "mean": [104 / 255, 117 / 255, 123 / 255],
    "std": [1 / 255, 1 / 255, 1 / 255],
    "order": "BGR",
}


def saved(model: nn.Module, path: Path) -> Path:
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, path)
    return path


def load(name: str, path: Path, **changes: Any) -> Backbone:
    config = {"source": f"torchvision:{name}", "weights": str(path)} | changes
    return load_backbone(Config.model_validate(config))


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = models.mobilenet_v3_small(weights=None)
    return saved(model, tmp_path_factory.mktemp("tv") / "net.safetensors")


def test_features_are_what_goes_into_the_classifier(mobilenet: Path) -> None:
    backbone = load("mobilenet_v3_small", mobilenet, preprocessing={"size": 32})
    own = models.mobilenet_v3_small(weights=None).eval()
    own.load_state_dict(load_file(mobilenet))
    inputs = backbone.example(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled = backbone.features(backbone.model, inputs)
        torch.testing.assert_close(own.classifier[3](pooled), own(*inputs))
        torch.testing.assert_close(
            backbone.features(backbone.model, inputs, "map"), own.features(*inputs)
        )
    assert backbone.blocks[0] == "features.0"
    assert backbone.preparation.model_dump()["std"] == (0.229, 0.224, 0.225)  # type: ignore[attr-defined]


def test_inception_without_its_auxiliary_head(tmp_path: Path) -> None:
    """The published weights have one, and were trained on channels in other units."""
    torch.manual_seed(0)
    own = models.inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    assert own.AuxLogits is not None
    backbone = load(
        "inception_v3", saved(own, tmp_path / "i.safetensors"), preprocessing={"size": 96}
    )
    assert not any("AuxLogits" in name for name, _ in backbone.model.named_parameters())
    assert backbone.blocks[-1] == "Mixed_7c"
    inputs = backbone.example(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            own.fc(backbone.features(backbone.model, inputs)), own(*inputs), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"source": "torchvision:nothing"}, "list_models"),
        ({"weights": None}, "publishes pickles only.*Convert them once"),
        ({"options": {"width_mult": "wide"}}, "what torchvision's mobilenet_v3_small takes"),
        ({"source": "torchvision:squeezenet1_1"}, "no weights for features"),
        ({"source": "torchvision:ssd300_vgg16"}, "YOLOS or DETR"),
        ({"sha256": "0" * 64}, "pinned by the plan"),
    ],
)
def test_what_does_not_fit(mobilenet: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(BackboneError, match=text):
        load("mobilenet_v3_small", mobilenet, **changes)


def test_boxes_of_a_faster_r_cnn(tmp_path: Path) -> None:
    """A fixed number of rows, each with its place in the image; zeros where no box is."""
    torch.manual_seed(0)
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    own = models.get_model(name, weights=None, weights_backbone=None)
    options = {"rpn_post_nms_top_n_test": 7}
    backbone = load(
        name, saved(own, tmp_path / "d.safetensors"), preprocessing={"size": 64}, options=options
    )
    inputs = backbone.example(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = backbone.features(backbone.model, inputs, "tokens")
        alone = backbone.features(backbone.model, (inputs[0][:1],), "tokens")
    assert tokens.shape == (2, 7, 1028)
    torch.testing.assert_close(tokens[:1], alone, rtol=1e-3, atol=1e-3)
    present = tokens.abs().sum(dim=2) > 0
    assert present.any()
    centre, extent = tokens[..., -4:-2], tokens[..., -2:]
    assert bool(((centre[present] >= 0) & (centre[present] <= 1)).all())
    assert bool((extent[present] > 0).all())


def test_a_real_squeezenet_recognises_a_photo(shared_data: Path) -> None:
    """Its classifier, which is left out, is in the file: put back, it tells what a temple is.

    In other units, or with red and blue exchanged, it sees a mosquito net.
    """
    path = shared_data / "weights_squeezenet1_1_imagenet/squeezenet1_1_imagenet_fp16.safetensors"
    backbone = load("squeezenet1_1", path, preprocessing=CAFFE)
    photo = torch.tensor(load_sample_image("china.jpg"), dtype=torch.float32)
    tensors = load_file(path)
    kernel = tensors["classifier.1.weight"].float()[:, :, 0, 0]
    with torch.no_grad():
        inputs = backbone.prepare(photo.permute(2, 0, 1)[None] / 255)
        cells = backbone.features(backbone.model, inputs, "tokens")
        scores = (cells @ kernel.T + tensors["classifier.1.bias"].float()).relu().mean(dim=1)
    names = models.SqueezeNet1_1_Weights.IMAGENET1K_V1.meta["categories"]
    best = {names[i] for i in scores[0].topk(4).indices.tolist()}
    assert {"bell cote", "stupa", "monastery"} <= best
