"""A backbone with its adapter: the model that a plan describes.

Built the same way by the server (for the schema, the initial adapter and the export) and by a
site (to train). The initial adapter is a function of the plan alone, so a site can derive it and
need not trust anyone for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fedgraft_common.adapters import AdapterMethod, find_method
from fedgraft_common.backbone import Backbone, load_backbone
from fedgraft_common.errors import AdapterError
from fedgraft_common.features import FeatureKind
from fedgraft_common.manifest import sha256_of
from fedgraft_common.messages import Tensors, TensorSpec
from fedgraft_common.plan import Adapter, Plan

NORMALISATIONS_WITH_STATE = (nn.modules.batchnorm._BatchNorm,)


class AdaptedBackbone(nn.Module):
    """The frozen backbone with the plan's adapter, mapping prepared inputs to features.

    Args:
        features: what the task's head gets: `pooled` (N, D), `tokens` (N, T, D) or `map`
            (N, D, H, W).

    Attributes:
        adapter: the trained parameters by their PEFT name; these, and only these, travel.
        blocks: names of the backbone's blocks in order.
        adapted_blocks: those of them that carry an adapter.
        feature_dim: length D of a feature vector.
        features: as given.
    """

    def __init__(
        self, backbone: Backbone, adapter: Adapter, seed: int, features: FeatureKind = "pooled"
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.blocks = backbone.blocks
        self.features = features
        self.adapted_blocks: tuple[str, ...] = ()
        self.peft: nn.Module = backbone.model
        self.adapter: dict[str, nn.Parameter] = {}
        if adapter.method != "none":
            self._attach(find_method(adapter.method), adapter, seed)
        self.set_modes()
        self.feature_dim = self._width(adapter)

    def _width(self, adapter: Adapter) -> int:
        """Length of a feature vector; a network that cannot run with the adapter is found here."""
        example = self.backbone.example(2, torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                return int(self(*example).shape[2 if self.features == "tokens" else 1])
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            if not self.adapter:
                raise
            raise AdapterError(
                "adapter.method", adapter.method,
                f"a method that runs in every chosen block; {str(error).splitlines()[0]}",
                "Choose other blocks, other targets or another method.",
            ) from error  # fmt: skip

    def _attach(self, method: AdapterMethod, adapter: Adapter, seed: int) -> None:
        from peft import get_peft_model

        blocks = choose_blocks(adapter.layers, self.blocks)
        targets = choose_targets(self.backbone.model, blocks, adapter, method)
        self.adapted_blocks = tuple(
            block for block in blocks if any(_inside(t, block) for t in targets)
        )
        config = method.config(adapter, targets)
        if method.place == "model":
            _describe(config, self.backbone.model)
        try:
            with quiet_peft():
                self.peft = get_peft_model(self.backbone.model, config)
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
            raise AdapterError(
                "adapter.method", adapter.method,
                f"a method that PEFT has for {type(self.backbone.model).__name__} "
                f"({str(error).splitlines()[0]})", "Choose another method or other targets.",
            ) from None  # fmt: skip
        for name, parameter in self.peft.named_parameters():
            parameter.requires_grad_(method.trains(name))
            if method.random(name):
                _draw(parameter, seed, name)
            if parameter.requires_grad:
                self.adapter[name.replace(".default.", ".")] = parameter
        if method.place == "model":
            self._check_prompt(adapter)
        else:
            _check_places(self.adapter, self.adapted_blocks, adapter)

    def _check_prompt(self, adapter: Adapter) -> None:
        """Some models cannot take tokens or keys in front of their own, and some ignore them."""
        example = self.backbone.example(1, torch.Generator().manual_seed(0))
        own = self.state()
        problem = "with this model PEFT's prompts have no effect"
        try:
            with torch.no_grad():
                before = self.backbone.features(self.peft, example)
                self.load({name: value + 1 for name, value in own.items()})
                if not torch.equal(before, self.backbone.features(self.peft, example)):
                    return
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            problem = f"this model cannot run with it: {str(error).splitlines()[0]}"
        finally:
            self.load(own)
        raise AdapterError(
            "adapter.method", adapter.method, f"a method that suits the backbone; {problem}",
            "Choose another method.",
        )  # fmt: skip

    def set_modes(self) -> None:
        """Eval mode everywhere (no dropout, frozen statistics), but for trained leaf modules.

        Opacus' hooks only fire on modules in train mode. A BatchNorm in train mode would use the
        private batch's statistics, so it stays in eval; then the hooks stay silent and the
        gradient check picks another exact method. A module with parts of its own may draw dropout
        for them by its own mode (attention does), so it stays in eval, too.
        """
        self.eval()
        for module in self.peft.modules():
            trained = any(p.requires_grad for p in module.parameters(recurse=False))
            leaf = next(module.children(), None) is None
            stateful = isinstance(module, NORMALISATIONS_WITH_STATE)
            module.training = trained and leaf and not stateful

    @property
    def schema(self) -> tuple[TensorSpec, ...]:
        """The tensors that travel, in name order."""
        return tuple(
            TensorSpec(name, tuple(self.adapter[name].shape)) for name in sorted(self.adapter)
        )

    def state(self) -> Tensors:
        """A copy of the adapter on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.adapter.items()}

    def load(self, tensors: Tensors) -> None:
        """Sets the adapter, in place, so that optimisers and hooks keep their parameters."""
        with torch.no_grad():
            for name, parameter in self.adapter.items():
                parameter.copy_(tensors[name])

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Features of prepared inputs (`Backbone.prepare`), float32."""
        return self.backbone.features(self.peft, inputs, self.features)

    def save(self, directory: Path) -> None:
        """Writes the adapter in PEFT's own format; `PeftModel.from_pretrained` reads it."""
        save: Any = self.peft
        for config in save.peft_config.values():  # not the path on this machine
            config.base_model_name_or_path = self.backbone.manifest.name
        with quiet_peft():
            save.save_pretrained(directory, save_embedding_layers=False)

    def read(self, directory: Path) -> Tensors:
        """The adapter that `save` wrote, by schema name.

        Raises:
            AdapterError: it cannot be read, or is for another plan or backbone.
        """
        path = directory / "adapter_model.safetensors"
        names = self._saved_names()
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise AdapterError(
                str(path), str(error).splitlines()[0], "an adapter in PEFT's format",
                "Name the adapter directory of the run.",
            ) from None  # fmt: skip
        for spec in self.schema:
            saved = names[spec.name]
            shape = tuple(found[saved].shape) if saved in found else "missing"
            if shape != spec.shape:
                raise AdapterError(
                    f"{path}: {spec.name}", shape, str(spec.shape),
                    "It belongs to another plan or backbone; name the adapter of this run.",
                )  # fmt: skip
        return {spec.name: found[names[spec.name]].float() for spec in self.schema}

    def begin_at(self, directory: Path, sha256: str) -> None:
        """Starts from an earlier run's adapter, what was drawn for it included.

        Args:
            directory: in PEFT's format.
            sha256: of adapter_model.safetensors, hexadecimal.

        Raises:
            AdapterError: it cannot be read, is for another plan or backbone, or is another file.
        """
        from peft import set_peft_model_state_dict

        path = directory / "adapter_model.safetensors"
        found = sha256_of(path) if path.is_file() else "no such file"
        if found != sha256:
            raise AdapterError(
                str(path), found, f"sha256 {sha256}, pinned by adapter.start_sha256",
                "Copy the adapter of the earlier run here, or correct the plan.",
            )  # fmt: skip
        self.read(directory)  # says in its own words what does not fit
        with quiet_peft():
            set_peft_model_state_dict(self.peft, load_file(path))
        self.set_modes()

    def _saved_names(self) -> dict[str, str]:
        """What PEFT calls each tensor of the schema in its file."""
        from peft import get_peft_model_state_dict

        if not self.adapter:
            return {}
        with quiet_peft():
            saved = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        places = {tensor.data_ptr(): name for name, tensor in saved.items()}
        if len(saved) == len(self.adapter) == 1:  # a prompt is saved as what it computes
            return dict(zip(self.adapter, saved, strict=True))
        return {name: places[p.data_ptr()] for name, p in self.adapter.items()}


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Silences two messages: BatchNorm is "unsupported" (see film.py), and a renamed property."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        yield


