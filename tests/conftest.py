"""Shared fixtures: tiny random models in real directories, a small real data set, a quiet Flower.

Tests marked `slow` run with --slow; tests marked `gpu` need a CUDA device. Both are named in the
summary when they are skipped.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

with warnings.catch_warnings():  # what libraries say about themselves while they are imported
    warnings.simplefilter("ignore")
    import flwr.simulation  # noqa: F401
    import opacus  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device on this machine"))


@pytest.fixture(autouse=True, scope="session")
def _quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A private FLWR_HOME, and one torch thread: tests are many and small."""
    os.environ["FLWR_HOME"] = str(tmp_path_factory.mktemp("flwr"))
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    yield


def save_model(model: transformers.PreTrainedModel, directory: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def vit_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT with random weights: 4 blocks of width 32, 16x16 grey images, patch 4."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_channels=1,
    )
    model = transformers.ViTModel(config, add_pooling_layer=False)
    return save_model(model, tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="session")
def resnet_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet with random weights and BatchNorm statistics that are not the initial ones."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 12, 16],
        depths=[1, 1, 1],
        layer_type="basic",
        image_size=16,
    )
    model = transformers.ResNetModel(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
    return save_model(model, tmp_path_factory.mktemp("resnet"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real weights and data that lie beside the checkout, where they do: see their READMEs."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    directory = Path(os.environ.get("FEDGRAFT_SHARED_DATA", default))
    if not directory.is_dir():
        pytest.skip("no real data beside this checkout (FEDGRAFT_SHARED_DATA)")
    return directory
