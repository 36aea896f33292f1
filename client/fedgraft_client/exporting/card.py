"""A model card (Mitchell et al. 2019) in Markdown: promise, plan, data, results at home, limits.

Nothing in it is measured by itself: the description of the data is the site's own text, results
are computed from held-out records without noise, and stay at the site with the card.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgraft_client.scores import Score
from fedgraft_common.backbone import Backbone
from fedgraft_common.mechanism import against
from fedgraft_common.plan import Plan
from fedgraft_common.task_spec import TaskSpec

TEMPLATE = "model_card.md.j2"


@dataclass(frozen=True, slots=True)
class Spent:
    """What the site's ledger says.

    Attributes:
        epsilon: of this run at this site.
        lifetime: of everything that was ever computed from the data set.
        delta: both are for.
        unit: what is protected.
    """

    epsilon: float
    lifetime: float
    delta: float
    unit: str


@dataclass(frozen=True, slots=True)
class Results:
    """How good the sealed head's answers are on a site's held-out records.

    Attributes:
        records: how many.
        scores: with intervals.
    """

    records: int
    scores: Sequence[Score]


def model_card(
    plan: Plan,
    backbone: Backbone,
    task: TaskSpec,
    files: Mapping[str, str],
    about: str = "",
    spent: Spent | None = None,
    results: Results | None = None,
    public: bool = False,
) -> str:
    """The card.

    Args:
        plan: of the run.
        backbone: that was adapted.
        task: of the site's head.
        files: name to what it is, in the order to list them.
        about: the site's own description of its data, Markdown.
        spent: from the ledger; None names the plan's target instead.
        results: None says that there are none.
        public: whether everything beside the card may leave the site.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - Markdown, and the texts are the operator's own
    )
    preparation: Any = backbone.preparation
    return environment.get_template(TEMPLATE).render(
        plan=plan,
        backbone=backbone,
        preparation=preparation.model_dump(mode="json", exclude={"directory"}),
        task=task,
        files=files,
        about=about.strip(),
        spent=spent,
        results=results,
        public=public,
        up=_rounded_up,
        against=against(plan),
        honest=(plan.aggregation.sites or 0)
        - plan.privacy.tolerated_dropouts
        - plan.privacy.tolerated_colluders,
    )


def _rounded_up(epsilon: float) -> str:
    """Two digits, never less than it is."""
    return f"{math.ceil(epsilon * 100 - 1e-9) / 100:.2f}"
