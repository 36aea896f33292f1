"""Weight decay, the proximal term, dropout with matched draws, alignment, and the site's affine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fedgraft_client.gradients import ENGINES, Loop
from fedgraft_client.head import initial_head
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.runtime import Runtime, Workbench
from fedgraft_client.task_head import start_head
from fedgraft_client.tasks import build_task
from fedgraft_client.training import train_round
from fedgraft_common.errors import PlanError
from fedgraft_common.mechanism import StepNoise
from fedgraft_common.messages import Tensors
from fedgraft_common.plan import Plan
from fedgraft_common.task_spec import TaskSpec

IMAGES = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 2


def step(plan: Plan, start: Tensors | None = None, bench: Workbench | None = None) -> Tensors:
    """One local step without clipping or noise."""
    bench = bench or Runtime("cpu").workbench(plan)
    head = initial_head(plan, ("a", "b"), bench.adapted.feature_dim)
    return train_round(
        bench, plan, 1, start or bench.initial, head, bench.cache(IMAGES), LABELS,
        StepNoise(1.0, 1e3, 0.0, 0.0, None), NoiseSource.for_simulation("decay"), 64,
    )  # fmt: skip


def test_weight_decay_draws_back_to_where_the_run_started(plan: Plan) -> None:
    bench = Runtime("cpu").workbench(plan)
    away = {name: tensor + 0.1 for name, tensor in bench.initial.items()}
    plain = step(plan, away)
    decayed = step(
        plan.replace({"training.weight_decay": 0.5, "training.learning_rate": 1.0}), away
    )
    for name, tensor in plain.items():  # lr 1, decay .5, distance .1
        assert torch.allclose(tensor - decayed[name], torch.full_like(tensor, 0.05), atol=1e-5)


def test_the_proximal_term_draws_back_to_where_the_round_started(plan: Plan) -> None:
    """The second step is the free one less 0.9 of what the first has moved."""
    plan = plan.replace({"head.training": "fixed"})
    away = {n: t + 0.1 for n, t in Runtime("cpu").workbench(plan).initial.items()}
    two = plan.replace({"training.local_steps": 2})
    once, free = step(plan, away), step(two, away)
    held = step(two.replace({"training.proximal": 0.9}), away)
    assert any(not torch.allclose(once[name], away[name], atol=1e-3) for name in away)
    for name, tensor in away.items():
        assert torch.allclose(held[name], free[name] - 0.9 * (once[name] - tensor), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"training.proximal": 0.1}, "does nothing with one step in a round"),
        ({"training.weight_decay": 0.6, "training.learning_rate": 2.0}, "more than 1"),
    ],
)
def test_pulls_that_make_no_sense(changes: dict[str, object], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        Plan().replace(changes)


def test_every_engine_sees_the_same_dropout(plan: Plan) -> None:
    bench = Runtime("cpu").workbench(plan)
    head = initial_head(plan, ("a", "b"), bench.adapted.feature_dim)
    model, chosen = bench.trainer(head, dropout=0.5)
    assert bench.verdicts[-1].exact
    torch.nn.init.normal_(model.head.linear.weight, generator=torch.Generator().manual_seed(1))
    factors = torch.rand(6, bench.adapted.feature_dim).gt(0.5) / 0.5
    cached = (factors, *bench.cache(IMAGES))
    chosen.close()

    def rows(make: type) -> torch.Tensor:
        engine = make(model)
        engine(cached, LABELS)
        found = [p.grad_sample.flatten(1) for p in bench.adapted.adapter.values()]  # type: ignore[attr-defined]
        engine.close()
        return torch.cat(found, dim=1)

    truth = rows(Loop)
    for make in ENGINES:
        assert torch.allclose(rows(make), truth, atol=1e-5)  # type: ignore[arg-type]
    hidden = (factors == 0).sum()
    assert 0 < hidden < factors.numel()
    with torch.no_grad():
        features = model.features(*cached[1:])
        assert torch.allclose(model(*cached), model.head(features * factors))


def test_dropout_is_drawn_afresh_each_step_and_not_at_home(plan: Plan) -> None:
    plan = plan.replace({"head.training": "fixed"})
    dropped = plan.replace({"training.dropout": 0.5})
    one, two = flat(step(dropped)), flat(step(dropped.replace({"training.local_steps": 2})))
    assert not torch.equal(flat(step(plan)), one)
    assert not torch.allclose(two, 2 * one, rtol=1e-2)
    bench = Runtime("cpu").workbench(dropped)
    cached = bench.cache(IMAGES)
    assert torch.equal(bench.features(bench.initial, cached), bench.features(bench.initial, cached))


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def test_alignment_needs_public_statistics(plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"training\.alignment: found 0\.5; allowed: 0, for this"):
        step(plan.replace({"training.alignment": 0.5}))


def test_alignment_draws_features_to_the_backbones_mean(
    plan: Plan, vit_directory: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(vit_directory, tmp_path / "vit")
    width = Runtime("cpu").workbench(plan).adapted.feature_dim
    prepare = {"channels": 1, "size": 16, "mean": [0.5], "std": [0.5]}
    about = {"name": "vit", "preprocessing": prepare,
             "feature_mean": [0.3] * width, "feature_std": [2.0] * width}  # fmt: skip
    (directory / "manifest.json").write_text(json.dumps(about))
    plan = plan.replace({"backbone.source": f"dir:{directory}", "training.local_steps": 5,
                         "training.learning_rate": 1.0})  # fmt: skip

    def distance(weight: float) -> float:
        bench = Runtime("cpu").workbench(plan)
        adapter = step(plan.replace({"training.alignment": weight}), bench=bench)
        assert bench.verdicts[-1].exact
        return float(bench.features(adapter, bench.cache(IMAGES)).square().mean())

    assert distance(1.0) < distance(0.0)


@pytest.mark.parametrize("training", ["private", "fixed"])
def test_the_sites_own_affine_is_trained_and_stays(plan: Plan, training: str) -> None:
    own = plan.replace({"head.local_affine": True, "head.training": training})
    bench = Runtime("cpu").workbench(own)
    task = build_task(TaskSpec(classes=("a", "b")))
    head = start_head(own, task, bench.adapted)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    sent = train_round(
        bench, own, 1, bench.initial, head, bench.cache(IMAGES), LABELS,
        StepNoise(1.0, 1.0, 0.01, 0.01, None), NoiseSource.for_simulation("affine"), 64,
    )  # fmt: skip
    assert set(sent) == {spec.name for spec in bench.adapted.schema}
    moved = {n for n, p in head.named_parameters() if not torch.equal(p, before[n])}
    affine = {"affine.weight", "affine.bias"}
    assert moved == affine | ({"linear.weight", "linear.bias"} if training == "private" else set())
    assert bench.verdicts[-1].exact
    features = bench.features(bench.initial, bench.cache(IMAGES))
    fresh = start_head(own, task, bench.adapted)
    plain = start_head(own.replace({"head.local_affine": False}), task, bench.adapted)
    with torch.no_grad():
        assert torch.allclose(fresh(features), plain(features), atol=1e-6)


def test_an_old_plan_keeps_its_hash() -> None:
    """Keys and tables that came later are not in the canonical form while they say nothing."""
    assert not {"weight_decay", "dropout", "augmentation", "local_affine"} & set(
        json.loads(Plan().canonical)["training"] | json.loads(Plan().canonical)
    )
    assert Plan().hash != Plan().replace({"training.weight_decay": 0.1}).hash
    assert Plan().hash != Plan().replace({"augmentation.views": 2}).hash
