"""One DP-SGD step: sensitivity, noise, and that no unit escapes the clipping.

Most tests plant the per-example gradients themselves: then clipping is all that is tested.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from fedgraft_client.dp import SMALLEST, JointOptimizer
from fedgraft_client.gradients import Loop, trained
from fedgraft_client.prefix import Cached
from fedgraft_client.randomness import NoiseSource

ADAPTER, HEAD = 5, 3  # values in each group of the planted model


class Planted:
    """An engine whose per-example gradients are the rows of the cached tensor: (N, 8)."""

    name = "planted"

    def __init__(self, model: Pair, dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.dtype = dtype
        self.calls: list[int] = []

    def __call__(self, cached: Cached, labels: torch.Tensor) -> None:
        self.calls.append(len(labels))
        rows = cached[0].to(self.dtype)
        self.model.adapter.grad_sample = rows[:, :ADAPTER].clone()  # type: ignore[attr-defined]
        self.model.head.grad_sample = rows[:, ADAPTER:].clone()  # type: ignore[attr-defined]

    def close(self) -> None:
        pass


class Pair(nn.Module):
    """An adapter and a head of the given sizes, without a forward pass."""

    def __init__(self, adapter: int = ADAPTER, head: int = HEAD) -> None:
        super().__init__()
        self.adapter = nn.Parameter(torch.zeros(adapter))
        self.head = nn.Parameter(torch.zeros(head))


def joint(
    model: Pair, clipping_norm: float, adapter_std: float = 0.0, head_std: float = 0.0, key: int = 0
) -> JointOptimizer:
    groups = [
        {"params": [model.adapter], "lr": 1.0, "noise_std": adapter_std},
        {"params": [model.head], "lr": 1.0, "noise_std": head_std},
    ]
    noise = NoiseSource.for_simulation("test_dp", key)
    return JointOptimizer(torch.optim.SGD(groups), clipping_norm, noise)


def both(model: Pair) -> torch.Tensor:
    assert model.adapter.grad is not None
    assert model.head.grad is not None
    return torch.cat([model.adapter.grad, model.head.grad])


def released(
    rows: torch.Tensor,
    clipping_norm: float,
    physical_batch: int = 256,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The noiseless clipped sum over (N, 8) per-example gradients."""
    model = Pair()
    labels = torch.zeros(len(rows), dtype=torch.int64)
    engine = Planted(model, dtype)
    joint(model, clipping_norm).noisy_sum(engine, (rows,), labels, physical_batch)
    return both(model)


VALUES = st.one_of(
    st.floats(-10, 10, width=32), st.sampled_from([0.0, 1e-30, -1e-8, 1e10, -3e18, 3e38])
)
ROW = st.lists(VALUES, min_size=ADAPTER + HEAD, max_size=ADAPTER + HEAD)


def as_rows(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), ADAPTER + HEAD)


@settings(max_examples=200, deadline=None)
@given(
    others=st.lists(ROW, max_size=6),
    one=ROW,
    place=st.integers(0, 6),
    clipping_norm=st.sampled_from([0.01, 0.3, 1.0]),
    physical_batch=st.sampled_from([1, 2, 256]),
)
def test_one_unit_moves_the_sum_by_at_most_c(
    others: list[list[float]],
    one: list[float],
    place: int,
    clipping_norm: float,
    physical_batch: int,
) -> None:
    neighbour = [*others[:place], one, *others[place:]]
    without = released(as_rows(others), clipping_norm, physical_batch)
    with_it = released(as_rows(neighbour), clipping_norm, physical_batch)
    assert torch.isfinite(with_it).all()
    assert float((with_it - without).norm()) <= clipping_norm + 1e-6


