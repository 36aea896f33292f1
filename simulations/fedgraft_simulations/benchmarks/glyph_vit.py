"""The benchmarks' backbone: a 12-layer ViT that has seen letters, made once and kept.

No pre-trained weights are downloaded. The letters and the recipe are those of the embedded
backbone (`pretrain_glyphs`); only the architecture differs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import ViTConfig, ViTModel

from fedgraft_simulations import pretrain_glyphs as glyphs

LAYERS, HIDDEN, HEADS, MLP = 12, 192, 3, 768
SIZE, PATCH = 32, 4
STEPS, BATCH, LEARNING_RATE = 600, 64, 1e-3
CACHE = Path("~/.cache/fedgraft").expanduser()


def architecture() -> ViTModel:
    """Hidden 192, 3 heads, MLP 768, 64 patches of one channel and a class token; no pooler."""
    config = ViTConfig(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=MLP, image_size=SIZE, patch_size=PATCH, num_channels=1,
    )  # fmt: skip
    model: ViTModel = ViTModel(config, add_pooling_layer=False)
    return model


def glyph_vit(cache: Path = CACHE, steps: int = STEPS, seed: int = 0) -> Path:
    """The directory of the pre-trained ViT; trains it at the first call.

    Args:
        cache: directories of made models are kept below it.
        steps: optimizer steps of 64 letters; 0 leaves the weights random.
        seed: of the weights, letters and distortions.
    """
    directory = cache / f"glyph-vit-{LAYERS}x{HIDDEN}-{steps}-{seed}"
    if (directory / "manifest.json").is_file():
        return directory
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = architecture()
    accuracy = 0.0
    if steps:
        letters = glyphs.render_letters(glyphs.letter_fonts())
        generator = torch.Generator().manual_seed(seed)
        batches = glyphs.glyph_batches(letters, BATCH, SIZE, generator)
        result = glyphs.pretrain(model, batches, HIDDEN, steps, LEARNING_RATE)
        accuracy = result.train_accuracy
    directory.mkdir(parents=True, exist_ok=True)
    facts = {
        "licence": "Apache-2.0",
        "source": f"fedgraft_simulations.benchmarks.glyph_vit, {steps} steps, seed {seed}",
        "pooling": "mean",
        "blocks": [f"layers.{number}" for number in range(LAYERS)],
        "preprocessing": {
            "channels": 1,
            "size": SIZE,
            "mean": [glyphs.MEAN],
            "std": [glyphs.STD],
        },
        "training": {"steps": steps, "train_accuracy": round(accuracy, 4)},
    }
    glyphs.write_backbone(model, directory, facts)
    return directory
