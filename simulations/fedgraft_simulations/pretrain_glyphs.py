"""Pre-train the embedded backbone on letters drawn from the fonts that ship with matplotlib.

    python -m fedgraft_simulations.pretrain_glyphs --out DIR [--seed 0]

Nothing is downloaded. Letters a-z and A-Z are rendered once, then distorted on the fly (affine,
elastic, stroke thickness, low resolution, contrast, noise) and classified. Digits are never
rendered, so a digit task downstream is a new task. The result is an ordinary Hugging Face
directory plus `manifest.json`.

Shape legend: B batch, F fonts, L letters (52), C channels, H = W pixels, D features.
"""

import hashlib
import json
import string
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import typer
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ResNetConfig, ResNetModel

LETTERS = string.ascii_letters
FONT_LICENCES = {
    "DejaVu*.ttf": "Bitstream Vera / Arev licence, DejaVu changes in the public domain",
    "STIXGeneral*.ttf": "STIX Font License",
    "cm[bmrst]*10.ttf": "BaKoMa Fonts Licence (Computer Modern)",
}
SYMBOL_FONTS = ("cmsy10.ttf",)  # its codes for letters draw calligraphic capitals and signs
HELD_OUT_FONTS = ("DejaVuSansMono-Oblique.ttf", "STIXGeneralItalic.ttf", "cmss10.ttf")
# Scaled to its bounding box the capital looks like the small letter: one class for both.
SAME_SHAPE = "cosvwxz"
LABELS = tuple(LETTERS.index(c.lower() if c.lower() in SAME_SHAPE else c) for c in LETTERS)

CANVAS = 48  # pixels at which letters are rendered and distorted
# A third of the letters keeps its detail; the rest passes through as few pixels as a coarse scan.
RESOLUTIONS = (8, 8, 8, 12, 16, CANVAS)
HIDDEN_SIZES = (24, 48, 96)
BLOCKS = ("encoder.stages.0", "encoder.stages.1", "encoder.stages.2")
MEAN, STD = 0.3, 0.35


@dataclass(frozen=True)
class Pretrained:
    """What one training run cost and reached; `train_accuracy` is a mean over the last steps."""

    steps: int
    seconds: float
    train_accuracy: float


def letter_fonts() -> list[Path]:
    """Fonts shipped with matplotlib that draw all 52 letters (symbol fonts are left out)."""
    directory = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = {path for pattern in FONT_LICENCES for path in directory.glob(pattern)}
    fonts = sorted(path for path in found if path.name not in SYMBOL_FONTS)
    codes = {ord(letter) for letter in LETTERS}
    return [path for path in fonts if codes <= FT2Font(str(path)).get_charmap().keys()]


def render_letters(fonts: list[Path], canvas: int = CANVAS) -> Tensor:
    """Every letter white on black, scaled to its bounding box, centred: float32 FLHW in [0, 1]."""
    return torch.stack(
        [torch.stack([_render(font, letter, canvas) for letter in LETTERS]) for font in fonts]
    )


