"""The plan, one federation run as frozen data; long, because every key is described here.

A plan is one TOML file. Every key is described below with its unit; an unknown key is an
error. The canonical form (sorted JSON without white space) has a SHA-256 hash, which names the
run everywhere: in messages, checkpoints and a site's store. `[data]`, `[sites]` and `[comparison]`
describe a simulation and are not part of the hash, so that the same plan keeps its name when it
moves to production, where sites bring their own data.

Options that only affect speed (device, physical batch size) belong to a site's runtime, not to
the plan: they must not change privacy or results.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from fedgraft_common.errors import PlanError
from fedgraft_common.reading import SOURCES, Reading
from fedgraft_common.task_spec import TaskSpec

Mechanism = Literal["local", "distributed", "none"]
Scalar = str | int | float | bool
MOST_STEPS = 100_000
LATER_KEYS: dict[str, dict[str, Any]] = {
    "backbone": {
        "manifest_sha256": None, "weights": None, "options": {}, "preprocessing": {},
        "modality": "auto",
    },
    "adapter": {"tokens": 8, "start": None, "start_sha256": None},
    "head": {"local_affine": False, "start_noise": 8.0, "prompt": "a photo of {}."},
    "training": {
        "class_weights": {}, "weight_decay": 0.0, "proximal": 0.0, "dropout": 0.0,
        "alignment": 0.0,
    },
    "privacy": {"secure_aggregation": "real"},
}  # fmt: skip
"""Keys that came later, and their defaults: a plan without them keeps the hash it had."""
LEAST_SITES = 3
"""Of the distributed mechanism: of two, each knows the other's sum."""
LATER_TABLES = ("augmentation",)
"""Tables that came later; a plan with nothing in them keeps its hash, too."""
SERVER_OPTIMIZERS = ("FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi")
STRATEGIES = (*SERVER_OPTIMIZERS, "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan")


