"""The refit at home, on few classes, few records and missing classes."""

from __future__ import annotations

import pytest
import torch

from fedgraft_client.refit import refit_head


def clusters(classes: list[int], each: int = 12, features: int = 6) -> tuple[torch.Tensor, ...]:
    """One well separated direction for each class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor(classes).repeat_interleave(each)
    noise = 0.05 * torch.randn(len(labels), features, generator=generator)
    return torch.eye(features)[labels % features] * 3 + noise, labels


@pytest.mark.parametrize("present", [[0, 1], [0, 2], [3, 1], [0, 1, 2, 3]])
def test_separable_classes_are_told_apart(present: list[int]) -> None:
    features, labels = clusters(present)
    head = refit_head(features, labels, 4)
    assert not any(p.requires_grad for p in head.parameters())
    assert head.linear.weight.shape == (4, 6)
    assert torch.equal(head(features).argmax(dim=1), labels)
    assert head.linear.weight.dtype == torch.float32


def test_two_classes_give_scikit_learns_probabilities() -> None:
    """One row for two classes is split into two; the softmax must be the sigmoid of the margin."""
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(1)
    features, labels = torch.randn(40, 6), torch.arange(40) % 2
    unit = torch.nn.functional.normalize(features, dim=1)
    reference = LogisticRegression(C=10.0, max_iter=300).fit(unit.double().numpy(), labels.numpy())
    expected = torch.from_numpy(reference.predict_proba(unit.double().numpy())).float()
    found = refit_head(features, labels, 2)(features).softmax(dim=1)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("present", [[2], [0, 3], [0, 1, 3]])
def test_a_class_without_records_is_never_predicted(present: list[int]) -> None:
    features, labels = clusters(present)
    head = refit_head(features, labels, 4)
    elsewhere = torch.randn(500, 6, generator=torch.Generator().manual_seed(2)) * 10
    predicted = head(elsewhere).argmax(dim=1)
    assert set(predicted.tolist()) <= set(present)
    assert head(elsewhere).softmax(dim=1).isfinite().all()


def test_one_class_is_always_predicted() -> None:
    features, labels = clusters([1])
    head = refit_head(features, labels, 3)
    assert head(torch.randn(20, 6)).argmax(dim=1).tolist() == [1] * 20


def test_the_same_records_give_the_same_head() -> None:
    features, labels = clusters([0, 1, 2])
    first, second = refit_head(features, labels, 3), refit_head(features, labels, 3)
    assert torch.equal(first.linear.weight, second.linear.weight)
