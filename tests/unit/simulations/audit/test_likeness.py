"""Metrics against their definitions, and LPIPS only where its weights are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

from fedgraft_simulations.audit.likeness import identified, lpips, lpips_missing, psnr, ssim


def images(count: int, seed: int, side: int = 8) -> torch.Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed))


def test_psnr_is_its_definition_for_each_image() -> None:
    truth = images(3, 0)
    off = truth + torch.tensor([0.0, 0.1, 0.01]).view(3, 1, 1, 1)
    torch.testing.assert_close(
        psnr(off, truth), torch.tensor([100.0, 20.0, 40.0]), atol=0.01, rtol=0
    )


@pytest.mark.parametrize("side", [3, 4, 8, 28])
def test_ssim_is_one_for_the_same_and_less_for_others(side: int) -> None:
    truth, other = images(2, 0, side), images(2, 1, side)
    torch.testing.assert_close(ssim(truth, truth), torch.ones(2))
    assert (ssim(other, truth) < 0.5).all()
    assert ssim(other, truth).shape == (2,)


def test_identified_means_nearer_to_the_truth_than_to_anyone_else() -> None:
    gallery = images(50, 0)
    truth = gallery[:2]
    near = truth + 0.01
    assert identified(near, truth, gallery).tolist() == [True, True]
    assert identified(near, truth, gallery[2:]).tolist() == [True, True]
    assert identified(gallery[[3, 4]] + 0.01, truth, gallery).tolist() == [False, False]


def test_a_tie_is_no_identification() -> None:
    truth, twin = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.5)
    middle = torch.full((1, 1, 4, 4), 0.25)
    assert identified(middle, truth, torch.cat([truth, twin])).tolist() == [False]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / Path(SqueezeNet1_1_Weights.DEFAULT.url).name


def test_without_weights_lpips_says_why(cache: Path) -> None:
    assert cache.name in str(lpips_missing())
    assert lpips(images(1, 0), images(1, 1)) is None


def test_with_weights_in_torchs_cache_it_is_computed(cache: Path) -> None:
    """Random weights in the place of the real ones: the code path, not the metric."""
    torch.manual_seed(0)
    torch.save(squeezenet1_1(weights=None).state_dict(), cache)
    assert lpips_missing() is None
    truth, other = images(2, 0), images(2, 1)
    same, far = lpips(truth, truth), lpips(other, truth)
    assert same is not None
    assert far is not None
    torch.testing.assert_close(same, torch.zeros(2), atol=1e-5, rtol=0)
    assert (far > 0).all()
    colour = lpips(truth.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1))
    assert colour is not None
    torch.testing.assert_close(colour, lpips(truth, other))