class Section(BaseModel):
    """One table of the plan: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Backbone(Section):
    """The frozen pre-trained model."""

    source: str = Field(
        default="embedded:glyphs",
        pattern=r"^((embedded|dir|hf|timm|torchvision|cifar-resnet|tabular):.+"
        r"|server:[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})$",
        description="Where the model comes from: `embedded:NAME`, `dir:PATH` for a Hugging "
        "Face directory (config.json and model.safetensors), `hf:OWNER/NAME[@REVISION]` from the "
        "hub's cache, `timm:NAME`, `torchvision:NAME`, `cifar-resnet:DEPTH`, "
        "`tabular:WIDTHxDEPTH`, or `server:NAME` from the federation's backbone service, which "
        "needs `sha256`.",
    )
    weights: str | None = Field(
        default=None,
        description="A local safetensors file to take the weights from, by the model's own names. "
        "torchvision needs one; timm takes the hub's cache without.",
    )
    options: dict[str, Scalar | tuple[Scalar, ...]] = Field(
        default_factory=dict,
        description="Keyword arguments of the model's constructor or configuration, e.g. "
        "in_chans = 1 or img_size = 64 for timm, columns = 13 for a table.",
    )
    preprocessing: dict[str, Scalar | tuple[Scalar, ...]] = Field(
        default_factory=dict,
        description="Public constants of the input in place of the backbone's own: size, mean, "
        "std, order of an image; length of a text in tokens, of a sound in samples.",
    )
    modality: Literal["auto", "image", "text", "image-text"] = Field(
        default="auto",
        description="What a model with two towers, such as CLIP, is given; `auto` is images.",
    )
    sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of the weights file in hexadecimal. A model with another hash is "
        "refused.",
    )
    manifest_sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of the backbone's signed manifest in hexadecimal. It fixes every "
        "file, configuration and preprocessing included, not only the weights.",
    )
    pooling: Literal["auto", "pooler", "cls", "last", "mean"] = Field(
        default="auto",
        description="How the output becomes one feature vector per record. `auto` takes the "
        "manifest's choice, else the model's own pooler, else the mean over tokens; `cls` and "
        "`last` take the first and the last token.",
    )
    frozen_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Number format of the frozen part before the first adapted block. `auto` is "
        "bfloat16 on hardware with bfloat16 matrix units, else float32.",
    )

    @model_validator(mode="after")
    def _a_fetched_backbone_is_pinned(self) -> Backbone:
        if self.source.startswith("server:") and self.sha256 is None:
            raise ValueError("a server:NAME backbone needs sha256: the hash decides, not the name")
        return self


class Adapter(Section):
    """What is trained together, and the only thing that leaves a site."""

    method: str = Field(
        default="ffa-lora",
        description="`ffa-lora` (A frozen and public, B trained), `lora`, `dora`, `ia3`, `film` "
        "(scale and shift of normalisation layers), `ln-tuning` (layer normalisations only), "
        "`prompt` and `prefix` (language models), `full` (every weight of the chosen blocks), or "
        "`none`, also called `feature-extraction` (head only).",
    )
    rank: int = Field(default=8, ge=1, le=1024, description="LoRA rank r (dimensionless).")
    alpha: float = Field(
        default=16.0, gt=0, description="LoRA scaling numerator; the update is alpha/r * B A."
    )
    tokens: int = Field(
        default=8, ge=1, le=1024, description="Virtual tokens of `prompt` and `prefix`."
    )
    layers: Literal["all"] | str | tuple[str, ...] = Field(
        default="all",
        description="Blocks that carry adapters: `all`, `last:K`, or a list of block names.",
    )
    targets: Literal["auto"] | tuple[str, ...] = Field(
        default="auto",
        description="Name endings of the modules adapted inside those blocks; `auto` takes every "
        "linear and convolution layer (LoRA) or every normalisation layer (FiLM).",
    )

    start: str | None = Field(
        default=None,
        description="Directory of an earlier run's adapter in PEFT's format, for the same backbone "
        "and adapter: the run begins there instead of at zero. Every site and the server need it.",
    )
    start_sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of its adapter_model.safetensors in hexadecimal; needed with `start`.",
    )

    @field_validator("method")
    @classmethod
    def _one_name(cls, method: str) -> str:
        return "none" if method == "feature-extraction" else method

    @model_validator(mode="after")
    def _a_start_is_pinned(self) -> Adapter:
        if (self.start is None) != (self.start_sha256 is None):
            raise ValueError("start and start_sha256 go together: the hash decides, not the path")
        return self


class Head(Section):
    """The site's own output layer, which never leaves it."""

    training: Literal["private", "fixed", "prototype", "text"] = Field(
        default="fixed",
        description="During the federation: `private` trains a zero-initialised head under DP; "
        "`fixed` uses a public simplex prototype; `prototype` the site's own class means, released "
        "once with noise, which is part of epsilon; `text` the names of the classes, read by a "
        "backbone such as CLIP. Either way the site refits it at home at the end, without noise, "
        "and seals it.",
    )
    start_noise: float = Field(
        default=8.0,
        gt=0,
        description="Sigma of the release of class means (`prototype`): noise standard deviation "
        "over the sensitivity, which is 1.",
    )
    prompt: str = Field(
        default="a photo of {}.",
        pattern=r"\{\}",
        description="What is said of each class (`text`); {} stands for its name.",
    )
    local_affine: bool = Field(
        default=False,
        description="A scale and a shift for each feature that belong to the site and never leave "
        "it, as site-local normalisation (Li et al. 2021, FedBN); trained like a private head.",
    )
    scale: float = Field(
        default=4.0,
        gt=0,
        description="Norm of each class prototype of a fixed head (logits per unit of feature).",
    )


