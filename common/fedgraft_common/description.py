"""What a backbone says about itself: `manifest.json` beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fedgraft_common.errors import BackboneError
from fedgraft_common.features import Pooling


class Manifest(BaseModel):
    """Name, licence and, if they are not found by looking, the constants of the input and blocks.

    Attributes:
        preprocessing: settings of the backbone's preparation, see `fedgraft_common.preparations`;
            None takes what the model's own files say.
        blocks: modules that may carry adapters, in order.
        feature_mean, feature_std: of pooled features over the backbone's public training data.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    licence: str = "unknown"
    source: str | dict[str, Any] = "unknown"
    preprocessing: dict[str, Any] | None = None
    pooling: Pooling | None = None
    blocks: tuple[str, ...] = ()
    feature_mean: tuple[float, ...] = ()
    feature_std: tuple[float, ...] = ()


def read_manifest(directory: Path, name: str) -> Manifest:
    """The manifest in a directory, or one that knows no more than a name.

    Raises:
        BackboneError: `manifest.json` is damaged.
    """
    path = directory / "manifest.json"
    if not path.is_file():
        return Manifest(name=name)
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise first_problem(error, str(path)) from None


def first_problem(error: ValidationError, where: str, table: str = "") -> BackboneError:
    """The first thing that pydantic found wrong, as one of Fedgraft's errors."""
    first = error.errors()[0]
    field = ".".join([*([table] if table else []), *map(str, first["loc"])])
    return BackboneError(
        f"{where}: {field}" if field else where, first["input"], first["msg"],
        "Correct it, or leave it out.",
    )  # fmt: skip