@pytest.mark.parametrize("worst", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, ADAPTER])
def test_a_gradient_that_overflows_moves_the_sum_by_at_most_c(worst: float, place: int) -> None:
    """Whoever sends adapters can make chosen records overflow; NaN would tell that one was in."""
    rows = torch.ones(3, ADAPTER + HEAD)
    rows[1, place] = worst
    without = released(rows[[0, 2]], 1.0)
    with_it = released(rows, 1.0)
    assert torch.isfinite(with_it).all()
    assert float((with_it - without).norm()) <= 1 + 1e-6


def test_gradients_in_bfloat16_are_clipped_as_tightly() -> None:
    """Hooks return bfloat16 under autocast; a norm in it is off by up to 2^-9."""
    generator = torch.Generator().manual_seed(0)
    for scale in torch.linspace(1, 2, 40):
        rows = scale * torch.randn(1, ADAPTER + HEAD, generator=generator)
        assert float(released(rows * 10, 1.0, dtype=torch.bfloat16).norm()) <= 1 + 1e-6


def test_adapter_and_head_share_one_clip() -> None:
    """3 in the adapter and 4 in the head: norm 5. Clipping each alone would release (1, 1)."""
    row = torch.zeros(1, ADAPTER + HEAD)
    row[0, 0], row[0, ADAPTER] = 3.0, 4.0
    found = released(row, 1.0)
    assert found[0].item() == pytest.approx(0.6, rel=1e-5)
    assert found[ADAPTER].item() == pytest.approx(0.8, rel=1e-5)


def test_a_short_gradient_is_left_as_it_is() -> None:
    row = torch.full((1, ADAPTER + HEAD), 0.1)
    assert torch.allclose(released(row, 1.0), row[0], rtol=1e-6)
    assert released(torch.zeros(1, ADAPTER + HEAD), 1.0).tolist() == [0.0] * (ADAPTER + HEAD)


def test_every_unit_is_clipped_by_itself() -> None:
    rows = torch.zeros(3, ADAPTER + HEAD)
    rows[0, 0], rows[1, 1], rows[2, 2] = 100.0, 0.5, -7.0
    expected = [1.0, 0.5, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert torch.allclose(released(rows, 1.0), torch.tensor(expected), rtol=1e-5)


@pytest.mark.parametrize("physical_batch", [1, 2, 3, 7, 100])
def test_physical_batch_changes_neither_sum_nor_noise(physical_batch: int) -> None:
    rows = torch.randn(7, ADAPTER + HEAD, generator=torch.Generator().manual_seed(1)) * 2
    assert torch.allclose(released(rows, 1.0, physical_batch), released(rows, 1.0), atol=1e-6)
    grads = []
    for size in (physical_batch, 256):
        model = Pair()
        engine = Planted(model)
        labels = torch.zeros(7, dtype=torch.int64)
        joint(model, 1.0, 2.0, 3.0).noisy_sum(engine, (rows,), labels, size)
        grads.append(both(model))
        assert len(engine.calls) == -(-7 // size)
        assert set(engine.calls) == {min(size, SMALLEST)}  # filled up, and the copies dropped
    assert torch.allclose(grads[0], grads[1], atol=1e-5)


@pytest.mark.parametrize("records", [0, 5])
def test_noise_has_the_stated_deviation_in_each_group(records: int) -> None:
    """Also of an empty batch, which releases pure noise; the head's is not the adapter's."""
    size, adapter_std, head_std = 40_000, 0.7 / math.sqrt(16), 0.7
    model = Pair(size, size)

    class Zeros(Planted):
        def __call__(self, cached: Cached, labels: torch.Tensor) -> None:
            for parameter in (self.model.adapter, self.model.head):
                zeros = torch.zeros(len(labels), size)
                parameter.grad_sample = zeros  # type: ignore[attr-defined]

    rows, labels = torch.zeros(records, 1), torch.zeros(records, dtype=torch.int64)
    engine = Zeros(model)
    joint(model, 1.0, adapter_std, head_std).noisy_sum(engine, (rows,), labels, 256)
    assert model.adapter.grad is not None
    assert model.head.grad is not None
    for noise, std in ((model.adapter.grad, adapter_std), (model.head.grad, head_std)):
        z = noise.double().numpy() / std
        low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], df=size)
        assert low < float((z**2).sum()) < high
        assert stats.kstest(z, "norm").pvalue > 1e-3
    correlation = stats.pearsonr(model.adapter.grad.numpy(), model.head.grad.numpy())
    assert correlation.pvalue > 1e-3