class Training(Section):
    """DP-SGD at a site."""

    expected_batch: float = Field(
        default=45.0,
        gt=0,
        description="Expected Poisson batch B in units (privacy.unit). Also the fixed, public "
        "denominator of a site's gradient sum at the server.",
    )
    sample_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Poisson sample rate q, the same at every site; the distributed mechanism "
        "needs it. If absent, q = expected_batch / the site's declared nominal size.",
    )
    local_steps: int = Field(
        default=1,
        ge=1,
        le=10_000,
        description="DP-SGD steps in a round (local mechanism and no DP). The distributed "
        "mechanism takes one step in a round.",
    )
    learning_rate: float = Field(
        default=1.0, gt=0, le=1e4, description="SGD step size of the adapter."
    )
    schedule: Literal["constant", "cosine"] = Field(
        default="cosine",
        description="How step sizes change over the rounds. `cosine` goes from full to zero, which "
        "averages noise out towards the end (De et al. 2022, section 3).",
    )
    head_learning_rate: float = Field(
        default=1.0, gt=0, le=1e4, description="SGD step size of a privately trained head."
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="Pull of adapter and private head towards where the run started, per step and "
        "unit of step size. It looks at no record.",
    )
    proximal: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="Local mechanism with several steps in a round: pull of the adapter towards "
        "where the round started, per step and unit of step size (Li et al. 2020, FedProx). It "
        "looks at no record.",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of features that a step hides from the head, drawn for each record; "
        "the check of gradients sees the same draws.",
    )
    alignment: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="Weight of each record's squared distance from the backbone's public mean "
        "features, in units of their spread; needs a backbone that states both.",
    )
    class_weights: dict[str, Annotated[float, Field(gt=0, le=1e3)]] = Field(
        default_factory=dict,
        description="Weight of a class in the loss, by name; 1 for others. Public and the plan's: "
        "counted on a site's records, weights would tell how many it has of each.",
    )


class Augmentation(Section):
    """Several views of each record, whose gradients are averaged before clipping; off by default.

    They cost no privacy. `views` turns them on; magnitudes are the largest, and each view draws
    between them and their negatives.
    """

    views: int = Field(
        default=1,
        ge=1,
        le=64,
        description="K: views of a record, itself among them; the cache grows as much. 1: none.",
    )
    flip: bool = Field(default=False, description="Images: mirror half of them left to right.")
    shift: float = Field(
        default=0.1, ge=0, le=0.5, description="Move, as a share of width, height or length."
    )
    rotate: float = Field(default=10.0, ge=0, le=180, description="Images: turn, in degrees.")
    zoom: float = Field(default=0.1, ge=0, le=0.5, description="Images: larger or smaller, share.")
    brightness: float = Field(
        default=0.1, ge=0, le=1, description="Images: added to every pixel, which is in [0, 1]."
    )
    contrast: float = Field(
        default=0.1, ge=0, le=1, description="Distance from the mean, or loudness, share."
    )
    noise: float = Field(
        default=0.0,
        ge=0,
        description="Standard deviation, in the unit of the raw record; all there is for a table.",
    )


class Privacy(Section):
    """The promise: (epsilon, delta) per site for the whole run, add or remove one unit."""

    mechanism: Mechanism = Field(
        default="local",
        description="`local`: each update is private on its own. `distributed`: noise is shared "
        "between sites and only the sum is private. `none`: no DP, for comparison.",
    )
    epsilon: float = Field(default=8.0, gt=0, description="Target epsilon of the run.")
    delta: float = Field(default=1e-5, gt=0, lt=1, description="Target delta of the run.")
    clipping_norm: float = Field(
        default=1.0,
        ge=1e-3,
        le=1e3,
        description="C: L2 bound of one unit's joint adapter and head gradient. Far outside the "
        "allowed range float32 rounding would decide, not clipping.",
    )
    unit: str = Field(
        default="record",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="What DP protects: one `record`, or all records of a site that share a value "
        "of a named column, e.g. `patient_id`. The expected batch, nominal sizes and 1/delta then "
        "count these units.",
    )
    records_per_unit: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="Records of one unit used in one step at most, chosen afresh each time; the "
        "unit's gradient is their average. It does not change epsilon. Without a column it has no "
        "meaning.",
    )
    secure_aggregation: Literal["real", "summed"] = Field(
        default="real",
        description="Distributed mechanism: `real` hides every summand behind masks, as a "
        "federation needs it; `summed` adds in the open, in a simulation only.",
    )
    tolerated_dropouts: int = Field(
        default=0, ge=0, description="Sites that may be missing from a distributed step."
    )
    tolerated_colluders: int = Field(
        default=1,
        ge=0,
        description="Sites whose noise share whoever looks at the sums may know. Every site knows "
        "its own, so with 0 the promise holds against the server and not against other sites.",
    )


