"""A run on top of an earlier one: it starts from that adapter, and old tasks are looked at again.

Shapes: none; scores are those of each old site's own task, on its own held-out records.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fedgraft_client.head import LinearHead
from fedgraft_client.refit import refit_head
from fedgraft_client.store import load_sealed
from fedgraft_common.errors import CheckpointError
from fedgraft_common.manifest import sha256_of
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan, parse_plan
from fedgraft_simulations.simulate import Measured, measured_sites, score_of
from fedgraft_simulations.sites import SimulatedSites


@dataclass(frozen=True, slots=True)
class Earlier:
    """A simulation that has ended.

    Attributes:
        plan: what ran.
        directory: of one seed of it.
    """

    plan: Plan
    directory: Path

    @property
    def adapter(self) -> Path:
        """Its adapter, in PEFT's format."""
        return self.directory / self.plan.privacy.mechanism / "adapter"


@dataclass(frozen=True, slots=True)
class Kept:
    """What is left of an old site's task.

    Attributes:
        site: its name.
        before: score with the old adapter and the sealed head.
        after: with the new adapter and the same head, which nobody touched.
        refitted: with the new adapter, the head refitted to it at home.
    """

    site: str
    before: float
    after: float
    refitted: float

    @property
    def forgotten(self) -> float:
        """How much of the score is gone, once the head was refitted."""
        return self.before - self.refitted

    def document(self) -> dict[str, Any]:
        """As it is written; a score that does not exist is null."""
        facts = {**asdict(self), "forgotten": self.forgotten}
        return {name: None if value != value else value for name, value in facts.items()}


def earlier_run(directory: Path) -> Earlier:
    """Reads what `fedgraft simulate` left in a directory; of several seeds, the first.

    Raises:
        CheckpointError: there is no finished run.
    """
    path = directory / "result.json"
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        plan = parse_plan(document["comparisons"][0]["plan"], str(path))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(
            str(path), str(error), "the result.json of a finished simulation",
            "Name its directory, e.g. runs/digits.",
        ) from None  # fmt: skip
    found = Earlier(plan, directory / f"seed-{plan.seed}")
    if not (found.adapter / "adapter_model.safetensors").is_file():
        raise CheckpointError(
            str(found.adapter), "no adapter", f"the adapter of its row {plan.privacy.mechanism}",
            "Simulate the earlier plan with this row.",
        )  # fmt: skip
    return found


def on_top_of(plan: Plan, earlier: Earlier) -> Plan:
    """The plan, starting from an earlier run's adapter."""
    digest = sha256_of(earlier.adapter / "adapter_model.safetensors")
    return plan.replace({"adapter.start": str(earlier.adapter), "adapter.start_sha256": digest})


def forgetting(earlier: Earlier, adapter: Path, device: str = "auto") -> tuple[Kept, ...]:
    """What the old sites' tasks are worth under a new adapter.

    Args:
        earlier: the run whose sites are asked again.
        adapter: the new one, in PEFT's format, for the same backbone and adapter.
        device: where features are computed.

    Raises:
        AdapterError: the new adapter is of another kind.
        CheckpointError: an old site's head is missing.
    """
    plan = earlier.plan
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for m in measured_sites(SimulatedSites(plan, Path(scratch), device), plan):
            old = m.bench.adapted.read(earlier.adapter)
            new = m.bench.adapted.read(adapter)
            folder = earlier.directory / "sites" / m.share.name / plan.hash
            head = load_sealed(folder / "sealed.safetensors").head
            own = m.bench.features(new, m.site.cached(m.bench))
            again = refit_head(own, m.site.labels(m.bench), head)
            found.append(
                Kept(
                    m.share.name,
                    _score(plan, m, head, old),
                    _score(plan, m, head, new),
                    _score(plan, m, again, new),
                )
            )
            m.site.store.close()
    return tuple(found)


def _score(plan: Plan, m: Measured, head: LinearHead, adapter: Tensors) -> float:
    features = m.bench.features(adapter, m.test)
    with torch.no_grad():
        return score_of(head.task, head(features), m.labels, plan.data.score)[1]
