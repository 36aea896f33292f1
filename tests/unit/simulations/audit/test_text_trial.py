"""Words come back from a bare gradient, and not from one with noise."""

from __future__ import annotations

import numpy as np

from fedgraft_simulations.audit.text_trial import recover_texts


def test_words_leak_without_noise_and_not_with_it() -> None:
    found = recover_texts(np.random.default_rng(0), noise=2.0, texts=2)
    assert found.bare >= 0.5
    assert found.noised <= 0.25
    assert found.guess == 0.01


def test_equal_seeds_give_equal_findings() -> None:
    first, second = (recover_texts(np.random.default_rng(3), 2.0, 1, 40) for _ in range(2))
    assert first == second