class Aggregation(Section):
    """What the server does with the updates."""

    strategy: str = Field(
        default="FedAvg",
        description="A class of flwr.serverapp.strategy that needs nothing but arrays: "
        + ", ".join(STRATEGIES)
        + ". The distributed mechanism sees only a sum and takes one of the first five.",
    )
    options: dict[str, Scalar] = Field(
        default_factory=dict, description="Keyword arguments of that class, e.g. server_momentum."
    )
    sites: int | None = Field(
        default=None,
        ge=1,
        description="Number of sites in the run; a simulation takes sites.count. The distributed "
        "mechanism divides the noise by it, so it is part of what a site agrees to.",
    )
    minimum_sites: int = Field(
        default=2, ge=1, description="Updates needed to complete a round; fewer stop the run."
    )


class Evaluation(Section):
    """Numbers of correct predictions that may leave, with noise; off by default."""

    every: int = Field(
        default=0,
        ge=0,
        description="Rounds between released evaluations, the last round always among them. 0: "
        "no number leaves. A site's policy must agree, too.",
    )
    noise_multiplier: float = Field(
        default=8.0,
        gt=0,
        description="Sigma of one release: noise standard deviation divided by the sensitivity "
        "sqrt(2) of a site's (correct, total). The cost is part of privacy.epsilon.",
    )


class Rounds(Section):
    """How long the run lasts."""

    count: int = Field(default=60, ge=1, le=100_000, description="Number of rounds.")
    deadline: float = Field(
        default=3600.0, gt=0, description="Seconds to wait for the updates of one round."
    )


class SimulatedTask(TaskSpec):
    """A task and the columns of the source that hold its answers."""

    label: str | tuple[str, ...] | None = Field(
        default=None, description="The column or columns of its labels; absent: `data.label`."
    )
    label_map: dict[str, str] = Field(
        default_factory=dict, description="As `data.label_map`, for this task."
    )

    @property
    def spec(self) -> TaskSpec:
        """The task alone."""
        return TaskSpec.model_validate(self.model_dump(exclude={"label", "label_map"}))


class Data(Reading):
    """Simulation only: which records, and what each site is asked to predict."""

    source: str = Field(
        default="sklearn:digits",
        pattern=r"^(sklearn:digits|(" + "|".join(SOURCES) + r"):.+)$",
        description="`sklearn:digits`, or KIND:PATH with one of the kinds "
        + ", ".join(SOURCES)
        + ". A path is relative to the directory where the simulation is started.",
    )
    test: str | None = Field(
        default=None,
        pattern=r"^(" + "|".join(SOURCES) + r"):.+$",
        description="Records of the same form that every site is measured on. Absent: each site "
        "holds `test_fraction` of its own back.",
    )
    test_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="Share of each site's records held out for testing."
    )
    split: str | None = Field(
        default=None,
        description="Column that says `train` or `test` of each record. Absent: drawn from the "
        "seed.",
    )
    classes: tuple[str, ...] = Field(
        default=(),
        description="Names of the classes of the source, in order. Absent: the label numbers that "
        "occur, which only a simulation may look at.",
    )
    label_sets: dict[str, tuple[tuple[int | str, ...], ...]] = Field(
        default_factory=dict,
        description="Named groupings of the source's labels into classes, e.g. "
        "odd-even = [[1,3,5,7,9],[0,2,4,6,8]]; by number, or by name where `classes` has names.",
    )
    tasks: dict[str, SimulatedTask] = Field(
        default_factory=dict,
        description="Named tasks, given to the sites by `sites.tasks`; for anything but telling "
        "classes apart.",
    )
    score: str = Field(
        default="",
        description="Which score the table compares, e.g. AUC. Empty, or unknown to a site's "
        "task: the task's own.",
    )


