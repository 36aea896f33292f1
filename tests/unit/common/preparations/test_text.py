"""Texts as a model's input, with a real tokenizer of a few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedgraft_common.errors import BackboneError, DataError
from fedgraft_common.preparations import TextPreparation

WORDS = ["[PAD]", "[UNK]", "pain", "in", "the", "chest", "no"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as it lies beside a model."""
    path = tmp_path_factory.mktemp("tokenizer")
    unknown, pad = WORDS[1], WORDS[0]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token=unknown))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": unknown, "pad_token": pad}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(path)
    return path


def preparation(directory: Path, **changes: Any) -> TextPreparation:
    settings = {"directory": directory, "vocabulary": len(WORDS), "length": 4} | changes
    return TextPreparation.model_validate(settings)


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [("right", [2, 3, 0, 0], [1, 1, 0, 0]), ("left", [0, 0, 2, 3], [0, 0, 1, 1])],
)
def test_short_texts_are_filled_up(
    directory: Path, side: str, ids: list[int], mask: list[int]
) -> None:
    found = preparation(directory, side=side)(["pain in"])
    assert [tensor.tolist() for tensor in found] == [[ids], [mask]]
    assert all(tensor.dtype is torch.int64 for tensor in found)


def test_long_texts_are_cut_and_strange_words_are_unknown(directory: Path) -> None:
    ids, mask = preparation(directory)(["pain in the chest no no", "zzz"])
    assert ids.tolist() == [[2, 3, 4, 5], [1, 0, 0, 0]]
    assert mask.sum(dim=1).tolist() == [4, 1]


def test_what_becomes_of_a_text_does_not_depend_on_the_others(directory: Path) -> None:
    prepare = preparation(directory)
    alone, among = prepare(["pain"]), prepare(["pain", "pain in the chest no"])
    for one, both in zip(alone, among, strict=True):
        assert torch.equal(one, both[:1])


@pytest.mark.parametrize("side", ["right", "left"])
def test_examples_look_like_texts(directory: Path, side: str) -> None:
    prepare = preparation(directory, side=side, length=9)
    ids, mask = prepare.example(50, torch.Generator().manual_seed(0))
    assert ids.shape == mask.shape == (50, 9)
    assert ((ids == 0) == (mask == 0)).all()
    assert int(ids.max()) < len(WORDS)
    assert len(mask.sum(dim=1).unique()) > 1
    steps = mask.diff(dim=1)
    assert (steps <= 0).all() if side == "right" else (steps >= 0).all()


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no tokenizer.*tokenizer\.save_pretrained") as caught:
        preparation(tmp_path)(["pain"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [torch.zeros(2, 3), "pain", [1, 2]])
def test_other_forms(directory: Path, raw: Any) -> None:
    with pytest.raises(DataError, match="a sequence of strings"):
        preparation(directory)(raw)