def adapted_backbone(
    plan: Plan, directory: Path | None = None, features: FeatureKind = "pooled"
) -> AdaptedBackbone:
    """The model that a plan describes, with its initial adapter.

    Args:
        plan: any.
        directory: where its backbone lies, if not where the plan says; see `load_backbone`.
        features: what the head of the site's task gets.

    Raises:
        BackboneError: the backbone cannot be loaded.
        AdapterError: the adapter does not fit it, or `adapter.start` is not what the plan pins.
    """
    backbone = load_backbone(plan.backbone, directory)
    model = AdaptedBackbone(backbone, plan.adapter, plan.seed, features)
    if plan.adapter.start is not None and plan.adapter.start_sha256 is not None:
        model.begin_at(Path(plan.adapter.start), plan.adapter.start_sha256)
    return model


def choose_blocks(layers: str | tuple[str, ...], blocks: tuple[str, ...]) -> tuple[str, ...]:
    """Resolves `all`, `last:K` or a list of names against a backbone's blocks.

    Raises:
        AdapterError: K is out of range, or a name is not a block.
    """
    allowed = f"all, last:1 to last:{len(blocks)}, or names from: {', '.join(blocks)}"
    if layers == "all":
        return blocks
    if isinstance(layers, str):
        kind, _, count = layers.partition(":")
        if kind != "last" or not count.isdigit() or not 1 <= int(count) <= len(blocks):
            raise AdapterError("adapter.layers", layers, allowed, "Correct the plan.")
        return blocks[-int(count) :]
    for name in layers:
        if name not in blocks:
            raise AdapterError("adapter.layers", name, allowed, "Correct the plan.")
    return tuple(block for block in blocks if block in layers)


