"""The inversion of text, on a small encoder with random weights: what a leak of words looks like.

A plan on images says nothing about texts, so the attack is shown on a model of its own: a BERT of
two layers whose output projections are trained. What it finds holds for the code path and for the
principle, not for any real encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fedgraft_client.head import LinearHead
from fedgraft_simulations.audit.gradient_matching import Matching, match_gradients
from fedgraft_simulations.audit.victim import TextEncoder, Victim

WORDS, TOKENS, WIDTH, CLASSES = 100, 4, 24, 3


@dataclass(frozen=True, slots=True)
class Recovered:
    """Shares of tokens recovered at their place, in [0, 1].

    Attributes:
        bare: from the gradient of one text.
        noised: from the same, clipped to 1, with noise.
        guess: expected of a guess.
    """

    bare: float
    noised: float
    guess: float = 1 / WORDS


def small_encoder(seed: int) -> TextEncoder:
    """A BERT with random weights whose output projections are trained."""
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=2 * WIDTH, max_position_embeddings=2 * TOKENS,
            initializer_range=0.2, attn_implementation="eager",
        )  # fmt: skip
        model = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("encoder" in name and "output.dense.weight" in name)
    return TextEncoder(model)


def recover_texts(
    random: np.random.Generator, noise: float, texts: int = 3, iterations: int = 300
) -> Recovered:
    """Attacks random texts.

    Args:
        random: draws texts, starts and noise.
        noise: standard deviation of the noise on the clipped gradient.
        texts: how many.
        iterations: steps of the attack.
    """
    how = Matching(iterations, restarts=6, rate=0.03, prior=0.0)
    encoder = small_encoder(int(random.integers(2**31)))
    head = LinearHead(WIDTH, CLASSES)
    with torch.no_grad():
        head.linear.weight.copy_(torch.from_numpy(random.normal(0, 2, (CLASSES, WIDTH))))
    victim = Victim(encoder, head)
    words = torch.from_numpy(random.integers(1, WORDS, (texts, TOKENS)))
    labels = torch.from_numpy(random.integers(0, CLASSES, texts))
    bare = victim.gradients(encoder.vocabulary[words], labels).detach()
    clipped = bare / bare.norm(dim=1, keepdim=True).clamp(min=1.0)
    noised = clipped + torch.from_numpy(random.normal(0, noise, tuple(bare.shape))).float()
    begin = torch.from_numpy(random.integers(1, WORDS, (how.restarts, 2 * texts, TOKENS)))
    far = float(encoder.vocabulary.abs().max())
    found = match_gradients(
        victim.gradients, torch.cat([bare, noised]), labels.repeat(2), encoder.vocabulary[begin],
        how, lambda x: x.new_zeros(len(x)), (-far, far),
    )  # fmt: skip
    right = (encoder.nearest(found) == words.repeat(2, 1)).double().mean(dim=1)
    return Recovered(float(right[:texts].mean()), float(right[texts:].mean()))
