"""The attacker's gradients are the trainer's, and can be differentiated to the input."""

from __future__ import annotations

import torch

from fedgraft_client.head import LinearHead
from fedgraft_simulations.audit.candidates import Candidates
from fedgraft_simulations.audit.part import AuditContext
from fedgraft_simulations.audit.text_trial import CLASSES, TOKENS, WIDTH, small_encoder
from fedgraft_simulations.audit.update_regression import unit_gradients
from fedgraft_simulations.audit.victim import Victim


def test_gradients_of_images_are_those_of_the_trainer(
    context: AuditContext, candidates: list[Candidates]
) -> None:
    run, site = context.rehearsal, candidates[0]
    bench = run.sites[0].bench(run.plan)
    head = run.sites[0].trained_head(run.plan)
    adapter = {name: tensor + 0.05 for name, tensor in bench.initial.items()}
    victim = Victim.of_images(run.plan, adapter, head)
    images = site.records.inputs
    assert isinstance(images, torch.Tensor)
    found = victim.gradients(images[:6], site.labels[:6])
    truth = unit_gradients(adapter, head, site, float("inf"))[:6]
    names = list(bench.adapted.adapter)
    sizes = [bench.initial[name].numel() for name in names]
    for row, expected in zip(found, truth, strict=True):
        parts = dict(zip(names, expected.split(sizes), strict=True))
        own = {n: parts[n].view(bench.initial[n].shape) for n in names}
        torch.testing.assert_close(row, victim.flat(bench.adapted, own), atol=1e-4, rtol=1e-3)


def test_they_move_with_the_image(context: AuditContext, candidates: list[Candidates]) -> None:
    run, site = context.rehearsal, candidates[0]
    head = run.sites[0].trained_head(run.plan)
    victim = Victim.of_images(run.plan, run.adapter, head)
    images = site.records.inputs
    assert isinstance(images, torch.Tensor)
    one = images[:1].clone().requires_grad_(True)
    victim.gradients(one, site.labels[:1]).square().sum().backward()
    assert one.grad is not None
    assert bool(one.grad.any())
    assert all(p.grad is None for p in victim.adapter.values())


def test_the_heads_gradient_is_autograds() -> None:
    encoder = small_encoder(0)
    head = LinearHead(WIDTH, CLASSES)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(0))
    victim = Victim(encoder, head)
    embedded = encoder.vocabulary[torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])]
    labels = torch.tensor([0, 2])
    weight, bias = victim.head_gradients(embedded, labels)
    assert (weight.shape, bias.shape) == ((2, CLASSES, WIDTH), (2, CLASSES))
    for row in range(2):
        loss = torch.nn.functional.cross_entropy(
            head(encoder(embedded[row : row + 1]).detach()), labels[row : row + 1]
        )
        expected = torch.autograd.grad(loss, list(head.parameters()))
        torch.testing.assert_close(weight[row], expected[0])
        torch.testing.assert_close(bias[row], expected[1])


def test_the_nearest_token_of_an_embedding_is_itself() -> None:
    encoder = small_encoder(0)
    words = 1 + torch.arange(3 * TOKENS).view(3, TOKENS)  # 0 is padding, and has no place
    nudged = encoder.vocabulary[words] * 1.3 + 1e-3
    assert torch.equal(encoder.nearest(nudged), words)