class Sites(Section):
    """Simulation only: how the records are spread over sites."""

    count: int = Field(default=16, ge=1, le=100_000, description="Number of sites.")
    partitioner: str = Field(
        default="IidPartitioner", description="A class of flwr_datasets.partitioner."
    )
    options: dict[str, Scalar] = Field(
        default_factory=dict,
        description="Keyword arguments of the partitioner; num_partitions, partition_by and seed "
        "are filled in where it takes them.",
    )
    partition_by: str = Field(
        default="label",
        description="Column that the partitioner looks at; with NaturalIdPartitioner, each of its "
        "values is a site.",
    )
    label_sets: tuple[str, ...] = Field(
        default=(),
        description="Names from data.label_sets, given to the sites in turn; empty: every site "
        "predicts all labels of the source.",
    )
    tasks: tuple[str, ...] = Field(
        default=(),
        description="Names from data.tasks, given to the sites in turn; empty: every site tells "
        "classes apart.",
    )


class Comparison(Section):
    """Simulation only: what the other rows of the table change, so that each is at its best."""

    local: dict[str, Scalar] = Field(
        default_factory=dict,
        description="Dotted keys and values for the row with the local mechanism, whose noise is "
        "larger and wants smaller steps, e.g. { 'training.learning_rate' = 0.5 }.",
    )
    distributed: dict[str, Scalar] = Field(
        default_factory=dict, description="The same for the distributed mechanism."
    )
    none: dict[str, Scalar] = Field(default_factory=dict, description="The same without DP.")

    @model_validator(mode="after")
    def _promise_stays(self) -> Comparison:
        for key in (*self.local, *self.distributed, *self.none):
            if key.partition(".")[0] not in ("training", "aggregation"):
                raise ValueError(
                    f"{key!r}: only keys of [training] and [aggregation] may differ between rows, "
                    "or the rows would not make the same promise"
                )
        return self


