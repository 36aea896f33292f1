"""The small ResNet for CIFAR (He et al. 2015, section 4.2) as a model that transformers loads.

Three stages of n basic blocks behind a 3x3 stem, shortcuts without parameters ("option A").
transformers' own ResNet has an ImageNet stem and cannot take such weights, so the architecture is
registered with its AutoModel, in this process only: the directory stays data (config.json,
model.safetensors, manifest.json) and brings no code.

Weights: Y. Idelbayev, pytorch_resnet_cifar10 (BSD-2-Clause), as safetensors with the names `conv1`,
`bn1`, `layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}`, `linear`; the last is left out.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

WIDTHS = (16, 32, 64)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 32


class CifarResNetConfig(PretrainedConfig):  # type: ignore[misc]
    """`blocks`: basic blocks in each of the three stages; 3 make ResNet-20."""

    model_type = "fedgraft-cifar-resnet"

    def __init__(self, blocks: int = 3, **options: Any) -> None:
        self.blocks = blocks
        self.num_channels = 3
        self.image_size = SIZE
        super().__init__(**options)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; the first block of a stage halves the map."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) to (N, outputs, H', W')."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        extra = y.shape[1] - x.shape[1]
        if extra:  # option A: every second pixel, zeros for the new channels
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra // 2, extra // 2))
        return functional.relu(y + x)


class CifarResNet(PreTrainedModel):  # type: ignore[misc]
    """Maps (N, 3, 32, 32) to features (N, 64)."""

    config_class = CifarResNetConfig
    base_model_prefix = "resnet"
    main_input_name = "pixel_values"

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        before = WIDTHS[0]
        for stage, width in enumerate(WIDTHS, start=1):
            inputs = [before] + [width] * (config.blocks - 1)
            self.add_module(f"layer{stage}", nn.Sequential(*(Block(i, width) for i in inputs)))
            before = width
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """The last map and its mean over positions."""
        x = functional.relu(self.bn1(self.conv1(pixel_values)))
        for stage in range(1, len(WIDTHS) + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x.mean(dim=(2, 3)))


def register() -> None:
    """Makes the architecture known to AutoModel in this process."""
    AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig, exist_ok=True)
    AutoModel.register(CifarResNetConfig, CifarResNet, exist_ok=True)


def convert(weights: Path, directory: Path) -> Path:
    """Writes a backbone directory with these weights, if it is not there yet, and registers.

    Args:
        weights: the safetensors file.
        directory: to make.

    Returns:
        The directory.
    """
    register()
    if (directory / "manifest.json").is_file():
        return directory
    state = {k: v for k, v in load_file(weights).items() if not k.startswith("linear.")}
    blocks = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("layer1."))
    model = CifarResNet(CifarResNetConfig(blocks))
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise ValueError(f"{weights}: not the weights of a CIFAR ResNet: {missing} {unexpected}")
    model.eval().save_pretrained(directory)
    mean, std = photograph_statistics(model)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    manifest = {
        "name": f"cifar-resnet-{6 * blocks + 2}",
        "licence": "BSD-2-Clause",
        "source": f"pytorch_resnet_cifar10, sha256 {digest}",
        "preprocessing": {"channels": 3, "size": SIZE, "mean": MEAN, "std": STD},
        "pooling": "pooler",
        "blocks": [f"layer{s}.{i}" for s in (1, 2, 3) for i in range(blocks)],
        "feature_mean": mean,
        "feature_std": std,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return directory


def photograph_statistics(model: CifarResNet, crops: int = 2048) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each feature over random crops of two public photographs.

    Features behind a ReLU all point one way and a fixed head wants them centred; CIFAR-10 itself is
    not at hand, scikit-learn's two sample photographs are.
    """
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(0)
    pictures = [torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    batch = []
    for number in range(crops):
        picture = pictures[number % len(pictures)]
        side = int(torch.randint(48, 385, (1,), generator=generator))
        top, left = (
            int(torch.randint(0, length - side + 1, (1,), generator=generator))
            for length in picture.shape[1:]
        )
        crop = picture[None, :, top : top + side, left : left + side]
        batch.append(
            functional.interpolate(crop, size=(SIZE, SIZE), mode="bilinear", antialias=True)
        )
    inputs = torch.cat(batch) - torch.tensor(MEAN).view(1, 3, 1, 1)
    inputs = inputs / torch.tensor(STD).view(1, 3, 1, 1)
    with torch.no_grad():
        features = torch.cat([model(part).pooler_output for part in inputs.split(256)])
    return features.mean(dim=0).tolist(), features.std(dim=0).clamp(min=1e-3).tolist()
