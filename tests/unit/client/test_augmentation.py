"""Views of a record: a function of that record alone, and averaged before clipping."""

from __future__ import annotations

import pytest
import torch

from fedgraft_client.augmentation import check_views, views
from fedgraft_client.head import initial_head
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.runtime import Runtime
from fedgraft_client.training import train_round
from fedgraft_common.errors import PlanError
from fedgraft_common.mechanism import StepNoise
from fedgraft_common.plan import Augmentation, Plan

ALL = Augmentation(
    views=4, flip=True, shift=0.2, rotate=15, zoom=0.1, brightness=0.1, contrast=0.2, noise=0.01
)
STILL = Augmentation(views=2, shift=0, rotate=0, zoom=0)
RECORDS = {
    "image": torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)),
    "audio": torch.randn(3, 50, generator=torch.Generator().manual_seed(0)),
    "series": torch.randn(3, 50, 2, generator=torch.Generator().manual_seed(0)),
    "tabular": torch.randn(3, 7, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("modality", list(RECORDS))
def test_the_first_view_is_the_record_and_the_others_are_not(modality: str) -> None:
    raw = RECORDS[modality]
    found = views(raw, ALL, 0, modality)
    assert isinstance(found, torch.Tensor)
    found = found.unflatten(0, (3, 4))
    assert torch.equal(found[:, 0], raw)
    for k in range(1, 4):
        assert not torch.isclose(found[:, k], raw).all(dim=tuple(range(1, raw.dim()))).any()
    assert not torch.equal(found[:, 1], found[:, 2])


@pytest.mark.parametrize("modality", list(RECORDS))
def test_views_do_not_depend_on_the_other_records(modality: str) -> None:
    """Take one record away, and those of the others stay: else clipping would bound nothing."""
    raw = RECORDS[modality]
    whole, less = views(raw, ALL, 0, modality), views(raw[1:], ALL, 0, modality)
    assert isinstance(whole, torch.Tensor)
    assert isinstance(less, torch.Tensor)
    assert torch.equal(whole[4:], less)
    other = views(raw, ALL, 1, modality)
    assert isinstance(other, torch.Tensor)
    assert not torch.equal(whole, other)


def test_images_stay_images() -> None:
    found = views(RECORDS["image"], ALL, 0, "image")
    assert isinstance(found, torch.Tensor)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_a_shift_moves_and_fills_with_silence() -> None:
    still = Augmentation(views=2, shift=0.3, contrast=0.0)
    moved = views(RECORDS["audio"] + 5, still, 3, "audio")
    assert isinstance(moved, torch.Tensor)
    for record, view in zip(moved[::2], moved[1::2], strict=True):
        places = int((view == 0).sum())
        assert 0 < places <= 15
        kept = (record[places:], view[:-places]) if view[0] else (record[:-places], view[places:])
        assert torch.equal(*kept)


def test_texts_have_no_views() -> None:
    with pytest.raises(PlanError, match=r"augmentation\.views: found 4; allowed: 1 for text"):
        views(["a"], ALL, 0, "text")


def test_labels_that_say_where_things_are_forbid_moving_them() -> None:
    check_views(ALL, "image", "pooled", "single-label")
    check_views(STILL, "image", "map", "segmentation")
    check_views(Augmentation(), "text", "map", "segmentation")  # off
    with pytest.raises(PlanError, match=r"augmentation\.flip: found True; allowed: nothing that"):
        check_views(ALL, "image", "map", "segmentation")


def test_one_line_turns_them_on_where_they_have_a_meaning() -> None:
    found = views(RECORDS["image"], Augmentation(views=2), 0, "image")
    assert isinstance(found, torch.Tensor)
    assert not torch.isclose(found[1::2], found[::2]).all(dim=1).any()
    with pytest.raises(PlanError, match=r"nothing makes views of tabular records differ: augm"):
        check_views(Augmentation(views=2), "tabular", "pooled", "single-label")


def gradient(
    plan: Plan, count: int, units: torch.Tensor | None = None, **changes: object
) -> dict[str, torch.Tensor]:
    """What one distributed step without noise sums up."""
    plan = plan.replace({"privacy.mechanism": "distributed", "aggregation.sites": 3, **changes})
    bench = Runtime("cpu").workbench(plan)
    head = initial_head(plan, ("a", "b"), bench.adapted.feature_dim)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(1))
    raw = views(RECORDS["image"], plan.augmentation, plan.seed, "image")
    return train_round(
        bench, plan, 1, bench.initial, head, bench.cache(raw), torch.tensor([0, 1, 1]),
        StepNoise(1.0, 0.05, 0.0, 0.0, None), NoiseSource.for_simulation("views"), count, units,
        views=plan.augmentation.views,
    )  # fmt: skip


@pytest.mark.parametrize("by_patient", [False, True])
def test_views_are_averaged_before_clipping(plan: Plan, by_patient: bool) -> None:
    """Against the definition: each view's gradient alone, the average of a unit's, clipped."""
    four = plan.replace({"augmentation": ALL.model_dump()})
    bench = Runtime("cpu").workbench(four)
    head = initial_head(four, ("a", "b"), bench.adapted.feature_dim)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(1))
    model, engine = bench.trainer(head)
    cached = bench.cache(views(RECORDS["image"], ALL, 0, "image"))
    engine(cached, torch.tensor([0, 1, 1]).repeat_interleave(4))
    names = [*bench.adapted.adapter.values(), *model.head.parameters()]
    rows = torch.cat([p.grad_sample.flatten(1) for p in names], dim=1).view(3, 4, -1)  # type: ignore[attr-defined]
    means = rows.mean(dim=1)
    if by_patient:  # the first two records are one patient's
        means = torch.stack([means[:2].mean(dim=0), means[2]])
        four = four.replace({"privacy.unit": "patient"})
    assert bool((means.norm(dim=1) > 0.05).all())  # so that clipping acts
    clipped = (means * (0.05 / means.norm(dim=1, keepdim=True)).clamp(max=1)).sum(dim=0)
    found = gradient(four, 64, torch.tensor([0, 0, 1]))
    summed = torch.cat([found[name].flatten() for name in bench.adapted.adapter])
    assert torch.allclose(summed, clipped[: len(summed)], atol=1e-5)


def test_the_physical_batch_changes_nothing(plan: Plan) -> None:
    four = plan.replace({"augmentation": ALL.model_dump()})
    one, other = gradient(four, 64), gradient(four, 3)  # less than a record's views
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