def _render(font: Path, letter: str, canvas: int) -> Tensor:
    drawn = Image.new("L", (4 * canvas, 4 * canvas))
    ImageDraw.Draw(drawn).text(
        (canvas, canvas), letter, fill=255, font=ImageFont.truetype(str(font), 2 * canvas)
    )
    glyph = drawn.crop(drawn.getbbox())
    scale = 0.75 * canvas / max(glyph.size)
    glyph = glyph.resize((max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))))
    centred = Image.new("L", (canvas, canvas))
    centred.paste(glyph, ((canvas - glyph.width) // 2, (canvas - glyph.height) // 2))
    return torch.from_numpy(np.asarray(centred, dtype=np.float32) / 255)


def distort(glyphs_BHW: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random handwriting-like copies of glyphs: float32 [B, size, size] in [0, 1]."""
    batch, canvas = glyphs_BHW.shape[:2]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(batch, *shape).uniform_(low, high, generator=generator)

    angle, shear = uniform(-0.35, 0.35), uniform(-0.4, 0.4)
    width, height = uniform(0.85, 1.5), uniform(0.75, 1.05)  # above 1 shrinks
    cos, sin = angle.cos(), angle.sin()
    rows = (
        torch.stack([width * cos, shear - sin, uniform(-0.1, 0.1)], 1),
        torch.stack([sin, height * cos, uniform(-0.1, 0.1)], 1),
    )
    grid_BHW2 = F.affine_grid(torch.stack(rows, 1), [batch, 1, canvas, canvas], align_corners=False)
    waves = torch.randn(batch, 2, 4, 4, generator=generator) * uniform(0.0, 0.12, 1, 1, 1)
    elastic_B2HW = F.interpolate(waves, size=(canvas, canvas), mode="bicubic", align_corners=False)
    moved_B1HW = F.grid_sample(
        glyphs_BHW[:, None], grid_BHW2 + elastic_B2HW.permute(0, 2, 3, 1), align_corners=False
    )

    # Blur, then cut at a random level: a low level thickens the stroke, a high level thins it.
    blurred = F.avg_pool2d(F.avg_pool2d(moved_B1HW, 5, 1, 2), 5, 1, 2)
    blurred = blurred / blurred.amax((2, 3), keepdim=True).clamp_min(1e-3)
    level, hardness = uniform(0.2, 0.65, 1, 1, 1), uniform(6.0, 25.0, 1, 1, 1)
    images_B1HW = torch.sigmoid(hardness * (blurred - level))

    parts = []
    for part, resolution in zip(
        images_B1HW.tensor_split(len(RESOLUTIONS)), RESOLUTIONS, strict=True
    ):
        coarse = F.interpolate(part, size=(resolution, resolution), mode="area")
        parts.append(F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False))
    images_B1HW = torch.cat(parts) * uniform(0.7, 1.2, 1, 1, 1) + uniform(0.0, 0.03, 1, 1, 1)
    images_B1HW = images_B1HW + torch.randn(images_B1HW.shape, generator=generator) * uniform(
        0.0, 0.05, 1, 1, 1
    )
    return images_B1HW[:, 0].clamp(0, 1)


def normalise(images_BHW: Tensor, channels: int = 1) -> Tensor:
    """Images in [0, 1] to the backbone's input [B, channels, H, W]."""
    return ((images_BHW - MEAN) / STD)[:, None].expand(-1, channels, -1, -1).contiguous()


def glyph_batches(
    letters_FLHW: Tensor, batch_size: int, size: int, generator: torch.Generator, channels: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of (normalised images [B, channels, size, size], labels [B] below 52)."""
    labels_L = torch.tensor(LABELS)
    fonts, letters = letters_FLHW.shape[:2]
    while True:
        font_B = torch.randint(fonts, (batch_size,), generator=generator)
        letter_B = torch.randint(letters, (batch_size,), generator=generator)
        images = distort(letters_FLHW[font_B, letter_B], size, generator)
        yield normalise(images, channels), labels_L[letter_B]


def pooled_features(model: nn.Module, pixels_BCHW: Tensor) -> Tensor:
    """Features [B, D]: a spatial pooler's output (ResNet), else the mean over tokens (ViT)."""
    output = model(pixel_values=pixels_BCHW)
    pooled: Tensor | None = getattr(output, "pooler_output", None)
    if pooled is not None and pooled.dim() == 4:
        return pooled.flatten(1)
    tokens_BTD: Tensor = output.last_hidden_state
    return tokens_BTD.mean(1)


def pretrain(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    features: int,
    steps: int,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.05,
    progress: bool = True,
) -> Pretrained:
    """Train `model` in place, under a linear letter classifier that is thrown away afterwards.

    AdamW with a one-cycle rate and label smoothing; `features` is D.
    """
    classifier = nn.Linear(features, len(LETTERS))
    parameters = [*model.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.15
    )
    model.train()
    started, accuracy = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        pixels, labels = next(batches)
        logits = classifier(pooled_features(model, pixels))
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        correct = (logits.detach().argmax(1) == labels).float().mean().item()
        accuracy += (correct - accuracy) * max(1 / step, 0.02)
        if progress and step % max(1, steps // 10) == 0:
            typer.echo(
                f"step {step}/{steps}  letters {accuracy:.3f}  "
                f"{time.perf_counter() - started:.0f} s",
                err=True,
            )
    model.eval()
    return Pretrained(steps, time.perf_counter() - started, accuracy)


@torch.no_grad()
def features_of(model: nn.Module, pixels_BCHW: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Frozen features [B, D] of a whole set."""
    model.eval()
    features: np.ndarray[Any, np.dtype[np.float32]] = torch.cat(
        [pooled_features(model, chunk) for chunk in torch.split(pixels_BCHW, 256)]
    ).numpy()
    return features


def digits(size: int, channels: int = 1) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits in [0, 1], enlarged and normalised like the letters."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    larger = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)[:, 0]
    return normalise(larger, channels), torch.tensor(data.target)


def linear_probe_letters(
    model: nn.Module,
    seen_FLHW: Tensor,
    unseen_FLHW: Tensor,
    size: int,
    generator: torch.Generator,
    channels: int = 1,
) -> float:
    """Accuracy on unseen fonts of a logistic regression on features of the trained fonts."""
    sets = []
    for letters in (seen_FLHW, unseen_FLHW):
        pixels, labels = next(glyph_batches(letters, 3000, size, generator, channels))
        sets.append((features_of(model, pixels), labels.numpy()))
    (train_x, train_y), (test_x, test_y) = sets
    return float(LogisticRegression(max_iter=500).fit(train_x, train_y).score(test_x, test_y))


def linear_probe_digits(model: nn.Module, size: int, channels: int = 1) -> float:
    """5-fold accuracy of a logistic regression on frozen features of the digits."""
    pixels, labels = digits(size, channels)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    regression = LogisticRegression(max_iter=2000)
    return float(
        cross_val_score(regression, features_of(model, pixels), labels.numpy(), cv=folds).mean()
    )


def feature_statistics(
    model: nn.Module, letters_FLHW: Tensor, size: int, generator: torch.Generator, channels: int = 1
) -> dict[str, list[float]]:
    """Mean and standard deviation per feature over public letters, for a manifest."""
    pixels, _ = next(glyph_batches(letters_FLHW, 1024, size, generator, channels))
    features = torch.from_numpy(features_of(model, pixels))
    return {
        "feature_mean": [round(value, 5) for value in features.mean(0).tolist()],
        "feature_std": [round(max(value, 1e-3), 5) for value in features.std(0).tolist()],
    }


def glyph_resnet() -> ResNetModel:
    """The embedded backbone: a ResNet of basic blocks, grey input, 392 thousand parameters."""
    config = ResNetConfig(
        num_channels=1,
        embedding_size=HIDDEN_SIZES[0],
        hidden_sizes=list(HIDDEN_SIZES),
        depths=[2, 2, 2],
        layer_type="basic",
    )
    model: ResNetModel = ResNetModel(config)
    return model


def write_backbone(model: PreTrainedModel, out: Path, facts: dict[str, Any]) -> None:
    """Saves `model` as config.json + model.safetensors, described in manifest.json."""
    model.save_pretrained(out)
    files = []
    for path in sorted(out.glob("*")):
        if path.name in ("config.json", "model.safetensors"):
            content = path.read_bytes()
            files.append(
                {
                    "path": path.name,
                    "size": len(content),
                    "sha256": hashlib.sha256(content).hexdigest(),
                }
            )
    manifest = {"name": out.name, "files": files, **facts}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def main(
    out: Annotated[Path, typer.Option(help="Directory to write; made if missing.")],
    seed: Annotated[
        int, typer.Option(help="Seeds the initial weights, the letters and their distortions.")
    ] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 3000,
    batch_size: Annotated[int, typer.Option(help="Letters per step.")] = 128,
    size: Annotated[int, typer.Option(help="Input height and width in pixels.")] = 32,
) -> None:
    """Pre-train the embedded glyph backbone and report what its frozen features are worth."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = glyph_resnet()
        generator = torch.Generator().manual_seed(seed)
        fonts = letter_fonts()
        seen = render_letters([font for font in fonts if font.name not in HELD_OUT_FONTS])
        unseen = render_letters([font for font in fonts if font.name in HELD_OUT_FONTS])
        features = HIDDEN_SIZES[-1]
        result = pretrain(model, glyph_batches(seen, batch_size, size, generator), features, steps)
    letters = linear_probe_letters(model, seen, unseen, size, generator)
    digit_accuracy = linear_probe_digits(model, size)
    statistics = feature_statistics(
        model, render_letters(fonts), size, torch.Generator().manual_seed(seed + 1)
    )
    facts = {
        "family": "resnet",
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "feature_dim": features,
        "features": "pooler_output.flatten(1)",
        **statistics,
        "blocks": list(BLOCKS),
        "preprocessing": {
            "channels": 1,
            "size": size,
            "value_range": [0.0, 1.0],
            "mean": [MEAN],
            "std": [STD],
            "interpolation": "bilinear",
        },
        "licence": "Apache-2.0",
        "font_licences": FONT_LICENCES,
        "source": {
            "script": "fedgraft_simulations.pretrain_glyphs",
            "seed": seed,
            "batch_size": batch_size,
        },
        "training": {
            "data": "letters a-z A-Z rendered from matplotlib's fonts; no digits",
            "held_out_fonts": list(HELD_OUT_FONTS),
            "steps": result.steps,
            "seconds": round(result.seconds, 1),
            "train_accuracy": round(result.train_accuracy, 4),
            "probe_letters_held_out_fonts": round(letters, 4),
            "probe_digits_5_fold": round(digit_accuracy, 4),
        },
    }
    write_backbone(model, out, facts)
    typer.echo(
        f"trained in {result.seconds:.0f} s; linear probe: letters {letters:.4f}, "
        f"digits {digit_accuracy:.4f}"
    )


if __name__ == "__main__":
    typer.run(main)