def choose_targets(
    model: nn.Module, blocks: tuple[str, ...], adapter: Adapter, method: AdapterMethod
) -> list[str]:
    """Full names of the modules that get an adapter.

    Raises:
        AdapterError: nothing in those blocks matches, or single modules are named for a method
            that is not attached to modules.
    """
    if method.place != "modules":
        if adapter.targets != "auto":
            raise AdapterError(
                "adapter.targets", adapter.targets, f"auto: {method.name} is not attached to "
                "single modules", "Leave it out; adapter.layers chooses blocks.",
            )  # fmt: skip
        return list(blocks) if method.place == "blocks" else []
    suitable = [
        name
        for name, module in model.named_modules()
        if method.suits(module) and any(_inside(name, block) for block in blocks)
    ]
    if adapter.targets == "auto":
        chosen = suitable
    else:
        wanted = adapter.targets
        chosen = [n for n in suitable if any(n == w or n.endswith("." + w) for w in wanted)]
    if not chosen:
        endings = sorted({name.rpartition(".")[2] for name in suitable})
        raise AdapterError(
            "adapter.targets", adapter.targets,
            f"auto, or endings of {method.name} modules in the chosen blocks: "
            + (", ".join(endings) or "none, this backbone has no module that suits"),
            "Correct adapter.targets, adapter.layers or adapter.method.",
        )  # fmt: skip
    return chosen


def _describe(config: Any, model: Any) -> None:
    """Tells PEFT the sizes of a language model, whatever their names in its configuration."""
    about = getattr(model, "config", None)
    for name, key in (
        ("token_dim", "hidden_size"), ("num_layers", "num_hidden_layers"),
        ("num_attention_heads", "num_attention_heads"),
    ):  # fmt: skip
        value = getattr(about, key, None)
        if getattr(config, name, None) is None and isinstance(value, int):
            setattr(config, name, value)


def _check_places(
    trained: dict[str, nn.Parameter], blocks: tuple[str, ...], adapter: Adapter
) -> None:
    """PEFT matches names by their ending; a module elsewhere must not be trained by accident."""
    for name in trained:
        inner = name.removeprefix("base_model.model.")
        if not any(_inside(inner, block) for block in blocks):
            raise AdapterError(
                "adapter.targets", inner, "modules inside the chosen blocks only: "
                + ", ".join(blocks), "Choose other blocks or targets; two names end alike.",
            )  # fmt: skip


def _inside(name: str, block: str) -> bool:
    return name == block or name.startswith(block + ".")


def _draw(parameter: nn.Parameter, seed: int, name: str) -> None:
    """Kaiming-uniform values (PEFT's choice for A) that depend on the plan's seed and the name."""
    digest = hashlib.sha256(f"fedgraft adapter {seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = math.sqrt(1 / parameter[0].numel())
    with torch.no_grad():
        parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
