"""What a site process keeps warm between rounds: the device, the model, the checked gradients.

One `Runtime` serves every site in a process. A hospital's daemon has one site; a simulation has
thousands, which share one backbone and lend it their adapter and head for the time of a round.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from fedgraft_client.device_memory import in_chunks, limit_memory, return_freed
from fedgraft_client.gradients import CHECK_RECORDS, Engine, Verdict, choose_engine
from fedgraft_client.head import LinearHead
from fedgraft_client.prefix import Cached, Prefix
from fedgraft_client.tasks import Task
from fedgraft_common.adapted import AdaptedBackbone, adapted_backbone
from fedgraft_common.errors import PlanError
from fedgraft_common.features import FeatureKind
from fedgraft_common.fixed_point import FixedPoint, fixed_point
from fedgraft_common.messages import Tensors
from fedgraft_common.modality import Raw, count, take
from fedgraft_common.plan import Plan

CHUNK = 256  # records that go through the frozen part at once
BENCHES = 4  # models kept warm; a server that names more gets the oldest replaced
SMALL = 2_000_000  # parameters below which waking a second thread costs more than it saves
THREADS = torch.get_num_threads()
REST = 30.0  # seconds after which freed memory goes back to the system; that takes milliseconds
KERNELS: Final = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "32"}
"""Compiled kernels that oneDNN keeps (0.1 MiB each) and descriptions of matrix products that
PyTorch keeps (0.3 MiB each, per thread): the latest, where both would keep 1,024."""


class SiteModel(nn.Module):
    """The prefix' remainder and a head: a task's outputs, such as logits (N, K), of cached tensors.

    Args:
        prefix: the cut model.
        head: of a site.
        device: where it runs.
        drops: whether the first tensor it is given holds factors of the features, (N, D): dropout
            whose draws are part of the record, so that every engine sees the same ones.
        alignment: weight of the mean square of a record's features, which a backbone that states
            its public mean and spread gives in their units; above 0, the model gives outputs and
            that distance (N,).

    Attributes:
        dtype: number format of the frozen layers; the head and the adapter stay float32.
    """

    def __init__(
        self,
        prefix: Prefix,
        head: LinearHead,
        device: torch.device,
        drops: bool = False,
        alignment: float = 0.0,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.head = head.to(device)
        self.device_type = device.type
        self.dtype = torch.float32
        self._drops = drops
        self._alignment = alignment

    def forward(self, *cached: torch.Tensor) -> Any:
        """Runs the rest of the backbone, then the head."""
        factors, rest = (cached[0], cached[1:]) if self._drops else (None, cached)
        features = self.features(*rest)
        shown = features if factors is None else features * _over_places(factors, features)
        outputs: torch.Tensor = self.head(shown)
        if not self._alignment:
            return outputs
        return outputs, features.square().flatten(1).mean(dim=1)

    def answers(self, *cached: torch.Tensor) -> torch.Tensor:
        """The outputs alone."""
        found = self(*cached)
        outputs: torch.Tensor = found[0] if self._alignment else found
        return outputs

    def loss(self, task: Task) -> Callable[[Any, torch.Tensor], torch.Tensor]:
        """The loss of each record, of what the model gives: the task's, and the distance's."""
        if not self._alignment:
            return task.loss

        def both(found: Any, labels: torch.Tensor) -> torch.Tensor:
            outputs, distance = found
            loss: torch.Tensor = task.loss(outputs, labels) + self._alignment * distance
            return loss

        return both

    def features(self, *cached: torch.Tensor) -> torch.Tensor:
        """Features float32, of the kind that the head takes."""
        exact = (t.float() if t.is_floating_point() else t for t in cached)
        features: torch.Tensor = self.prefix(*exact)
        return features.float()


def _over_places(factors: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """(N, D) factors for features (N, D), (N, T, D) or (N, D, H, W): the same at every place."""
    if features.dim() == 4:
        return factors[:, :, None, None]
    return factors[:, None] if features.dim() == 3 else factors


def allow_onednn_products() -> bool:
    """Lets oneDNN multiply float32 matrices on the CPU, if it does so in float32.

    PyTorch takes MKL for float32, which leaves half the vector width of an AMD processor unused,
    and asks oneDNN only where bfloat16 would be accurate enough. Without matrix units oneDNN then
    multiplies in float32 all the same, at twice MKL's speed. With them it does not: a product is
    compared with float64, and the setting is undone.

    Returns:
        Whether oneDNN is used.
    """
    settings: Any = torch.backends.mkldnn
    before = settings.matmul.fp32_precision
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    settings.matmul.fp32_precision = "bf16"
    error = (left @ right - (left.double() @ right.double())).abs().max()
    if error < 1e-3:  # bfloat16: about 0.1
        return True
    settings.matmul.fp32_precision = before
    return False


def bound_kernels() -> None:
    """Bounds what is kept for each shape of a batch, unless the environment says otherwise.

    A Poisson sample has another size in every step, and each size needs other kernels, 3 MiB of
    them for a small model: rare sizes make a process grow for thousands of rounds. To make a kernel
    again takes 0.3 ms. Both settings are read once, at the first product or convolution.
    """
    for name, most in KERNELS.items():
        os.environ.setdefault(name, most)


class Workbench:
    """One plan's model in one process, ready to train any site's data.

    Args:
        plan: names backbone and adapter.
        device: where it runs.
        directory: where the backbone lies, if not where the plan says.
        features: what the heads take.

    Attributes:
        adapted: backbone and adapter.
        initial: the adapter that the plan's seed gives.
        prefix: the model cut before the first adapted block.
        device: where it runs.
        verdicts: how the gradient engines did, for the model in use; empty before training.
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        directory: Path | None = None,
        features: FeatureKind = "pooled",
    ) -> None:
        self.device = device
        self.adapted: AdaptedBackbone = adapted_backbone(plan, directory, features)
        self.initial = self.adapted.state()
        self.adapted.to(device)
        self.dtype = frozen_dtype(plan.backbone.frozen_dtype, device)
        size = sum(parameter.numel() for parameter in self.adapted.parameters())
        self._rested = time.monotonic()
        self._grows = device.type == "cpu" and size >= SMALL
        if device.type == "cpu":
            allow_onednn_products()
            torch.set_num_threads(1 if size < SMALL else THREADS)
        self.prefix = Prefix(self.adapted)
        self.verdicts: tuple[Verdict, ...] = ()
        self._chunk = CHUNK
        self._kind: tuple[Any, ...] | None = None
        self._trainer: tuple[SiteModel, Engine] | None = None

    def cache(self, raw: Raw) -> Cached:
        """Prepares raw records and runs the frozen prefix over them; the result is on the CPU.

        Raises:
            DataError: the records have not the form that the backbone takes.
        """
        prepare = self.adapted.backbone.prepare

        def compute(part: slice) -> Cached:
            inputs = (tensor.to(self.device) for tensor in prepare(take(raw, part)))
            return tuple(tensor.cpu() for tensor in self.prefix.compute(*inputs))

        with lower_precision(self.dtype, self.device.type):
            parts, self._chunk = in_chunks(compute, count(raw), self._chunk)
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def features(self, adapter: Tensors, cached: Cached) -> torch.Tensor:
        """Features float32 on the CPU, under an adapter, of the kind that the heads take."""
        self.adapted.load(adapter)
        model = SiteModel(self.prefix, LinearHead(self.adapted.feature_dim, 2), self.device)
        model.dtype = self.dtype

        def compute(part: slice) -> torch.Tensor:
            return model.features(*(tensor[part].to(self.device) for tensor in cached)).cpu()

        with torch.no_grad():
            parts, self._chunk = in_chunks(compute, len(cached[0]), self._chunk)
        return torch.cat(parts)

    def trainer(
        self, head: LinearHead, dropout: float = 0.0, alignment: float = 0.0
    ) -> tuple[SiteModel, Engine]:
        """The model with checked per-example gradients, its head set to the values of `head`.

        Args:
            head: of a site.
            dropout: if above 0, the model takes one more tensor, the first: factors of the
                features (N, D).
            alignment: weight of the features' distance from the backbone's public mean.

        Raises:
            GradientError: no engine is exact for this model.
            PlanError: alignment, and the backbone states no mean.
        """
        trains = any(parameter.requires_grad for parameter in head.parameters())
        kind = (head.task, type(head), head.linear.out_features, trains, dropout > 0, alignment)
        if self._trainer is None or self._kind != kind:
            self._trainer = self._checked(head, dropout > 0, alignment)
            self._kind = kind
        model, engine = self._trainer
        model.head.load_state_dict(head.state_dict())
        return model, engine

    def fixed_point(self, plan: Plan) -> FixedPoint:
        """How this adapter's gradient sums become integers in secure aggregation."""
        return fixed_point(plan, sum(math.prod(spec.shape) for spec in self.adapted.schema))

    def rest(self) -> None:
        """Gives back what the last batches took: large models on a CPU at once, others at times."""
        if self._grows or time.monotonic() - self._rested >= REST:
            return_freed()
            self._rested = time.monotonic()

    def release(self) -> None:
        """Detaches the gradient engine; the next `trainer` checks and attaches one again."""
        if self._trainer is not None:
            self._trainer[1].close()
            self._trainer = None

    def _checked(self, like: LinearHead, drops: bool, alignment: float) -> tuple[SiteModel, Engine]:
        self.release()
        public = self.adapted.backbone.manifest.feature_mean
        if alignment and (self.adapted.features != "pooled" or not public):
            raise PlanError(
                "training.alignment", alignment, "0, for this backbone states no public mean and "
                "spread of the features of this task (feature_mean, feature_std in its manifest)",
                "Set training.alignment = 0, or choose another backbone or task.",
            )  # fmt: skip
        generator = torch.Generator().manual_seed(3)
        head, task = like.like(), like.task
        nn.init.normal_(head.linear.weight, generator=generator)  # zeros would hide every error
        model = SiteModel(self.prefix, head, self.device, drops, alignment)
        example = self.adapted.backbone.example(CHECK_RECORDS, torch.Generator().manual_seed(2))
        cached = self.prefix.compute(*(tensor.to(self.device) for tensor in example))
        if drops:
            shape = (CHECK_RECORDS, self.adapted.feature_dim)
            factors = torch.rand(shape, generator=generator).gt(0.3) / 0.7
            cached = (factors.to(self.device), *cached)
        with torch.no_grad():
            labels = task.example(model.answers(*cached))
        engine, self.verdicts = choose_engine(model, cached, labels, model.loss(task))
        model.dtype = self.dtype  # checked in float32, then used in the plan's format
        return model, engine


