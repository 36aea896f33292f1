"""How like the truth a reconstruction is: PSNR, SSIM, LPIPS, and whether it tells who it is.

All by libraries: torchmetrics and, for LPIPS, torchvision's SqueezeNet, whose weights torchvision
would download. An audit downloads nothing: LPIPS is computed where they are in torch's cache, and
where they are not, `lpips_missing` says so.

Shapes: N images (N, C, H, W) with values in [0, 1].
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional

LPIPS_SIDE = 64  # pixels; smaller images are enlarged, for SqueezeNet would shrink them to nothing


def psnr(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """(N,) peak signal-to-noise ratio in dB; capped at 100 for equal images."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    found: torch.Tensor = peak_signal_noise_ratio(
        images, truth, data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    return found.clamp(max=100.0)


def ssim(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """(N,) structural similarity in [-1, 1], windows of 7 pixels or the odd size that fits."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    side = min(images.shape[-2:])
    window = min(7, side - 1 + side % 2)
    found = structural_similarity_index_measure(
        images, truth, gaussian_kernel=False, kernel_size=window, reduction="none", data_range=1.0
    )
    assert isinstance(found, torch.Tensor)  # noqa: S101 - a tuple only if more was asked for
    return found.reshape(-1)


def lpips(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor | None:
    """(N,) learned perceptual distance (Zhang et al. 2018), or None if its weights are missing."""
    if lpips_missing() is not None:
        return None
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    found = [
        learned_perceptual_image_patch_similarity(
            _coloured(one), _coloured(other), net_type="squeeze", normalize=True
        ).reshape(())
        for one, other in zip(images, truth, strict=True)
    ]
    return torch.stack(found).detach()


def lpips_missing() -> str | None:
    """Why LPIPS cannot be computed here; None if it can."""
    from torchvision.models import SqueezeNet1_1_Weights

    file = Path(SqueezeNet1_1_Weights.DEFAULT.url).name
    if (Path(torch.hub.get_dir()) / "checkpoints" / file).is_file():
        return None
    return (
        f"LPIPS was not computed: torchvision's weights {file} are not in torch's cache, and an "
        "audit downloads nothing."
    )


def identified(images: torch.Tensor, truth: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """(N,) whether no image of the gallery is nearer than the truth, pixel by pixel.

    Args:
        images: reconstructions.
        truth: what they should be.
        gallery: (M, C, H, W) other images of the same kind; the truth need not be among them.
    """
    distance = (images - truth).flatten(1).norm(dim=1)
    others = torch.cdist(images.flatten(1), gallery.flatten(1))
    same = torch.cdist(truth.flatten(1), gallery.flatten(1)) == 0
    found: torch.Tensor = distance < others.masked_fill(same, torch.inf).min(dim=1).values
    return found


def _coloured(image: torch.Tensor) -> torch.Tensor:
    three = image[None].expand(1, 3, *image.shape[1:]) if image.shape[0] == 1 else image[None, :3]
    if min(three.shape[-2:]) >= LPIPS_SIDE:
        return three.clamp(0, 1)
    resized = functional.interpolate(three, size=(LPIPS_SIDE, LPIPS_SIDE), mode="bilinear")
    return resized.clamp(0, 1)
