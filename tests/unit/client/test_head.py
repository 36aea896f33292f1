"""The head: public prototypes, and zeros."""

from __future__ import annotations

import pytest
import torch

from fedgraft_client.head import LinearHead, initial_head, simplex_prototypes
from fedgraft_common.plan import Plan


def names(count: int) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in range(count))


@pytest.mark.parametrize(("count", "features"), [(2, 2), (2, 64), (3, 16), (10, 10), (10, 64)])
def test_prototypes_are_a_simplex(count: int, features: int) -> None:
    rows = simplex_prototypes(0, names(count), features).double()
    cosines = rows @ rows.T
    expected = torch.full((count, count), -1 / (count - 1), dtype=torch.float64)
    expected.fill_diagonal_(1)
    assert rows.shape == (count, features)
    assert torch.allclose(cosines, expected, atol=1e-6)


def test_too_few_dimensions_give_unit_directions_that_differ() -> None:
    rows = simplex_prototypes(0, names(9), 4)
    assert rows.shape == (9, 4)
    assert torch.allclose(rows.norm(dim=1), torch.ones(9))
    cosines = (rows @ rows.T).fill_diagonal_(0)
    assert float(cosines.max()) < 0.999


def test_prototypes_depend_on_seed_and_names_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = simplex_prototypes(5, ("ill", "well"), 8)
    torch.manual_seed(2)
    assert torch.equal(first, simplex_prototypes(5, ("ill", "well"), 8))
    assert not torch.allclose(first, simplex_prototypes(6, ("ill", "well"), 8), atol=0.1)
    assert not torch.allclose(first, simplex_prototypes(5, ("ill", "fine"), 8), atol=0.1)
    assert not torch.allclose(first, simplex_prototypes(5, ("well", "ill"), 8), atol=0.1)
    joined = simplex_prototypes(5, ("illwell", ""), 8)
    assert not torch.allclose(first, joined, atol=0.1)


def test_a_private_head_starts_at_zero_and_is_trained() -> None:
    head = initial_head(Plan().replace({"head.training": "private"}), names(3), 8)
    assert all(p.requires_grad and not p.any() for p in head.parameters())


def test_a_fixed_head_is_scaled_prototypes_and_frozen() -> None:
    plan = Plan().replace({"head.training": "fixed", "head.scale": 2.5, "seed": 4})
    head = initial_head(plan, names(3), 8)
    assert not any(p.requires_grad for p in head.parameters())
    assert torch.equal(head.linear.weight, simplex_prototypes(4, names(3), 8) * 2.5)
    assert not head.linear.bias.any()


def test_only_the_direction_of_features_counts() -> None:
    head = LinearHead(4, 3)
    torch.nn.init.normal_(head.linear.weight)
    features = torch.randn(5, 4)
    assert torch.allclose(head(features), head(features * 37), atol=1e-6)
    assert torch.isfinite(head(torch.zeros(1, 4))).all()