class Runtime:
    """The device, and a workbench for each plan in use.

    Args:
        device: `auto`, `cpu` or `cuda:N`.
        physical_batch: records whose gradients are in memory at once.
        locate: fetches a plan's backbone and says where it lies; None where the plan says it.
        gpu_memory: GiB of the device that tensors may take (`policy.gpu_memory`); None for all.

    Attributes:
        physical_batch: as given, or the smaller one that the device had room for.

    Raises:
        PlanError: no such device on this machine.
        PolicyError: `gpu_memory` is more than the device has.
    """

    def __init__(
        self,
        device: str = "auto",
        physical_batch: int = 256,
        locate: Callable[[Plan], Path | None] = lambda _: None,
        gpu_memory: float | None = None,
    ) -> None:
        bound_kernels()
        self.device = choose_device(device)
        limit_memory(self.device, gpu_memory)
        self._locate = locate
        if self.device.type == "cuda":  # TF32 convolutions would fail the gradient check
            torch.backends.cudnn.allow_tf32 = False
        self.physical_batch = physical_batch
        self._benches: dict[str, Workbench] = {}

    def remember(self, physical_batch: int) -> None:
        """The device has room for this many records at once; later rounds begin with that."""
        self.physical_batch = min(self.physical_batch, physical_batch)

    def workbench(self, plan: Plan, features: FeatureKind = "pooled") -> Workbench:
        """The plan's workbench for tasks that take such features; built at the first call."""
        key = features + plan.model_dump_json(include={"seed", "backbone", "adapter"})
        if key not in self._benches:
            while len(self._benches) >= BENCHES:
                self._benches.pop(next(iter(self._benches))).release()
            self._benches[key] = Workbench(plan, self.device, self._locate(plan), features)
        return self._benches[key]


def choose_device(name: str) -> torch.device:
    """Resolves `auto`, `cpu` or `cuda:N`.

    Raises:
        PlanError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count()
    allowed = ["auto", "cpu", *(f"cuda:{i}" for i in range(count))]
    if name not in allowed:
        raise PlanError("device", name, ", ".join(allowed), "Choose a device of this machine.")
    return torch.device(name)


def frozen_dtype(name: str, device: torch.device) -> torch.dtype:
    """Number format of the frozen part: bfloat16 where the hardware multiplies it faster."""
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def lower_precision(
    dtype: torch.dtype, device_type: str
) -> contextlib.AbstractContextManager[None]:
    """Runs matrix products in bfloat16, if that is the plan's format for the frozen part."""
    if dtype is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=dtype)
