"""What an attacker on updates computes: a record's adapter gradient as a function of the record.

The trainer's gradient engines stop at what the frozen prefix kept; an attacker needs derivatives
with respect to the record itself, so the whole model is differentiated twice. Everything in it is
public: the backbone, the plan's adapter, a fixed head.

Shapes: N images (N, C, H, W) in [0, 1], D values of the adapter, K classes, F features.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from fedgraft_client.head import LinearHead
from fedgraft_common.adapted import AdaptedBackbone, adapted_backbone
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan


class Victim(nn.Module):
    """A plan's model and a site's head, at one point of the run.

    Args:
        plan: the run.
        adapter: where the round starts.
        head: of the site; granted to the attacker if it is not public.

    Attributes:
        start: the adapter.
        layout: schema name and shape of each tensor, in the order of `gradients`.
    """

    def __init__(self, plan: Plan, adapter: Tensors, head: LinearHead) -> None:
        super().__init__()
        self.adapted: AdaptedBackbone = adapted_backbone(plan)  # not the trainer's: no hooks on it
        self.adapted.load(adapter)
        self.start = adapter
        self.head = LinearHead(head.linear.in_features, head.linear.out_features)
        self.head.load_state_dict(head.state_dict())
        self.head.requires_grad_(False)
        self._prepare = self.adapted.backbone.manifest.preprocessing
        self._adapter = {
            f"adapted.{name}": parameter
            for name, parameter in self.adapted.named_parameters()
            if parameter.requires_grad
        }
        order = {id(parameter): name for name, parameter in self.adapted.adapter.items()}
        self.layout = tuple(
            (order[id(parameter)], parameter.shape) for parameter in self._adapter.values()
        )
        self._one = vmap(grad(self._loss), in_dims=(None, 0, 0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, K)."""
        logits: torch.Tensor = self.head(self.features(images))
        return logits

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, F) as they enter the head's linear layer: at unit length."""
        features: torch.Tensor = self.adapted(self._prepare(images))
        return LinearHead.normalise(features)

    def _loss(
        self, adapter: dict[str, torch.Tensor], image: torch.Tensor, label: torch.Tensor
    ) -> torch.Tensor:
        logits = functional_call(self, adapter, (image[None],))
        return functional.cross_entropy(logits, label[None])

    def gradients(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(N, D) of each record's own loss, differentiable in the images."""
        values = {name: p.detach() for name, p in self._adapter.items()}
        found = self._one(values, images, labels)
        return torch.cat([found[name].flatten(1) for name in self._adapter], dim=1)

    def flat(self, tensors: Tensors) -> torch.Tensor:
        """(D,) values by schema name, in the order of `gradients`."""
        return torch.cat([tensors[name].flatten() for name, _ in self.layout])

    def head_gradients(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of the head's weight (N, K, F) and bias (N, K), if it were sent."""

        def loss(
            head: dict[str, torch.Tensor], features: torch.Tensor, label: torch.Tensor
        ) -> torch.Tensor:
            logits = functional_call(self.head, head, (features[None],))
            return functional.cross_entropy(logits, label[None])

        with torch.no_grad():
            features = self.features(images)
        values = {name: p.detach() for name, p in self.head.named_parameters()}
        found = vmap(grad(loss), in_dims=(None, 0, 0))(values, features, labels)
        return found["linear.weight"], found["linear.bias"]
