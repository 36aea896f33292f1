"""The blocks of a model in order: what `adapter.layers = "last:K"` counts."""

from __future__ import annotations

from torch import nn

CONTAINERS = (
    "blocks", "stages", "layers", "encoder.layers", "features", "trunk_output", "backbone.body"
)  # fmt: skip
"""Where timm and torchvision keep the parts of a network."""


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """The children of a model's longest list of like modules.

    Transformers keep their layers in one list (`layers.0`, `layers.1`, ...); a convolutional
    network nests lists (stages of layers), and the innermost lists together are taken.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0
    ]
    longest = max(lists, key=lambda item: len(item[1]), default=None)
    if longest is None:
        return ()
    kind = type(longest[1][0])
    return tuple(
        f"{name}.{index}"
        for name, module in lists
        if all(type(child) is kind for child in module)
        for index in range(len(module))
    )


def find_stages(model: nn.Module) -> tuple[str, ...]:
    """The parts of a vision network from timm or torchvision.

    The children of the container that such networks keep their parts in, or else the parts that
    lie side by side in the model itself (`layer1`, `Mixed_7c`); parts without weights (pooling,
    activations) do not count.
    """
    modules = dict(model.named_modules())
    for path in CONTAINERS:
        if isinstance(modules.get(path), nn.Module) and len(list(modules[path].children())) > 1:
            return tuple(
                f"{path}.{name}"
                for name, child in modules[path].named_children()
                if any(True for _ in child.parameters())
            )
    return tuple(
        name
        for name, child in model.named_children()
        if sum(1 for m in child.modules() if list(m.parameters(recurse=False))) > 1
    )
