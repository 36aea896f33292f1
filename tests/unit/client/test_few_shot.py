"""Class means as a head: what a unit moves, what is charged, and that it helps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedgraft_client.data import Records
from fedgraft_client.few_shot import class_sums, noisy_prototypes
from fedgraft_client.head import LinearHead
from fedgraft_client.policy import Policy
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.runtime import Runtime
from fedgraft_client.site import Site, SiteConfig
from fedgraft_client.store import SiteStore
from fedgraft_client.task_head import start_head
from fedgraft_client.tasks import build_task
from fedgraft_common.accounting import epsilon
from fedgraft_common.adapted import adapted_backbone
from fedgraft_common.errors import PlanError
from fedgraft_common.mechanism import step_noise
from fedgraft_common.plan import Plan
from fedgraft_common.task_spec import TaskSpec


def features(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("by_unit", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_unit_moves_the_sums_by_at_most_one(by_unit: bool, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (12,), generator=generator)
    units = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3])
    own = torch.arange(12) if not by_unit else units
    shown = features(12) * scale
    whole = class_sums(shown, labels, 3, units if by_unit else None)
    moved = []
    for unit in own.unique().tolist():
        without = own != unit
        numbers = own[without].unique(return_inverse=True)[1] if by_unit else None
        less = class_sums(shown[without], labels[without], 3, numbers)
        moved.append(float((whole - less).norm()))
    assert max(moved) <= 1 + 1e-12
    assert by_unit or scale < 1e-12 or min(moved) > 0.99  # a record moves them by its own length


def test_a_unit_of_one_class_moves_them_by_one_however_many_records_it_has() -> None:
    same = torch.ones(50, 5)
    found = class_sums(same, torch.zeros(50, dtype=torch.int64), 2, torch.zeros(50).long())
    assert float(found.norm()) == pytest.approx(1)


def test_a_record_that_is_not_finite_counts_for_nothing() -> None:
    shown = features(2)
    shown[1, 0] = float("nan")
    found = class_sums(shown, torch.tensor([0, 0]), 2, None)
    assert torch.allclose(found[0], LinearHead.normalise(shown[:1]).double()[0])
    assert not found[1].any()


def test_without_noise_the_prototypes_tell_classes_apart() -> None:
    labels = torch.arange(40) % 4
    centres = 3 * features(4, 1)
    shown = centres[labels] + 0.2 * features(40, 2) + 5  # all to one side, as after a ReLU
    sums = class_sums(shown, labels, 4, None)
    rows = noisy_prototypes(sums, 0.0, NoiseSource.for_simulation("none"))
    assert torch.allclose(rows.norm(dim=1), torch.ones(4), atol=1e-5)
    right = ((LinearHead.normalise(shown) @ rows.T).argmax(dim=1) == labels).float().mean()
    assert right > 0.9


@pytest.fixture
def plan(vit_directory: Path) -> Plan:
    return Plan().replace(
        {
            "backbone.source": f"dir:{vit_directory}", "adapter.layers": "last:1",
            "head.training": "prototype", "head.start_noise": 4.0, "rounds.count": 2,
            "training.expected_batch": 8.0, "privacy.delta": 1e-3,
        }
    )  # fmt: skip


def test_the_release_is_part_of_epsilon(plan: Plan) -> None:
    step = step_noise(plan, 16, "north")
    assert step.start is not None
    assert step.event is not None
    together = epsilon([step.event, step.start], 1e-3)
    assert together == pytest.approx(step.epsilon(1e-3))
    assert 7.9 < together <= 8.0
    fixed = step_noise(plan.replace({"head.training": "fixed"}), 16, "north")
    assert fixed.event is not None
    assert step.event.noise_multiplier > fixed.event.noise_multiplier


def test_a_site_releases_them_once_and_the_ledger_says_so(plan: Plan, tmp_path: Path) -> None:
    records = Records(torch.rand(16, 1, 16, 16), torch.arange(16) % 2)
    config = SiteConfig("north", ("a", "b"), 16, simulated=True)
    store = SiteStore(tmp_path, durable=False)
    site = Site(config, records, Runtime("cpu"), store)
    step, bench = site.step(plan), site.bench(plan)
    first, second = site.start_head(plan), site.start_head(plan)
    site._start_with_means(bench, plan, step, 1, first)
    assert [(e.sample_rate, e.noise_multiplier, e.steps) for e in store.ledger.spent()] == [
        (1.0, 4.0, 1)
    ]
    site._start_with_means(bench, plan, step, 1, second)  # as after a crash: the same head
    assert len(store.ledger.spent()) == 1
    assert torch.equal(first.linear.weight, second.linear.weight)
    assert float(first.linear.weight.norm(dim=1).mean()) == pytest.approx(plan.head.scale, rel=1e-4)
    assert not any(p.requires_grad for p in first.parameters())
    store.close()


def test_it_is_in_what_a_site_says_that_joining_costs(plan: Plan, tmp_path: Path) -> None:
    records = Records(torch.rand(16, 1, 16, 16), torch.arange(16) % 2)
    store = SiteStore(tmp_path)
    plan = plan.replace({"privacy.epsilon": 4.0})
    policy = Policy(maximum_epsilon=4.0, maximum_delta=1e-3)
    site = Site(SiteConfig("north", ("a", "b"), 16), records, Runtime("cpu"), store, policy)
    cost = site.cost(plan)
    assert cost.run == pytest.approx(site.step(plan).epsilon(1e-3))
    assert (cost.rounds, cost.asked) == (2, 2)
    store.close()


def test_a_release_that_never_began_costs_nothing(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(torch.rand(16, 1, 16, 16), torch.arange(16) % 2)
    store = SiteStore(tmp_path, durable=False)
    site = Site(SiteConfig("north", ("a", "b"), 16, simulated=True), records, Runtime("cpu"), store)
    step, bench, head = site.step(plan), site.bench(plan), site.start_head(plan)

    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "features", full)
    with pytest.raises(torch.OutOfMemoryError):
        site._start_with_means(bench, plan, step, 1, head)
    assert store.ledger.spent() == []
    monkeypatch.undo()
    site._start_with_means(bench, plan, step, 1, head)
    assert [event.steps for event in store.ledger.spent()] == [1]
    store.close()


@pytest.mark.parametrize(("unit", "largest"), [("record", 8.0), ("patient", 2.0)])
def test_what_the_plan_protects_is_what_counts_as_one(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str, largest: float
) -> None:
    """16 equal images of two classes: 8 records of length 1 a class, of 4 patients in all."""
    same = torch.ones(16, 1, 16, 16)
    records = Records(same, torch.arange(16) % 2, torch.arange(16) // 4)
    store = SiteStore(tmp_path, durable=False, unit=unit)
    site = Site(SiteConfig("north", ("a", "b"), 16, simulated=True), records, Runtime("cpu"), store)
    plan = plan.replace({"privacy.unit": unit})
    seen: list[torch.Tensor] = []

    def noted(sums: torch.Tensor, sigma: float, noise: NoiseSource) -> torch.Tensor:
        seen.append(sums)
        return noisy_prototypes(sums, sigma, noise)

    monkeypatch.setattr("fedgraft_client.site.noisy_prototypes", noted)
    site._start_with_means(site.bench(plan), plan, site.step(plan), 1, site.start_head(plan))
    assert seen[0].norm(dim=1).tolist() == pytest.approx([largest, largest])
    store.close()


def test_other_tasks_have_no_class_means(plan: Plan) -> None:
    task = build_task(TaskSpec(kind="multi-label", classes=("a", "b")))
    with pytest.raises(PlanError, match="private or fixed, for multi-label"):
        start_head(plan, task, adapted_backbone(plan))