def test_noise_is_added_once_to_a_step_of_several_parts() -> None:
    size = 20_000
    model = Pair(size, 1)

    class Zeros(Planted):
        def __call__(self, cached: Cached, labels: torch.Tensor) -> None:
            model.adapter.grad_sample = torch.zeros(len(labels), size)  # type: ignore[attr-defined]
            model.head.grad_sample = torch.zeros(len(labels), 1)  # type: ignore[attr-defined]

    labels = torch.zeros(6, dtype=torch.int64)
    joint(model, 1.0, 1.0, 1.0).noisy_sum(Zeros(model), (torch.zeros(6, 1),), labels, 2)
    assert model.adapter.grad is not None
    assert float(model.adapter.grad.std()) == pytest.approx(1.0, abs=0.03)


def test_each_step_starts_afresh_and_draws_new_noise() -> None:
    model = Pair()
    optimizer, engine = joint(model, 1.0, 1.0, 1.0), Planted(model)
    rows, labels = torch.ones(2, ADAPTER + HEAD), torch.zeros(2, dtype=torch.int64)
    optimizer.noisy_sum(engine, (rows,), labels, 256)
    first = both(model).clone()
    optimizer.noisy_sum(engine, (rows,), labels, 256)
    assert not torch.isclose(first, both(model)).any()
    for _ in range(3):
        exact = joint(model, 1.0)
        exact.noisy_sum(engine, (rows,), labels, 256)
        assert float(both(model).norm()) == pytest.approx(2.0, rel=1e-5)  # does not accumulate
    for parameter in (model.adapter, model.head):
        assert parameter.grad_sample is None  # type: ignore[attr-defined]
        assert parameter.summed_grad is None  # type: ignore[attr-defined]


def test_empty_batch_without_noise_is_zero() -> None:
    assert released(torch.zeros(0, ADAPTER + HEAD), 1.0).tolist() == [0.0] * (ADAPTER + HEAD)


class Classifier(nn.Module):
    """Something small that really is trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.adapter = nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.adapter(inputs)))
        return logits


def test_no_clipping_and_no_noise_are_the_plain_gradient() -> None:
    model = Classifier()
    inputs, labels = torch.randn(9, 4), torch.arange(9) % 2
    loss = nn.functional.cross_entropy(model(inputs), labels, reduction="sum")
    expected = torch.autograd.grad(loss, list(model.parameters()))
    groups = [{"params": list(trained(model).values()), "noise_std": 0.0}]
    source = NoiseSource.from_operating_system()
    optimizer = JointOptimizer(torch.optim.SGD(groups, lr=1.0), math.inf, source)
    optimizer.noisy_sum(Loop(model), (inputs,), labels, 4)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradient, rtol=1e-5, atol=1e-6)


def test_a_step_that_failed_halfway_leaves_nothing_to_the_next() -> None:
    model = Pair()
    optimizer = joint(model, 1.0)
    rows, labels = torch.ones(4, ADAPTER + HEAD), torch.zeros(4, dtype=torch.int64)

    class Failing(Planted):
        def __call__(self, cached: Cached, labels: torch.Tensor) -> None:
            if self.calls:
                raise RuntimeError("out of memory")
            super().__call__(cached, labels)

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.noisy_sum(Failing(model), (rows,), labels, 2)
    optimizer.noisy_sum(Planted(model), (rows[:1],), labels[:1], 2)
    assert float(both(model).norm()) == pytest.approx(1.0, rel=1e-5)
