"""Raw records of every kind: counted, chosen from, told apart."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from fedgraft_common.modality import FORMS, Modality, Raw, count, fits, form_of, take

RAW: dict[Modality, Raw] = {
    "image": torch.rand(4, 1, 2, 2),
    "audio": torch.rand(4, 9),
    "series": torch.rand(4, 9, 2),
    "tabular": torch.rand(4, 3),
    "video": torch.rand(4, 3, 1, 2, 2),
    "text": ["a", "b", "c", "d"],
    "image-text": (torch.rand(4, 1, 2, 2), ["a", "b", "c", "d"]),
}


def test_every_modality_has_a_form() -> None:
    assert set(FORMS) == set(RAW) == set(get_args(Modality))


@pytest.mark.parametrize("modality", list(RAW))
def test_count_and_take(modality: Modality) -> None:
    raw = RAW[modality]
    assert count(raw) == 4
    rows: list[slice | torch.Tensor] = [
        slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True, False])
    ]  # fmt: skip
    for where in rows:
        some = take(raw, where)
        assert count(some) == 2
        assert fits(some, modality)
    last = take(raw, torch.tensor([3, 0]))
    if isinstance(raw, torch.Tensor):
        assert isinstance(last, torch.Tensor)
        assert torch.equal(last, raw[[3, 0]])
    else:
        assert list(last[1] if isinstance(last, tuple) else last) == ["d", "a"]


def test_two_texts_in_a_tuple_are_two_records() -> None:
    assert count(("a", "b")) == 2
    assert list(take(("a", "b"), slice(1, 2))) == ["b"]


@pytest.mark.parametrize("modality", list(RAW))
def test_forms_are_told_apart(modality: Modality) -> None:
    same = {"audio": "tabular", "tabular": "audio"}
    for other, raw in RAW.items():
        assert fits(raw, modality) == (other in (modality, same.get(modality))), other


@pytest.mark.parametrize(
    ("raw", "modality"),
    [
        (torch.rand(4, 1, 2, 2).double(), "image"),
        ("one long text", "text"),
        ([1, 2], "text"),
        ((torch.rand(4, 1, 2, 2), ["a"]), "image-text"),
        (None, "image"),
    ],
)
def test_what_does_not_fit(raw: object, modality: Modality) -> None:
    assert not fits(raw, modality)
    assert form_of(raw)
