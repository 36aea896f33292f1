"""Time to an event, of records of which some were lost sight of before it.

Labels: (N, 2) float32: follow-up time, and 1 if the event was seen at its end, 0 if not. Outputs:
(N, J) log-odds of getting through each of J intervals, whose ends are the task's public cut
points; what happens after the last is not told apart.

Cox's partial likelihood (Cox 1972) compares each record with all others that are still at risk, so
one record's gradient holds the others, and no clipping of it bounds what one of them moves. Used
here is the discrete-time model of the same paper (section 6), a logistic hazard for each interval;
its likelihood is a product over records, which makes the loss of a record exact. A record that was
lost counts for the intervals that it got through whole (Kvamme and Borgan 2021, "Continuous and
discrete-time survival prediction with neural networks", section 3.1).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar

import torch

from fedgraft_client.head import orthogonal_prototypes
from fedgraft_client.tasks.chain import chain_loss, even_odds, reached
from fedgraft_client.tasks.reading import Labels, Written, as_word, numbers
from fedgraft_client.tasks.task import Answer, Prototype, check_form, no_count
from fedgraft_common.errors import DataError
from fedgraft_common.features import FeatureKind
from fedgraft_common.task_spec import TaskSpec


class Survival:
    """A logistic hazard for each interval.

    Args:
        spec: `cuts`.
        weights: of no meaning here.

    Raises:
        DataError: cut points that are missing, not above zero or not rising.
    """

    features: FeatureKind = "pooled"
    primary: ClassVar[str] = "concordance"
    countable: ClassVar[bool] = False
    dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, spec: TaskSpec, weights: Mapping[str, float] | None = None) -> None:
        cuts = spec.cuts
        if not cuts or cuts[0] <= 0 or any(a >= b for a, b in pairwise(cuts)):
            raise DataError(
                "task: cuts", list(cuts), "rising times above zero",
                "State the ends of the intervals, in the unit of the follow-up time.",
            )  # fmt: skip
        self.spec = spec
        self.cuts = torch.tensor(cuts)

    @property
    def outputs(self) -> int:
        """J, one for each interval."""
        return len(self.spec.cuts)

    def prototype(self, seed: int, features: int) -> Prototype:
        """One direction, from early to late, for every interval: proportional odds."""
        row = orthogonal_prototypes(seed, ("survival",), features)
        return row.repeat(self.outputs, 1), even_odds(self.outputs)

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of the intervals that a record was watched through."""
        cuts = self.cuts.to(outputs)
        time, event = labels[:, :1].to(outputs), labels[:, 1:] > 0.5
        through = time >= cuts  # got to the end of the interval
        begins = torch.cat([cuts.new_zeros(1), cuts[:-1]])
        ended_here = (time >= begins) & ~through & event
        return chain_loss(outputs, through, through | ended_here)

    def read(self, written: Written) -> Labels:
        """Two columns, time and event; the label map may say which words mean 1 and 0."""
        time, event = written.columns
        told = [v if v is None else written.names.get(as_word(v), as_word(v)) for v in event]
        return numbers([time, told])

    def check(self, labels: torch.Tensor, where: str) -> None:
        """A time above zero and 0 or 1 for each record."""
        fits = labels.dim() == 2 and labels.shape[1] == 2 and labels.dtype is torch.float32
        check_form(labels, "(records, 2) float32: follow-up time and event (0 or 1)", fits, where)
        time, event = labels.unbind(dim=1)
        wrong = ~(torch.isfinite(time) & (time > 0)) | ((event != 0) & (event != 1))
        if wrong.any():
            raise DataError(
                f"{where}: labels", labels[wrong][0].tolist(),
                "a finite time above zero, and 1 (event seen) or 0 (lost before it)",
                "Correct this record, or leave it out.",
            )  # fmt: skip

    def example(self, outputs: torch.Tensor) -> torch.Tensor:
        """Times spread over the intervals, every other record lost."""
        count = len(outputs)
        share = (torch.arange(count, device=outputs.device) + 0.5) / count
        time = share * float(self.cuts[-1]) * 1.1
        event = (torch.arange(count, device=outputs.device) + 1) % 2
        return torch.stack([time, event.to(time)], dim=1).to(outputs.dtype)

    def risk(self, outputs: torch.Tensor) -> torch.Tensor:
        """(N,) minus the expected time within the intervals: larger means earlier."""
        widths = torch.diff(self.cuts, prepend=self.cuts.new_zeros(1)).to(outputs)
        begun = torch.cat([outputs.new_ones(len(outputs), 1), reached(outputs)[:, :-1]], dim=1)
        return -(begun * widths).sum(dim=1)

    def scores(self, outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Harrell's concordance index; NaN where no two records can be compared."""
        with warnings.catch_warnings():  # torchsurv compiles with torch.jit when it is imported
            warnings.simplefilter("ignore")
            from torchsurv.metrics.cindex import ConcordanceIndex

            time, event = labels[:, 0], labels[:, 1] > 0.5
            if not (event & (time < time.max())).any():
                return {"concordance": float("nan")}
            found = ConcordanceIndex()(self.risk(outputs).float(), event, time)
        return {"concordance": float(found)}

    def correct(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """None: a record that was lost has no right answer."""
        raise no_count(self, "a record that was lost sight of has no right answer")

    def answers(self, outputs: torch.Tensor) -> list[Answer]:
        """Risk, and the probability of being free of the event after each cut point."""
        rows = zip(self.risk(outputs).tolist(), reached(outputs).tolist(), strict=True)
        return [
            {"risk": round(risk, 6)}
            | {f"free after {c:g}": round(p, 6) for c, p in zip(self.spec.cuts, row, strict=True)}
            for risk, row in rows
        ]
