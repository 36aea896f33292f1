"""Inversion where the truth is known: a planted gradient gives its input back, noise does not."""

from __future__ import annotations

import torch
from torch.nn import functional

from fedgraft_simulations.audit.gradient_matching import (
    Matching,
    all_gradients,
    layer_input,
    match_gradients,
    nearest_starts,
    total_variation,
)

SIDE = 4
HOW = Matching(iterations=200, restarts=2, rate=0.05, prior=0.0)


def gradients(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A leak planted for the test: as if a layer on the whole image was trained, one per label."""
    flat = inputs.flatten(1)
    return torch.cat([flat * (1 + labels[:, None]), flat.square(), flat.sin()], dim=1)


def images(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def nothing(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.new_zeros(len(inputs))


def test_a_planted_leak_is_inverted() -> None:
    truth, labels = images(3, 0), torch.tensor([0, 1, 2])
    starts = images(6, 1).view(2, 3, 1, SIDE, SIDE)
    steps: list[int] = []
    found = match_gradients(
        gradients, gradients(truth, labels), labels, starts, HOW, nothing, on_step=steps.append
    )
    assert float((found - truth).abs().max()) < 0.02
    assert steps == list(range(1, 201))


def test_the_length_of_what_is_seen_does_not_matter() -> None:
    truth, labels = images(2, 0), torch.tensor([0, 1])
    starts = images(4, 1).view(2, 2, 1, SIDE, SIDE)
    one, other = (
        match_gradients(gradients, scale * gradients(truth, labels), labels, starts, HOW, nothing)
        for scale in (1.0, 0.25)
    )
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


def test_noise_gives_no_image() -> None:
    truth, labels = images(3, 0), torch.tensor([0, 1, 2])
    noise = torch.randn(3, 3 * SIDE**2, generator=torch.Generator().manual_seed(2))
    starts = images(6, 1).view(2, 3, 1, SIDE, SIDE)
    found = match_gradients(gradients, noise, labels, starts, HOW, nothing)
    assert float((found - truth).abs().mean()) > 0.2
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


def test_the_best_of_several_starts_is_kept() -> None:
    truth, labels = images(1, 0), torch.tensor([0])
    starts = torch.stack([1 - truth, truth])
    how = Matching(iterations=1, restarts=2, rate=1e-6, prior=0.0)
    found = match_gradients(gradients, gradients(truth, labels), labels, starts, how, nothing)
    torch.testing.assert_close(found, truth, atol=1e-4, rtol=0)


def test_starts_are_the_nearest_of_the_right_label() -> None:
    own, own_labels = images(20, 3), torch.arange(20) % 2
    seen = gradients(own[[4, 7]], own_labels[[4, 7]])
    starts = nearest_starts(gradients, seen, torch.tensor([0, 1]), own, own_labels, 3)
    assert starts.shape == (3, 2, 1, SIDE, SIDE)
    assert torch.equal(starts[0], own[[4, 7]])
    evens = {tuple(image.flatten().tolist()) for image in own[::2]}
    assert all(tuple(image.flatten().tolist()) in evens for image in starts[:, 0])


def test_one_own_image_fills_every_start() -> None:
    own = images(1, 3)
    seen = gradients(images(1, 4), torch.tensor([0]))
    starts = nearest_starts(gradients, seen, torch.tensor([0]), own, torch.tensor([1]), 3)
    assert torch.equal(starts, own.expand(3, 1, 1, SIDE, SIDE))


def test_all_gradients_in_chunks_are_the_same() -> None:
    inputs, labels = images(600, 0), torch.arange(600) % 3
    assert torch.equal(all_gradients(gradients, inputs, labels), gradients(inputs, labels))


def test_total_variation_by_hand() -> None:
    image = torch.zeros(1, 1, 2, 2)
    image[0, 0, 0, 0] = 1.0
    assert float(total_variation(image)) == 1.0  # one of two steps down, one of two to the right
    assert float(total_variation(torch.ones(1, 3, 5, 5))) == 0.0


def test_a_layers_bias_gives_its_input_away() -> None:
    """Exact for one record; for a sum of two only a mixture; zeros where nothing was sent."""
    layer = torch.nn.Linear(5, 3)
    inputs = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    rows, columns = [], []
    for one in inputs:
        loss = functional.cross_entropy(layer(one[None]), torch.tensor([1]))
        weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias])
        rows.append(weight)
        columns.append(bias)
    found = layer_input(torch.stack(rows), torch.stack(columns))
    torch.testing.assert_close(found, inputs, atol=1e-5, rtol=1e-4)
    mixed = layer_input(sum(rows)[None], sum(columns)[None])  # type: ignore[index]
    assert float((mixed - inputs).abs().max(dim=1).values.min()) > 0.1
    assert not layer_input(torch.zeros(1, 3, 5), torch.zeros(1, 3)).any()
