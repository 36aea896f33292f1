"""A head of the classes' names: transformers' own zero-shot answer, and no record looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from fedgraft_client.task_head import start_head
from fedgraft_client.tasks import build_task
from fedgraft_common.adapted import adapted_backbone
from fedgraft_common.errors import PlanError
from fedgraft_common.plan import Plan
from fedgraft_common.task_spec import TaskSpec

CLASSES = ("cat", "dog", "red")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with a tokenizer of whole words."""
    directory = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "photo", "of", ".", *CLASSES]
    vocabulary = {word: i for i, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **marks).save_pretrained(directory)
    text = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 12,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    transformers.CLIPModel(config).save_pretrained(directory)
    return directory


def plan(directory: Path, **changes: object) -> Plan:
    return Plan().replace(
        {
            "backbone.source": f"dir:{directory}", "adapter.layers": "last:1",
            "head.training": "text", "head.scale": 10.0, "head.prompt": "a photo of {} .",
        } | changes
    )  # fmt: skip


def test_outputs_are_transformers_zero_shot_logits(clip: Path) -> None:
    adapted = adapted_backbone(plan(clip))
    head = start_head(plan(clip), build_task(TaskSpec(classes=CLASSES)), adapted)
    images = torch.randn(4, 3, 16, 16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    texts = tokenizer(
        [f"a photo of {name} ." for name in CLASSES], padding=True, return_tensors="pt"
    )
    whole = transformers.CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        truth = whole(pixel_values=images, **{k: texts[k] for k in ("input_ids", "attention_mask")})
        found = head(adapted(images))
        scale = whole.logit_scale.exp()
    assert torch.allclose(found / 10, truth.logits_per_image / scale, atol=1e-4)
    assert not any(p.requires_grad for p in head.parameters())


def test_the_prompt_and_the_names_decide(clip: Path) -> None:
    adapted = adapted_backbone(plan(clip))
    task = build_task(TaskSpec(classes=CLASSES))
    first = start_head(plan(clip), task, adapted).linear.weight
    other = start_head(plan(clip, **{"head.prompt": "red {}"}), task, adapted).linear.weight
    assert not torch.allclose(first, other)


def test_a_backbone_without_texts_is_refused(vit_directory: Path) -> None:
    wanted = plan(vit_directory)
    task = build_task(TaskSpec(classes=CLASSES))
    with pytest.raises(PlanError, match="text with a backbone of images and texts, such as CLIP"):
        start_head(wanted, task, adapted_backbone(wanted))
