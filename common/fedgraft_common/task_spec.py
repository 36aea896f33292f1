"""What a site predicts, as configuration: `[task]` of a site file, or of a simulation's plan.

Everything in it is public: names, ranges and cut points come from whoever designs the task, never
from a site's records.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class TaskSpec(BaseModel):
    """The task of one site; which kinds there are is known to `fedgraft_client.tasks`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: str = Field(
        default="single-label",
        pattern=r"^[a-z][a-z-]{0,31}$",
        description="single-label, multi-label, ordinal, regression, survival, tabular, "
        "sequence-to-class, token-classification, language-modelling, segmentation or detection.",
    )
    classes: tuple[str, ...] = Field(
        default=(),
        description="Names of the classes in the order of the label numbers; for `ordinal` from "
        "low to high. Every class the task has, also those without a record here.",
    )
    targets: tuple[str, ...] = Field(
        default=(), description="Names of the numbers that `regression` predicts."
    )
    low: tuple[float, ...] = Field(
        default=(),
        description="Smallest value of each target, a public constant in the target's own unit; "
        "smaller ones are taken for it.",
    )
    high: tuple[float, ...] = Field(default=(), description="Largest value of each target.")
    cuts: tuple[float, ...] = Field(
        default=(),
        description="Ends of the time intervals that `survival` tells apart, rising, in the unit "
        "of the follow-up time.",
    )
    boxes: int = Field(
        default=32, ge=1, le=512, description="Boxes of one image that `detection` looks at, most."
    )
