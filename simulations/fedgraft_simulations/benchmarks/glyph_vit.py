"""The benchmarks' backbone: a 12-block ViT that has seen letters, made once and kept.

No pre-trained weights are downloaded. Letters and recipe are those of the embedded backbone
(`pretrain_glyphs`). To make it in minutes, a ViT of two blocks is trained first; then ten blocks
that start as the identity are put between (their output projections are zero, as in Net2Net, Chen
et al. 2016, section 2.3), and a short training of the whole brings them to life.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import ViTConfig, ViTModel
from transformers.utils import logging

from fedgraft_simulations import pretrain_glyphs as glyphs

LAYERS, HIDDEN, HEADS, MLP = 12, 192, 3, 768
SIZE, PATCH = 32, 4
SMALL_LAYERS = 2
STEPS, BATCH, LEARNING_RATE = 1200, 64, 1e-3
WHOLE_STEPS, WHOLE_BATCH, WHOLE_LEARNING_RATE = 80, 32, 5e-4
CACHE = Path("~/.cache/fedgraft").expanduser()


def architecture(layers: int = LAYERS) -> ViTModel:
    """Hidden 192, 3 heads, MLP 768, 64 patches of one channel and a class token; no pooler."""
    config = ViTConfig(
        hidden_size=HIDDEN, num_hidden_layers=layers, num_attention_heads=HEADS,
        intermediate_size=MLP, image_size=SIZE, patch_size=PATCH, num_channels=1,
    )  # fmt: skip
    model: ViTModel = ViTModel(config, add_pooling_layer=False)
    return model


def glyph_vit(cache: Path = CACHE, steps: int = STEPS, seed: int = 0) -> Path:
    """The directory of the pre-trained ViT; the first call trains it, in about five minutes.

    Args:
        cache: directories of made models are kept below it.
        steps: optimizer steps of the small ViT; 0 leaves all weights random.
        seed: of the weights, letters and distortions.
    """
    directory = cache / f"glyph-vit-{LAYERS}x{HIDDEN}-{steps}-{seed}"
    if (directory / "manifest.json").is_file():
        return directory
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        small, model = architecture(SMALL_LAYERS), architecture()
    accuracy = 0.0
    if steps:
        letters = glyphs.render_letters(glyphs.letter_fonts())
        generator = torch.Generator().manual_seed(seed)
        batches = glyphs.glyph_batches(letters, BATCH, SIZE, generator)
        glyphs.pretrain(small, batches, HIDDEN, steps, LEARNING_RATE)
        grow(small, model)
        batches = glyphs.glyph_batches(letters, WHOLE_BATCH, SIZE, generator)
        result = glyphs.pretrain(model, batches, HIDDEN, WHOLE_STEPS, WHOLE_LEARNING_RATE)
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
    logging.disable_progress_bar()
    glyphs.write_backbone(model, directory, facts)
    return directory


def grow(small: ViTModel, large: ViTModel) -> None:
    """Makes `large` the same function as `small`: its extra blocks become the identity."""
    factor = large.config.num_hidden_layers // small.config.num_hidden_layers
    state = large.state_dict()
    for name, value in small.state_dict().items():
        if name.startswith("layers."):
            number, rest = name.removeprefix("layers.").split(".", 1)
            state[f"layers.{int(number) * factor}.{rest}"] = value
        else:
            state[name] = value
    for number in range(large.config.num_hidden_layers):
        if number % factor:
            for projection in ("attention.o_proj", "mlp.fc2"):
                for part in ("weight", "bias"):
                    state[f"layers.{number}.{projection}.{part}"].zero_()
    large.load_state_dict(state)
