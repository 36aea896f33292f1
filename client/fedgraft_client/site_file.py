"""`site.toml`: what a site's operator writes down once.

    name = "north"                       # how the operator calls the site; stays here
    classes = ["healthy", "ill"]         # every class of the task, in order; never from the data

    [data]
    name = "x-rays-2026"                 # one ledger for each data set
    source = "imagefolder:train"         # or csv:, dicom:, parquet:, ...; a bare path is npz
    label_map = { normal = "healthy", pneumonia = "ill" }
    unit = "patient_id"                  # what the promise protects; default: record
    nominal_size = 400                   # units, roughly; the server may learn it

    [policy]
    maximum_epsilon = 8.0

    [monitoring]                         # optional; both on 127.0.0.1 only
    metrics_port = 9464                  # Prometheus
    health_port = 9465                   # grpc.health.v1

Paths are relative to the file. Unknown keys are refused.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from fedgraft_client.policy import Policy
from fedgraft_common.errors import PolicyError
from fedgraft_common.plan import Section
from fedgraft_common.reading import SOURCES, Reading
from fedgraft_common.task_spec import TaskSpec


class Data(Reading):
    """`[data]`: the site's own records, and how they are read."""

    name: str = Field(
        default="data",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="The site's own name for this data set. Everything ever computed from it is "
        "in one ledger; a new name would start at zero and break the promise.",
    )
    source: str = Field(
        description="KIND:PATH with one of the kinds " + ", ".join(SOURCES) + "; a bare path is "
        "an npz file with arrays `images` and `labels`.",
    )
    held_out: str | None = Field(
        default=None,
        description="A source of the same form, with records of other units: what a released "
        "evaluation counts.",
    )
    unit: str = Field(
        default="record",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="What the promise protects: `record`, or the column that says whose a record "
        "is, e.g. `patient_id`.",
    )
    nominal_size: int = Field(
        ge=1,
        description="How many units the site says it has. Public; the sample rate is the plan's "
        "batch over this number, so it need not be exact, and must not be counted anew.",
    )


class Monitoring(Section):
    """`[monitoring]`: ports of 127.0.0.1 that the daemon opens for this machine."""

    metrics_port: int | None = Field(
        default=None, ge=1, le=65535, description="For Prometheus. Absent: none."
    )
    health_port: int | None = Field(
        default=None, ge=1, le=65535, description="For grpc.health.v1. Absent: none."
    )


class SiteFile(Section):
    """A site's configuration."""

    name: str = Field(
        default="site",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="How the operator calls the site.",
    )
    classes: tuple[str, ...] = Field(
        default=(),
        description="Names of the classes, in the order of the label numbers; short for "
        "`task.classes`.",
    )
    task: TaskSpec = Field(default=TaskSpec(), description="What the site predicts.")
    home: str = Field(
        default="home",
        description="Directory of the ledger, the heads and the identity; private to the site.",
    )
    witness: str | None = Field(
        default=None,
        description="File that remembers the ledger's newest entry; best on another disk. "
        "Absent: beside the ledger.",
    )
    device: str = Field(default="auto", description="`auto`, `cpu` or `cuda:N`.")
    physical_batch: int = Field(
        default=256,
        ge=1,
        description="Records whose gradients are in memory at once. Changes speed, not results.",
    )
    data: Data
    policy: Policy = Policy()
    monitoring: Monitoring = Monitoring()

    @model_validator(mode="after")
    def _classes_are_said_once(self) -> SiteFile:
        if self.classes and self.task.classes and self.classes != self.task.classes:
            raise ValueError("classes and task.classes differ; state them once")
        return self

    @property
    def spec(self) -> TaskSpec:
        """The task, with its classes."""
        return self.task.model_copy(update={"classes": self.task.classes or self.classes})

    def store_directory(self, base: Path) -> Path:
        """Where the ledger and the heads of this data set are; `base` is the file's directory."""
        return base / self.home / self.data.name

    def witness_file(self, base: Path) -> Path | None:
        """Where the ledger's witness is, if not beside it."""
        return base / self.witness if self.witness else None


def load_site_file(path: Path) -> SiteFile:
    """Reads a site file.

    Raises:
        PolicyError: missing, not TOML, or a field is wrong; names the field.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PolicyError(
            str(path), str(error), "a site file: TOML in UTF-8", "Check the path and the file."
        ) from None
    try:
        found = SiteFile.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "no such key; a misspelt rule would protect nothing"
        value = "nothing" if first["type"] == "missing" else first["input"]
        raise PolicyError(
            f"{path}: {field}", value, message, "Correct the site file and try again."
        ) from None
    classes = found.spec.classes
    if found.spec.kind == "single-label" and len(classes) < 2:
        raise PolicyError(
            f"{path}: classes", list(classes), "at least two classes",
            "List every class the task has, in order, or name another task.kind.",
        )  # fmt: skip
    if found.policy.maximum_delta >= 1 / found.data.nominal_size:
        raise PolicyError(
            f"{path}: policy.maximum_delta", found.policy.maximum_delta,
            f"less than 1/{found.data.nominal_size}, one over data.nominal_size",
            "Choose a smaller delta.",
        )  # fmt: skip
    return found