class Plan(Section):
    """One federation run. See the module's docstring."""

    name: str = Field(
        default="digits", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="Name of the run."
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="Public seed of the initial adapter and of fixed heads. A simulation derives "
        "its partition and its reproducible noise from it as well.",
    )
    backbone: Backbone = Backbone()
    adapter: Adapter = Adapter()
    head: Head = Head()
    training: Training = Training()
    augmentation: Augmentation = Augmentation()
    privacy: Privacy = Privacy()
    aggregation: Aggregation = Aggregation()
    rounds: Rounds = Rounds()
    evaluation: Evaluation = Evaluation()
    data: Data = Data()
    sites: Sites = Sites()
    comparison: Comparison = Comparison()

    @model_validator(mode="after")
    def _mechanism_and_strategy_agree(self) -> Plan:
        if (
            self.privacy.mechanism == "distributed"
            and self.aggregation.strategy not in SERVER_OPTIMIZERS
        ):
            raise ValueError(
                f"aggregation.strategy={self.aggregation.strategy!r} needs every site's update, "
                "but the distributed mechanism reveals only their sum; use one of "
                f"{', '.join(SERVER_OPTIMIZERS)}, or privacy.mechanism='local'"
            )
        if self.privacy.mechanism == "distributed" and self.training.local_steps != 1:
            raise ValueError(
                f"training.local_steps={self.training.local_steps} does not go with the "
                "distributed mechanism, which takes one step in a round; use 1"
            )
        if self.privacy.mechanism == "distributed" and self.training.sample_rate is None:
            raise ValueError(
                "training.sample_rate is missing: with the distributed mechanism every site must "
                "compute the same noise, so the plan states the sample rate"
            )
        if self.training.proximal and self.training.local_steps == 1:
            raise ValueError(
                f"training.proximal={self.training.proximal:g} does nothing with one step in a "
                "round, which starts where it is drawn back to; use training.weight_decay, or 0"
            )
        pull = self.training.weight_decay + self.training.proximal
        if pull * max(self.training.learning_rate, self.training.head_learning_rate) > 1:
            raise ValueError(
                f"training.weight_decay + proximal = {pull:g} times the step size is more than 1: "
                "a step would go beyond where it is drawn to; lower one of them"
            )
        if self.steps > MOST_STEPS:
            raise ValueError(
                f"{self.steps} steps (rounds.count * training.local_steps) are more than "
                f"{MOST_STEPS}, the most that are accounted in one run"
            )
        if self.adapter.method == "none" and self.privacy.mechanism == "distributed":
            raise ValueError(
                "adapter.method='none' leaves nothing to aggregate; use an adapter, or stay alone"
            )
        if self.adapter.method == "none" and self.head.training != "private":
            raise ValueError(
                f"adapter.method='none' with head.training={self.head.training!r} leaves nothing "
                "to train"
            )
        sites, needed = self.aggregation.sites, self.aggregation.minimum_sites
        if sites is not None and needed > sites:
            raise ValueError(
                f"aggregation.minimum_sites={needed} is more than the {sites} sites of the run"
            )
        if self.privacy.mechanism == "distributed" and sites is not None and sites < LEAST_SITES:
            raise ValueError(
                f"aggregation.sites={sites} is too few for the distributed mechanism, which needs "
                f"at least {LEAST_SITES}: of two, each knows the other's sum; wait for more sites, "
                "or use privacy.mechanism='local'"
            )
        for name in self.sites.label_sets:
            if name not in self.data.label_sets:
                raise ValueError(
                    f"sites.label_sets names {name!r}, which data.label_sets does not define; "
                    f"defined: {', '.join(self.data.label_sets) or 'none'}"
                )
        for name in self.sites.tasks:
            if name not in self.data.tasks:
                raise ValueError(
                    f"sites.tasks names {name!r}, which data.tasks does not define; defined: "
                    f"{', '.join(self.data.tasks) or 'none'}"
                )
        if self.sites.tasks and self.sites.label_sets:
            raise ValueError(
                "sites.tasks and sites.label_sets both say what the sites predict; use one"
            )
        return self

    @property
    def secure(self) -> bool:
        """Whether sites send masked integers, of which only the sum can be read."""
        return self.privacy.mechanism == "distributed" and (
            self.privacy.secure_aggregation == "real"
        )

    @property
    def steps(self) -> int:
        """T: DP-SGD steps of the whole run, the number that is accounted."""
        return self.rounds.count * self.training.local_steps

    def evaluates(self, number: int) -> bool:
        """Whether noised counts are released after a round."""
        every = self.evaluation.every if self.privacy.mechanism != "none" else 0
        last = self.rounds.count
        return every > 0 and 1 <= number <= last and (number % every == 0 or number == last)

    @property
    def evaluations(self) -> int:
        """How many released evaluations the whole run has."""
        return sum(map(self.evaluates, range(1, self.rounds.count + 1)))

    def step_scale(self, number: int) -> float:
        """Factor on every step size in a round: 1 at the first round of either schedule."""
        if self.training.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (number - 1) / self.rounds.count))

    @property
    def noise_shares(self) -> int:
        """h: how many noise shares are certain to be in a distributed sum (PRIVACY.md).

        Raises:
            PlanError: the number of sites is unknown, or nobody is left to add noise.
        """
        sites = self.aggregation.sites
        lost = self.privacy.tolerated_dropouts + self.privacy.tolerated_colluders
        if sites is None or sites - lost < 1:
            raise PlanError(
                "aggregation.sites", sites, f"more than {lost}, the dropouts and colluders",
                "State how many sites take part; noise is shared between them.",
            )  # fmt: skip
        return sites - lost

    @cached_property
    def canonical(self) -> str:
        """The plan as sorted JSON without white space, without the simulation's tables."""
        document = self.model_dump(mode="json", exclude={"data", "sites", "comparison"})
        for section, keys in LATER_KEYS.items():
            for key, default in keys.items():
                if document[section][key] == default:
                    del document[section][key]
        for table in LATER_TABLES:
            if getattr(self, table) == type(getattr(self, table))():
                del document[table]
        return json.dumps(document, sort_keys=True, separators=(",", ":"))

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical form, in hexadecimal."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    def replace(self, changes: Mapping[str, Any]) -> Plan:
        """A copy with dotted keys changed, validated again.

        Args:
            changes: dotted key to value, e.g. `{"privacy.epsilon": 2}`.

        Raises:
            PlanError: an unknown key, or a value outside its range.
        """
        document = self.model_dump(mode="json")
        for key, value in changes.items():
            _assign(document, key, value)
        return parse_plan(document, origin="plan")


