"""Bytes of values that hide something are not those of noise."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedgraft_simulations.audit.egress import ALARM, uneven


def noise(messages: int, places: int, seed: int = 0) -> NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, 2**32, (messages, places), dtype=np.uint32)


def test_even_bits_pass_whatever_their_number() -> None:
    assert min(uneven(noise(60, 500, seed), 32) for seed in range(20)) > ALARM
    assert uneven(noise(3, 2048), 32) == 1.0
    assert uneven(np.zeros((0, 0), np.uint32), 8) == 1.0


@pytest.mark.parametrize("place", [0, 499])
def test_letters_in_the_last_byte_of_one_value_are_found(place: int) -> None:
    sample = noise(60, 500)
    text = np.frombuffer(b"ward 7, age 47, diabetic, room 12, admitted in May; ward 7, a", np.uint8)
    sample[:, place] = (sample[:, place] & np.uint32(0xFFFFFF00)) | text[:60]
    assert uneven(sample, 8) < ALARM


def test_noise_in_float32_is_even_to_its_last_byte() -> None:
    random = np.random.default_rng(1)
    values = (1 + 0.2 * random.normal(size=(960, 300))).astype(np.float32)
    assert uneven(values.view(np.uint32), 8) > ALARM
