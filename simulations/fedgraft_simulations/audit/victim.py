"""What an attacker on updates computes: a record's adapter gradient as a function of the record.

The trainer's gradient engines stop at what the frozen prefix kept; an attacker needs derivatives
with respect to the record itself, so the whole model is differentiated twice. Everything in it is
public: the backbone, the plan's adapter, a fixed head.

Shapes: N inputs of shape S (images in [0, 1], or token embeddings), D values of the adapter,
K classes, F features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from fedgraft_client.head import LinearHead
from fedgraft_common.adapted import AdaptedBackbone, adapted_backbone
from fedgraft_common.features import pool
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan


class ImageEncoder(nn.Module):
    """Images (N, C, H, W) in [0, 1] to features (N, F): a plan's own model."""

    def __init__(self, adapted: AdaptedBackbone) -> None:
        super().__init__()
        self.adapted = adapted

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Prepares and encodes."""
        features: torch.Tensor = self.adapted(*self.adapted.backbone.prepare(images))
        return features


class TextEncoder(nn.Module):
    """Token embeddings (N, tokens, width) to features (N, F): an encoder of transformers.

    A text is not a point in space, so the attacker looks for its embeddings, and then for the
    tokens that are nearest.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def vocabulary(self) -> torch.Tensor:
        """(words, width) the embedding of each token."""
        table: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        weight: torch.Tensor = table.weight.detach()
        return weight

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Encodes, and takes the mean over tokens."""
        return pool(self.model(inputs_embeds=embeddings), "mean")

    def nearest(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(N, tokens) the token whose embedding has the largest cosine with each."""
        alike = functional.normalize(embeddings, dim=-1) @ functional.normalize(
            self.vocabulary, dim=-1
        ).transpose(0, 1)
        return alike.argmax(dim=-1)


class Victim(nn.Module):
    """An encoder and a site's head, at one point of a run.

    Args:
        encoder: inputs to features; its parameters that require gradients are the adapter.
        head: of the site; granted to the attacker if it is not public.
    """

    def __init__(self, encoder: nn.Module, head: LinearHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head.like()
        self.head.load_state_dict(head.state_dict())
        self.head.requires_grad_(False)
        self.adapter = {n: p for n, p in self.named_parameters() if p.requires_grad}
        self._each = vmap(grad(self._loss), in_dims=(None, 0, 0))

    @classmethod
    def of_images(cls, plan: Plan, adapter: Tensors, head: LinearHead) -> Victim:
        """A plan's model. It is built anew, for the trainer's has hooks on it."""
        adapted = adapted_backbone(plan)
        adapted.load(adapter)
        return cls(ImageEncoder(adapted), head)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits (N, K)."""
        logits: torch.Tensor = self.head(self.encoder(inputs))
        return logits

    def features(self, inputs: torch.Tensor) -> torch.Tensor:
        """(N, F) as they enter the head's linear layer: at unit length."""
        return self.head.normalise(self.head.localise(self.encoder(inputs)))

    def _loss(
        self, adapter: dict[str, torch.Tensor], one: torch.Tensor, label: torch.Tensor
    ) -> torch.Tensor:
        outputs = functional_call(self, adapter, (one[None],))
        return self.head.task.loss(outputs, label[None]).sum()

    def gradients(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(N, D) of each record's own loss, differentiable in the inputs."""
        values = {name: p.detach() for name, p in self.adapter.items()}
        found = self._each(values, inputs, labels)
        return torch.cat([found[name].flatten(1) for name in self.adapter], dim=1)

    def flat(self, adapted: AdaptedBackbone, tensors: Tensors) -> torch.Tensor:
        """(D,) values by schema name, in the order of `gradients`.

        Args:
            adapted: the model whose schema names them.
            tensors: an adapter, or a gradient of one.
        """
        paths = {id(p): path for path, p in adapted.named_parameters()}
        names = {paths[id(p)]: name for name, p in adapted.adapter.items()}
        order = (path.removeprefix("encoder.adapted.") for path in self.adapter)
        return torch.cat([tensors[names[path]].flatten() for path in order])

    def head_gradients(
        self, inputs: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of the head's weight (N, K, F) and bias (N, K), if it were sent."""

        def loss(
            head: dict[str, torch.Tensor], features: torch.Tensor, label: torch.Tensor
        ) -> torch.Tensor:
            outputs = functional_call(self.head, head, (features[None],))
            return self.head.task.loss(outputs, label[None]).sum()

        with torch.no_grad():
            features = self.encoder(inputs)
        values = {name: p.detach() for name, p in self.head.named_parameters()}
        found = vmap(grad(loss), in_dims=(None, 0, 0))(values, features, labels)
        return found["linear.weight"], found["linear.bias"]