def _assign(document: dict[str, Any], key: str, value: object) -> None:
    *tables, leaf = key.split(".")
    table = document
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise PlanError(key, value, "a key inside a table of the plan", "Check its spelling.")
    table[leaf] = value


def parse_plan(document: Mapping[str, Any], origin: str) -> Plan:
    """Validates a plan that was read from `origin` (a file name, or a message).

    Raises:
        PlanError: names the first wrong field, its value and what is allowed.
    """
    try:
        return Plan.model_validate(document)
    except ValidationError as error:
        raise _explain(error, origin) from None


def _explain(error: ValidationError, origin: str) -> PlanError:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "plan"
    if first["type"] == "extra_forbidden":
        section: type[BaseModel] = Plan
        for part in first["loc"][:-1]:
            annotation = section.model_fields[str(part)].annotation
            if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
                break
            section = annotation
        allowed = "one of " + ", ".join(sorted(section.model_fields))
        return PlanError(f"{origin}: {field}", first["input"], allowed, "Remove or rename the key.")
    value = first["input"] if first["loc"] else "a plan that contradicts itself"
    message = first["msg"].removeprefix("Value error, ")
    return PlanError(f"{origin}: {field}", value, message, "Correct the value and try again.")


def load_plan(path: Path, overrides: Iterable[str] = ()) -> Plan:
    """Reads a plan file.

    Args:
        path: a TOML file, or a canonical plan (`.json`).
        overrides: `dotted.key=value` strings, the value in TOML syntax (a bare word is a string).

    Raises:
        PlanError: the file is missing or not TOML, or a field is wrong.
    """
    try:
        read = json.loads if path.suffix == ".json" else tomllib.loads
        document = read(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(str(path), "no such file", "a TOML file", "Check the path.") from None
    except (OSError, ValueError) as error:
        raise PlanError(str(path), str(error), "TOML in UTF-8", "Correct the file.") from None
    for override in overrides:
        key, value = parse_override(override)
        _assign(document, key, value)
    return parse_plan(document, origin=str(path))


def parse_override(text: str) -> tuple[str, object]:
    """Splits `privacy.epsilon=2` into a dotted key and a TOML value.

    Raises:
        PlanError: there is no `=` or no key.
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise PlanError(
            "--set", text, "KEY=VALUE, e.g. privacy.epsilon=2", "Write it in that form."
        )
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()
