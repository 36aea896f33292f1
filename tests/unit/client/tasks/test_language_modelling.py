"""The next token: the head is the model's own, as transformers has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from fedgraft_client.refit import refit_head
from fedgraft_client.task_head import start_head
from fedgraft_client.tasks import IGNORED, build_task
from fedgraft_client.tasks.language_modelling import next_tokens
from fedgraft_common.adapted import adapted_backbone
from fedgraft_common.errors import PlanError
from fedgraft_common.plan import Plan
from fedgraft_common.task_spec import TaskSpec

TASK = build_task(TaskSpec(kind="language-modelling"))


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=12, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("gpt")
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def plan(directory: Path, **changes: object) -> Plan:
    return Plan().replace({"backbone.source": f"dir:{directory}", "adapter.method": "ffa-lora",
                           "backbone.preprocessing": {"length": 8}} | changes)  # fmt: skip


def test_labels_are_the_tokens_that_follow() -> None:
    tokens = torch.tensor([[5, 6, 7, 0], [3, 4, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert next_tokens(tokens, mask).tolist() == [[6, 7, IGNORED, IGNORED], [4, 5, 6, IGNORED]]


def test_outputs_are_those_of_the_language_model_itself(gpt: Path) -> None:
    adapted = adapted_backbone(plan(gpt), features="tokens")
    head = start_head(plan(gpt), TASK, adapted)
    whole = transformers.GPT2LMHeadModel.from_pretrained(gpt).eval()
    tokens = torch.arange(16).view(2, 8) % 40
    with torch.no_grad():
        found = head(adapted(tokens, torch.ones_like(tokens)))
        truth = whole(input_ids=tokens, labels=tokens)
    assert torch.allclose(found, truth.logits, atol=1e-4)
    labels = next_tokens(tokens, None)
    assert float(TASK.loss(found, labels).mean()) == pytest.approx(float(truth.loss), abs=1e-4)
    assert TASK.scores(found, labels)["perplexity"] == pytest.approx(
        float(truth.loss.exp()), rel=1e-3
    )


def test_a_private_head_is_refused(gpt: Path) -> None:
    private = plan(gpt, **{"head.training": "private"})
    with pytest.raises(PlanError, match="backbone's own table of tokens"):
        start_head(private, TASK, adapted_backbone(private, features="tokens"))


def test_a_model_that_reads_both_ways_is_refused(tmp_path: Path) -> None:
    """BERT would see the token that it is to predict."""
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=12, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="reads text in both directions"):
        start_head(plan(tmp_path), TASK, adapted_backbone(plan(tmp_path), features="tokens"))


def test_the_refit_fits_how_often_each_token_occurs_and_nothing_else(gpt: Path) -> None:
    adapted = adapted_backbone(plan(gpt), features="tokens")
    head = start_head(plan(gpt), TASK, adapted)
    tokens = torch.full((4, 8), 7)
    with torch.no_grad():
        features = adapted(tokens, torch.ones_like(tokens))
    labels = next_tokens(tokens, None)
    fitted = refit_head(features, labels, head)
    assert torch.equal(fitted.linear.weight, head.linear.weight)
    assert int(fitted.linear.bias.argmax()) == 7
    assert float(TASK.loss(fitted(features), labels).mean()) < float(
        TASK.loss(head(features), labels).mean()
    )
