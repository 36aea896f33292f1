from __future__ import annotations

import base64

import numpy as np
import pytest
import torch

from fedgraft_client.data import Records
from fedgraft_simulations.audit.planted import Canary, find

IMAGES = Records(torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 2]))
CANARY = Canary.draw(IMAGES, np.random.default_rng(0))
NOISE = np.random.default_rng(1).bytes(100_000)


@pytest.mark.parametrize(
    "leaked",
    [
        CANARY.text.encode(),
        CANARY.text.encode("utf-16-le"),
        CANARY.text.encode().hex().encode(),
        CANARY.text[::-1].encode(),
        base64.b64encode(CANARY.text.encode()),
        base64.b64encode(b"x" + CANARY.text.encode()),
        base64.b64encode(b"xy" + CANARY.text.encode()),
        CANARY.text[1:22].encode(),
        CANARY.tensor.numpy().tobytes(),
        CANARY.tensor.double().numpy().tobytes(),
        CANARY.tensor.half().numpy().tobytes(),
        CANARY.tensor.numpy().astype(">f4").tobytes(),
        (CANARY.tensor * 255).round().byte().numpy().tobytes(),
        CANARY.tensor.numpy().tobytes()[40:80],
    ],
)
def test_a_leak_is_found_between_other_bytes(leaked: bytes) -> None:
    assert find(CANARY.needles(), NOISE[:501] + leaked + NOISE[501:]) is not None


def test_other_bytes_are_no_leak() -> None:
    assert find(CANARY.needles(), NOISE) is None
    other = Canary.draw(IMAGES, np.random.default_rng(2))
    assert find(CANARY.needles(), other.text.encode() + other.tensor.numpy().tobytes()) is None


def test_derived_tensors_are_searched_for_and_zeros_are_not() -> None:
    features = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    needles = CANARY.needles([features, torch.zeros(64)])
    assert find(needles, features.numpy().tobytes()) is not None
    assert find(needles, bytes(1000)) is None


def test_it_is_planted_in_the_first_two_pictures() -> None:
    planted = CANARY.plant(IMAGES).inputs
    assert isinstance(planted, torch.Tensor) and isinstance(IMAGES.inputs, torch.Tensor)
    assert torch.equal(planted[0], CANARY.tensor)
    written = (planted[1].flatten() * 255).round().byte().numpy().tobytes()
    assert written.startswith(CANARY.text.encode())
    assert torch.equal(IMAGES.inputs, torch.zeros(3, 1, 8, 8))
    assert len(CANARY.plant(Records(IMAGES.inputs[:1], IMAGES.labels[:1]))) == 1


def test_it_is_planted_in_texts_and_in_pairs() -> None:
    texts = Records(["a", "b"], torch.tensor([0, 1]))
    canary = Canary.draw(texts, np.random.default_rng(0))
    assert any(canary.text in text for text in canary.plant(texts).inputs)
    assert find(canary.needles(), canary.text.encode()) is not None
    pairs = Records((torch.zeros(2, 1, 8, 8), ["a", "b"]), torch.tensor([0, 1]))
    images, words = CANARY.plant(pairs).inputs
    assert torch.equal(images[0], CANARY.tensor)  # type: ignore[arg-type]
    assert any(CANARY.text in word for word in words)
