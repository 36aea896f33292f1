"""What a competent user would write today without Fedgraft: Flower + Opacus + PEFT.

    python -m fedgraft_simulations.benchmarks.peer TASK.json

The digits job of `digits_vit`, from the three projects' own examples and nothing of Fedgraft's:

- Flower's Message API and its simulation runtime on Ray, one client per processor at a time,
  FedAvg over the trained tensors (LoRA and head), no evaluation until the end;
- a client that builds model, optimiser and data loader in its `train` function, as Flower's
  examples do, because any actor may be asked to be any client;
- PEFT's `get_peft_model`, and Opacus' `PrivacyEngine.make_private` with Poisson sampling and its
  default per-sample gradient hooks; an epoch of the Poisson loader a round.

The noise multiplier comes from Opacus' own accountant, once, for all steps of the job. Clipping
norm, sample rate, steps, learning rates, LoRA rank and layers, head and starting weights are
those of the task, which Fedgraft's side uses too.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


@dataclass(frozen=True, slots=True)
class Task:
    """The job, as `digits_vit` writes it."""

    backbone: str  # Hugging Face directory of the ViT
    data: str  # directory with site-0.npz, ...: train_x, train_y, test_x, test_y
    sites: int
    classes: int
    rounds: int
    batch: int  # of the loader, which makes the sample rate 1 / ceil(records / batch)
    epsilon: float
    delta: float
    clipping_norm: float
    learning_rate: float  # of LoRA
    head_learning_rate: float
    rank: int
    alpha: float
    layers: list[int]
    targets: list[str]
    seed: int


def read_task(path: str) -> Task:
    """A task from its JSON file."""
    return Task(**json.loads(Path(path).read_text(encoding="utf-8")))


class Classifier(nn.Module):
    """ViT with LoRA, mean over tokens, unit length, linear head that starts at zero."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import ViTModel

        torch.manual_seed(task.seed)
        backbone = ViTModel.from_pretrained(task.backbone, add_pooling_layer=False)
        config = LoraConfig(
            r=task.rank,
            lora_alpha=task.alpha,
            lora_dropout=0.0,
            target_modules=task.targets,
            layers_to_transform=task.layers,
            layers_pattern="layers",
        )
        self.backbone = get_peft_model(backbone, config)
        self.head = nn.Linear(backbone.config.hidden_size, task.classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.backbone(pixel_values=images).last_hidden_state
        logits: torch.Tensor = self.head(functional.normalize(tokens.mean(dim=1), dim=-1))
        return logits

    def trained_state(self) -> dict[str, torch.Tensor]:
        """What travels."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


def load_data(task: Task, site: int, part: str) -> TensorDataset:
    """One site's records, already resized and normalised."""
    with np.load(Path(task.data) / f"site-{site}.npz") as file:
        images, labels = file[f"{part}_x"], file[f"{part}_y"]
    return TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """One round at one client."""
    from opacus import PrivacyEngine

    warnings.filterwarnings("ignore")
    config: Any = message.content.config_records["config"]
    task = read_task(str(config["task"]))
    data = load_data(task, int(context.node_config["partition-id"]), "train")
    model = Classifier(task)
    arrays = message.content.array_records["arrays"]
    model.load_state_dict(arrays.to_torch_state_dict(), strict=False)
    model.train()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.backbone.parameters() if p.requires_grad]},
        {"params": list(model.head.parameters()), "lr": task.head_learning_rate},
    ]
    optimizer = torch.optim.SGD(groups, lr=task.learning_rate)
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=task.batch),
        noise_multiplier=float(config["noise-multiplier"]),
        max_grad_norm=task.clipping_norm,
        poisson_sampling=True,
    )
    for images, labels in loader:
        optimizer.zero_grad()
        loss = functional.cross_entropy(private(images), labels)
        torch.autograd.backward(loss)
        optimizer.step()
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.trained_state()),
            "metrics": MetricRecord({"num-examples": len(data)}),
        }
    )
    return Message(content, reply_to=message)


def noise_multiplier(task: Task) -> tuple[float, int]:
    """Opacus' noise multiplier for the whole job, and the steps of a round."""
    from opacus.accountants.utils import get_noise_multiplier

    records = max(len(load_data(task, site, "train")) for site in range(task.sites))
    steps = -(-records // task.batch)
    sigma = get_noise_multiplier(
        target_epsilon=task.epsilon,
        target_delta=task.delta,
        sample_rate=1 / steps,
        steps=steps * task.rounds,
        accountant="prv",
    )
    return sigma, steps


def server_app(task: Task, path: str, sigma: float, result: dict[str, Any]) -> ServerApp:
    """FedAvg over the trained tensors."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=task.sites,
            min_available_nodes=task.sites,
        )
        found = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(Classifier(task).trained_state()),
            train_config=ConfigRecord({"task": path, "noise-multiplier": sigma}),
            num_rounds=task.rounds,
        )
        if len(found.train_metrics_clientapp) < task.rounds:
            raise RuntimeError("a round ended without updates; Ray's log above says why")
        result["arrays"] = found.arrays

    return server


def accuracy(task: Task, arrays: ArrayRecord) -> float:
    """Mean over sites of the final model's accuracy on held-out records."""
    model = Classifier(task)
    model.load_state_dict(arrays.to_torch_state_dict(), strict=False)
    model.eval()
    shares = []
    with torch.no_grad():
        for site in range(task.sites):
            images, labels = load_data(task, site, "test").tensors
            shares.append(float((model(images).argmax(dim=1) == labels).float().mean()))
    return sum(shares) / len(shares)


def main(path: str) -> None:
    """Runs the job and prints its result as JSON."""
    warnings.filterwarnings("ignore")
    task = read_task(path)
    sigma, steps = noise_multiplier(task)
    result: dict[str, Any] = {}
    run_simulation(
        server_app=server_app(task, path, sigma, result),
        client_app=client,
        num_supernodes=task.sites,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    found = {"accuracy": accuracy(task, result["arrays"]), "sigma": sigma, "steps": steps}
    print(json.dumps(found))


if __name__ == "__main__":
    # Under its own name, so that Ray's actors import this module instead of unpickling it.
    from fedgraft_simulations.benchmarks import peer

    peer.main(sys.argv[1])
