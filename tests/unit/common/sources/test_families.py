"""What is particular about families of transformers' models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from fedgraft_common.backbone import Backbone, load_backbone
from fedgraft_common.errors import BackboneError
from fedgraft_common.plan import Backbone as Config
from fedgraft_simulations.families import FAMILIES

MAKE: dict[str, Callable[[Path], Config]] = {family.name: family.make for family in FAMILIES}


def load(name: str, directory: Path, **changes: object) -> Backbone:
    return load_backbone(MAKE[name](directory).model_copy(update=changes))


@pytest.mark.parametrize(
    ("name", "modality", "inputs", "blocks"),
    [
        ("BERT", "text", ("input_ids", "attention_mask"), "encoder.layer.2"),
        ("T5 encoder", "text", ("input_ids", "attention_mask"), "encoder.block.2"),
        ("wav2vec2", "audio", ("input_values",), "encoder.layers.1"),
        ("AST", "audio", ("input_values",), "layers.2"),
        ("PatchTST", "series", ("past_values", "past_observed_mask"), "encoder.layers.2"),
        ("VideoMAE", "video", ("pixel_values",), "encoder.layer.2"),
        ("DETR", "image", ("pixel_values",), "decoder.layers.1"),
        ("SegFormer", "image", ("pixel_values",), "decode_head"),
    ],
)
def test_modality_and_blocks(
    tmp_path: Path, name: str, modality: str, inputs: tuple[str, ...], blocks: str
) -> None:
    backbone = load(name, tmp_path)
    assert (backbone.modality, backbone.input_names) == (modality, inputs)
    assert backbone.blocks[-1] == blocks


@pytest.mark.parametrize("name", ["wav2vec2", "PatchTST"])
def test_nothing_is_drawn_in_eval_mode(tmp_path: Path, name: str) -> None:
    """Layer drop, SpecAugment, dropout and masking at one half each are in the configuration."""
    backbone = load(name, tmp_path)
    inputs = backbone.example(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (backbone.features(backbone.model, inputs) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["BERT", "DistilBERT", "RoBERTa", "T5 encoder", "XLNet", "GPT-2"])
def test_padding_changes_nothing(tmp_path: Path, name: str) -> None:
    """The same text in a longer window has the same features."""
    short = load(name, tmp_path, preprocessing={"length": 5})
    long = load(name, tmp_path, preprocessing={"length": 9})
    left = name == "XLNet"
    ids = torch.tensor([[7, 8, 9, 10]])

    def padded(backbone: Backbone, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        pad = backbone.preparation.model_dump()["pad"]  # type: ignore[attr-defined]
        fill = torch.full((1, length - 4), pad)
        mask = torch.cat([torch.ones_like(ids), torch.zeros_like(fill)], dim=1)
        whole = torch.cat([fill, ids] if left else [ids, fill], dim=1)
        return whole, mask.flip(1) if left else mask

    kinds = ("mean", "cls", "last")
    with torch.no_grad():
        for kind in kinds:
            one, other = (
                load_backbone(Config(source=f"dir:{tmp_path}", pooling=kind)).features(  # type: ignore[arg-type]
                    backbone.model, padded(backbone, length)
                )
                for backbone, length in ((short, 5), (long, 9))
            )
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_encoder_gets_transformers_own_mask(tmp_path: Path) -> None:
    """The mask that is prepared for attention is the one that transformers makes itself."""
    for name in ("BERT", "T5 encoder"):
        folder = tmp_path / name[:2]
        folder.mkdir()
        backbone = load(name, folder)
        ids, mask = backbone.example(3, torch.Generator().manual_seed(3))
        assert 0 < int(mask.sum()) < mask.numel()
        with torch.no_grad():
            plain = backbone.model(input_ids=ids, attention_mask=mask).last_hidden_state
            plain = plain * mask[:, :, None]
            torch.testing.assert_close(
                backbone.features(backbone.model, (ids, mask), "tokens"), plain
            )


def test_towers_of_clip(tmp_path: Path) -> None:
    """Image, text and both: the features are those that CLIP compares."""
    config = MAKE["CLIP"](tmp_path)
    short: dict[str, object] = {"preprocessing": {"length": 16}}
    found = {}
    for modality in ("auto", "image", "text", "image-text"):
        changes: dict[str, object] = {"modality": modality}
        if modality == "text":
            changes |= short
        found[modality] = load_backbone(config.model_copy(update=changes))
    both = found["image-text"]
    pixels, ids, mask = both.example(2, torch.Generator().manual_seed(0))
    own = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = own(pixel_values=pixels, input_ids=ids, attention_mask=mask)
        image = found["image"].features(found["image"].model, (pixels,))
        text = found["text"].features(found["text"].model, (ids, mask))
        pair = both.features(both.model, (pixels, ids, mask))
    assert found["auto"].modality == "image"
    torch.testing.assert_close(pair, torch.cat([image, text], dim=1))
    for mine, theirs in ((image, expected.image_embeds), (text, expected.text_embeds)):
        torch.testing.assert_close(torch.nn.functional.normalize(mine, dim=1), theirs)
    assert all("vision" in block for block in found["image"].blocks)
    assert {block.partition("_")[0] for block in both.blocks} == {"vision", "text"}


def test_a_tower_that_a_model_has_not(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"backbone\.modality: found 'text'"):
        load("ViT (transformers)", tmp_path, modality="text")


def test_a_segmenter_gives_its_decoder_s_map(tmp_path: Path) -> None:
    backbone = load("SegFormer", tmp_path)
    (pixels,) = backbone.example(1, torch.Generator().manual_seed(0))
    own = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        cells = backbone.features(backbone.model, (pixels,), "map")
        torch.testing.assert_close(own.decode_head.classifier(cells), own(pixels).logits)


def test_yolos_gives_its_detection_tokens(tmp_path: Path) -> None:
    backbone = load("YOLOS", tmp_path)
    (pixels,) = backbone.example(1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = backbone.features(backbone.model, (pixels,), "tokens")
        whole = backbone.model(pixels).last_hidden_state
    assert torch.equal(tokens, whole[:, -5:])


def test_options_change_the_configuration(tmp_path: Path) -> None:
    config = MAKE["wav2vec2"](tmp_path)
    backbone = load_backbone(config.model_copy(update={"options": {"layerdrop": 0.25}}))
    assert backbone.model.config.layerdrop == 0.25  # type: ignore[union-attr]


def test_weights_from_another_file(tmp_path: Path) -> None:
    config = MAKE["BERT"](tmp_path)
    first = load_backbone(config)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    moved = load_backbone(
        config.model_copy(update={"weights": str(tmp_path / "other.safetensors")})
    )
    assert moved.sha256 == first.sha256
    inputs = first.example(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(first.features(first.model, inputs), moved.features(moved.model, inputs))


def test_a_processor_that_is_no_table(tmp_path: Path) -> None:
    config = MAKE["ViT (transformers)"](tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps([1]))
    assert load_backbone(config).modality == "image"
