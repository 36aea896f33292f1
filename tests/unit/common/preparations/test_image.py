"""Images as a model's input, and raw records of another form."""

from __future__ import annotations

import pytest
import torch

from fedgraft_common.errors import DataError
from fedgraft_common.preparations import ImagePreparation


def test_one_channel_is_repeated() -> None:
    prepare = ImagePreparation(channels=3, size=4, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    grey = torch.rand(2, 1, 4, 4)
    expected = torch.cat([grey, (grey - 0.5) / 0.5, (grey - 1.0) / 0.25], dim=1)
    torch.testing.assert_close(prepare(grey)[0], expected)


def test_three_channels_stay_or_become_grey() -> None:
    colour = torch.rand(2, 3, 4, 4)
    assert torch.equal(
        ImagePreparation(channels=3, size=4, mean=(0, 0, 0), std=(1, 1, 1))(colour)[0], colour
    )
    (grey,) = ImagePreparation(channels=1, size=4, mean=(0,), std=(1,))(colour)
    torch.testing.assert_close(grey, colour.mean(dim=1, keepdim=True))


@pytest.mark.parametrize("size", [8, 13])
def test_resizing_keeps_a_constant_image(size: int) -> None:
    prepare = ImagePreparation(channels=1, size=size, mean=(0.5,), std=(0.25,))
    (prepared,) = prepare(torch.ones(3, 1, 10, 7))
    assert prepared.shape == (3, 1, size, size)
    torch.testing.assert_close(prepared, torch.full((3, 1, size, size), 2.0))


@pytest.mark.parametrize(
    "raw",
    [torch.rand(3, 8, 8), torch.rand(3, 1, 8, 8).double(), ["a", "b"], (torch.rand(1), ["a"])],
)
def test_another_form_is_refused(raw: object) -> None:
    prepare = ImagePreparation(channels=1, size=8, mean=(0.5,), std=(0.25,))
    with pytest.raises(DataError, match=r"images .records, channels, height, width.*another"):
        prepare(raw)  # type: ignore[arg-type]
