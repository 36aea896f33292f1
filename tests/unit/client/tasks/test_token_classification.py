"""A class for each word: on its first token, whatever the tokenizer makes of it."""

from __future__ import annotations

import pytest
import tokenizers
import torch
import transformers

from fedgraft_client.data import Records
from fedgraft_client.tasks import IGNORED, build_task
from fedgraft_client.tasks.alignment import aligned
from fedgraft_common.backbone import Backbone, load_backbone
from fedgraft_common.plan import Backbone as BackboneConfig
from fedgraft_common.task_spec import TaskSpec

TASK = build_task(TaskSpec(kind="token-classification", classes=("O", "NAME", "PLACE")))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A tiny BERT with a tokenizer that cuts long words into letters."""
    directory = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ada", "lives", "in", "rome"]
    letters = [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"] + list("abcdefghijklmnopqrstuvwxyz")
    vocabulary = {word: i for i, word in enumerate(words + letters)}
    made = tokenizers.BertWordPieceTokenizer(vocab=vocabulary, lowercase=True)
    marks = {f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "PAD", "CLS", "SEP")}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, **marks)
    tokenizer.save_pretrained(directory)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(directory)
    return load_backbone(BackboneConfig(source=f"dir:{directory}"))


def test_a_words_label_is_on_its_first_token(backbone: Backbone) -> None:
    texts = ["Ada lives in Rome", "Zoe in Ada"]
    labels = torch.tensor([[1, 0, 0, 2], [1, 0, 1, IGNORED]])
    found = aligned(TASK, Records(texts, labels), backbone)
    assert found[0, :6].tolist() == [IGNORED, 1, 0, 0, 2, IGNORED]
    assert found[1, :7].tolist() == [IGNORED, 1, IGNORED, IGNORED, 0, 1, IGNORED]  # z ##o ##e
    assert bool((found[:, 7:] == IGNORED).all())


def test_what_does_not_fit_is_cut_off(backbone: Backbone) -> None:
    text = " ".join(["rome"] * 40)
    found = aligned(TASK, Records([text], torch.full((1, 40), 2)), backbone)
    length = backbone.prepare([text])[0].shape[1]
    assert found.shape == (1, length)
    assert int((found == 2).sum()) == length - 2


def test_padding_has_features_of_zero(backbone: Backbone) -> None:
    inputs = backbone.prepare(["rome", "ada lives in rome"])
    features = backbone.features(backbone.model, inputs, "tokens")
    mask = inputs[1] != 0
    assert not features[~mask].any()
    assert bool(features[mask].any(dim=1).all())


def test_scores_look_at_labelled_tokens_only() -> None:
    outputs = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2], [1, 1, 0]]), 3).float()
    labels = torch.tensor([[0, 1, IGNORED], [2, IGNORED, IGNORED]])
    found = TASK.scores(outputs, labels)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert TASK.correct(outputs, labels).tolist() == [1, 0]


def test_series_have_their_labels_already(backbone: Backbone) -> None:
    labels = torch.tensor([[0, 1]])
    assert aligned(TASK, Records(torch.zeros(1, 2, 3), labels), backbone) is labels
