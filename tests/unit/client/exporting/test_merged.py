"""The adapter worked into the weights: loaded again as an ordinary backbone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from fedgraft_client.exporting.deployed import Parts
from fedgraft_client.exporting.merged import HEAD, MODEL, merge
from fedgraft_common.backbone import load_backbone
from fedgraft_common.errors import ExportError
from fedgraft_common.plan import Backbone as Config


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("BERT", "ffa-lora"),
        ("BERT", "full"),
        ("GPT-2", "ia3"),
        ("LLaMA", "dora"),
        ("T5 encoder", "lora"),  # one table of tokens under two names
        ("ResNet (transformers)", "film"),
        ("ResNet (timm)", "lora"),
        ("SegFormer", "full"),
    ],
)
def test_a_merged_model_is_a_backbone(
    left: Callable[..., Parts], tmp_path: Path, family: str, method: str
) -> None:
    parts = left(family, method=method)
    out = tmp_path / "merged"
    assert merge(parts, out) < 1e-4
    backbone = parts.model.backbone
    config = Config(source=f"dir:{out}")
    if family.endswith("(timm)"):
        config = Config(
            source="timm:resnet18",
            weights=str(out / MODEL),
            options={"channels": (8, 12, 16, 24)},
        )
    again = load_backbone(config)
    assert again.sha256 != backbone.sha256
    assert again.blocks == backbone.blocks
    kind = parts.model.head.task.features
    inputs = backbone.example(3, torch.Generator().manual_seed(7))
    with torch.no_grad():
        found = again.features(again.model, inputs, kind)
        expected = backbone.features(parts.model.model, inputs, kind)
        plain = load_backbone(Config.model_validate_json(_config(tmp_path)))
        unadapted = plain.features(plain.model, inputs, kind)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(unadapted, expected, atol=1e-3)
    head = load_file(out / HEAD)
    assert torch.equal(head["linear.weight"], parts.model.head.linear.weight)


def _config(directory: Path) -> str:
    from fedgraft_common.files import load_tensors

    return load_tensors(directory / "sealed.safetensors")[1]["backbone"]


def test_transformers_alone_reads_it(left: Callable[..., Parts], tmp_path: Path) -> None:
    parts = left("BERT")
    merge(parts, tmp_path / "merged")
    model = AutoModel.from_pretrained(tmp_path / "merged").eval()
    ids, mask = parts.model.backbone.example(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).pooler_output
        expected = parts.model.backbone.features(parts.model.model, (ids, mask))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_model_with_its_adapter_is_left_as_it_was(
    left: Callable[..., Parts], tmp_path: Path
) -> None:
    parts = left("ResNet (transformers)")
    inputs = parts.model.backbone.example(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = parts.model(*inputs)
        merge(parts, tmp_path / "merged")
        assert torch.equal(parts.model(*inputs), before)


def test_a_prompt_is_no_change_of_weights(left: Callable[..., Parts], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="an adapter of PROMPT_TUNING"):
        merge(left("GPT-2", method="prompt"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
