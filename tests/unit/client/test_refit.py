"""The refit at home: on few classes, few records and missing classes, near where it started."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedgraft_client.head import LinearHead, simplex_prototypes
from fedgraft_client.refit import STIFFNESS, refit_head


def zeros(classes: int, features: int = 6) -> LinearHead:
    return LinearHead(features, classes)


def prototypes(classes: int, features: int = 6) -> LinearHead:
    head = LinearHead(features, classes)
    names = tuple(f"class {i}" for i in range(classes))
    with torch.no_grad():
        head.linear.weight.copy_(4 * simplex_prototypes(0, names, features))
    return head


def clusters(classes: list[int], each: int = 12, features: int = 6) -> tuple[torch.Tensor, ...]:
    """One well separated direction for each class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor(classes).repeat_interleave(each)
    noise = 0.05 * torch.randn(len(labels), features, generator=generator)
    return torch.eye(features)[labels % features] * 3 + noise, labels


@pytest.mark.parametrize("start", [zeros, prototypes])
@pytest.mark.parametrize("present", [[0, 1], [0, 2], [3, 1], [0, 1, 2, 3]])
def test_separable_classes_are_told_apart(
    present: list[int], start: Callable[[int], LinearHead]
) -> None:
    features, labels = clusters(present)
    head = refit_head(features, labels, start(4))
    assert not any(p.requires_grad for p in head.parameters())
    assert head.linear.weight.shape == (4, 6)
    assert head.linear.weight.dtype == torch.float32
    assert torch.equal(head(features).argmax(dim=1), labels)


def test_against_scikit_learns_ridge_from_a_head_of_zeros() -> None:
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(1)
    features, labels = torch.randn(60, 5), torch.arange(60) % 3
    unit = torch.nn.functional.normalize(features, dim=1).double()
    inputs = torch.cat([unit, torch.ones(60, 1, dtype=torch.float64)], dim=1).numpy()
    reference = LogisticRegression(C=1 / STIFFNESS, fit_intercept=False, tol=1e-10, max_iter=5000)
    expected = torch.from_numpy(reference.fit(inputs, labels.numpy()).predict_proba(inputs))
    found = refit_head(features, labels, zeros(3, 5))(features).softmax(dim=1)
    assert torch.allclose(found.double(), expected, atol=1e-4)


@pytest.mark.parametrize("start", [zeros, prototypes])
@pytest.mark.parametrize("present", [[2], [0, 3], [0, 1, 3]])
def test_a_class_without_records_is_not_predicted_near_the_records(
    present: list[int], start: Callable[[int], LinearHead]
) -> None:
    features, labels = clusters(present)
    head = refit_head(features, labels, start(4))
    near = features + 0.1 * torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    assert set(head(near).argmax(dim=1).tolist()) <= set(present)
    assert head(near).softmax(dim=1).isfinite().all()


def test_without_records_of_any_weight_the_start_stays() -> None:
    features, labels = clusters([0, 1], each=1)
    start = prototypes(4)
    head = refit_head(features, labels, start, stiffness=1e6)
    assert torch.allclose(head.linear.weight, start.linear.weight, atol=1e-4)


def test_the_start_is_not_changed_and_the_same_records_give_the_same_head() -> None:
    features, labels = clusters([0, 1, 2])
    start = prototypes(3)
    before = start.linear.weight.detach().clone()
    first, second = refit_head(features, labels, start), refit_head(features, labels, start)
    assert torch.equal(first.linear.weight, second.linear.weight)
    assert torch.equal(start.linear.weight, before)
    assert start.linear.weight.grad is None
