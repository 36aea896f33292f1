"""`tabular:WIDTHxDEPTH`: a network for tables.

There are no pre-trained weights that would suit any table, so without a file they are drawn from
a seed that follows from the shape: public, and the same at every site. Adapters, or whole blocks
(`adapter.method = "full"`), are trained on top of these random features.
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import torch
from torch import nn

from fedgraft_common import plan as plans
from fedgraft_common.architectures.tabular_network import TabularNetwork
from fedgraft_common.description import Manifest, read_manifest
from fedgraft_common.errors import BackboneError
from fedgraft_common.preparations import build
from fedgraft_common.sources import weights
from fedgraft_common.sources.source import Loaded, Output

LARGEST = 4096


def load(shape: str, config: plans.Backbone) -> Loaded:
    """Builds the network and fills it from `backbone.weights`, or from the public seed.

    Raises:
        BackboneError: a shape that cannot be read, no number of columns, or weights that do not
            fit or are not the plan's.
    """
    found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,1})", shape)
    if found is None or int(found[1]) > LARGEST:
        raise BackboneError(
            "backbone.source", f"tabular:{shape}",
            f"tabular:WIDTHxDEPTH with a width up to {LARGEST}, e.g. tabular:64x2",
            "Correct the plan.",
        )  # fmt: skip
    columns = config.options.get("columns")
    if not isinstance(columns, int) or isinstance(columns, bool) or columns < 1:
        raise BackboneError(
            "backbone.options", columns, "columns = F, the number of columns of every site's table",
            "Add backbone.options.columns to the plan.",
        )  # fmt: skip
    width, depth = int(found[1]), int(found[2])
    model = TabularNetwork(columns, width, depth)
    if config.weights is None:
        _draw(model, f"fedgraft tabular {columns} {width} {depth}")
        digest, directory = _digest(model), Path()
        if config.sha256 not in (None, digest):
            raise BackboneError(
                "backbone.sha256", config.sha256, f"{digest}, of the weights drawn for this shape",
                "Correct the plan.",
            )  # fmt: skip
    else:
        file = weights.file_of(Path(config.weights))
        digest, directory = weights.check_hash((file,), config.sha256), file.parent
        weights.fill(model, weights.read(file), file)
    own = Manifest(name=f"tabular:{shape}")
    about = read_manifest(directory, own.name) if config.weights else own
    settings = {**(about.preprocessing or {}), "columns": columns}
    preparation = build(settings, "tabular", directory, "plan", config.preprocessing)
    blocks = about.blocks or tuple(f"blocks.{index}" for index in range(depth))
    frozen = model.requires_grad_(False).eval()
    return Loaded(frozen, about, preparation, _read, blocks, digest, directory)


def _draw(model: nn.Module, text: str) -> None:
    """He-normal weights (He et al. 2015, "Delving deep into rectifiers"), biases of zero."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                deviation = math.sqrt(2 / module.in_features)
                module.weight.normal_(0, deviation, generator=generator)
                module.bias.zero_()


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _read(model: nn.Module, named: dict[str, torch.Tensor]) -> Output:
    features = model(named["values"])
    return Output(features[:, None], features)
