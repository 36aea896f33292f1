"""A run on top of an earlier one: where it starts, and what the old tasks have lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedgraft_common.adapted import adapted_backbone
from fedgraft_common.errors import AdapterError, CheckpointError, PlanError
from fedgraft_common.plan import Plan
from fedgraft_simulations.comparison import Study
from fedgraft_simulations.continual import earlier_run, forgetting, on_top_of
from fedgraft_simulations.simulate import simulate
from fedgraft_simulations.table import forgetting_table


@pytest.fixture
def plan(resnet_directory: Path) -> Plan:
    return Plan().replace(
        {
            "name": "old", "backbone.source": f"dir:{resnet_directory}", "adapter.method": "lora",
            "adapter.layers": "last:1", "privacy.mechanism": "none", "rounds.count": 2,
            "sites.count": 2, "data.test_fraction": 0.8, "training.sample_rate": 0.5,
            "training.learning_rate": 5.0, "aggregation.sites": 2,
        }
    )  # fmt: skip


def run(plan: Plan, directory: Path) -> Path:
    study = Study((simulate(plan, directory / "seed-0", ("none",), device="cpu"),))
    (directory / "result.json").write_text(json.dumps(study.document()))
    return directory


def test_a_new_run_starts_where_the_old_one_ended_and_says_what_was_lost(
    plan: Plan, tmp_path: Path
) -> None:
    earlier = earlier_run(run(plan, tmp_path / "old"))
    odd = {"odd": [[1, 3, 5, 7, 9], [0, 2, 4, 6, 8]]}
    changes = {"name": "new", "seed": 7, "data.label_sets": odd, "sites.label_sets": ["odd"]}
    new = on_top_of(plan.replace(changes), earlier)
    start, old = adapted_backbone(new), adapted_backbone(earlier.plan)
    ended = old.read(earlier.adapter)
    assert all(torch.equal(start.state()[name], tensor) for name, tensor in ended.items())
    images = old.backbone.example(2, torch.Generator().manual_seed(0))
    old.load(ended)
    with torch.no_grad():  # what was drawn from the old seed came along
        assert torch.allclose(start(*images), old(*images), atol=1e-6)

    simulate(new, tmp_path / "new" / "seed-7", ("none",), device="cpu")
    adapter = tmp_path / "new" / "seed-7" / "none" / "adapter"
    kept = forgetting(earlier, adapter, "cpu")
    assert [one.site for one in kept] == ["branch-00", "branch-01"]
    document = json.loads((tmp_path / "old" / "result.json").read_text())
    measured = document["comparisons"][0]["rows"][0]["refit"]
    assert [one.before for one in kept] == pytest.approx(measured)
    assert any(one.after != one.before for one in kept)
    same = forgetting(earlier, earlier.adapter, "cpu")
    assert all(one.before == one.after for one in same)
    assert forgetting_table(plan, kept).row_count == 3


def test_the_hash_decides_which_adapter_it_is(plan: Plan, tmp_path: Path) -> None:
    adapted_backbone(plan).save(tmp_path / "adapter")
    changes = {"adapter.start": str(tmp_path / "adapter"), "adapter.start_sha256": "0" * 64}
    with pytest.raises(AdapterError, match=f"sha256 {'0' * 64}, pinned by adapter.start_sha256"):
        adapted_backbone(plan.replace(changes))
    with pytest.raises(PlanError, match="go together"):
        plan.replace({"adapter.start": "somewhere"})


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the result\.json of a finished simulation"):
        earlier_run(tmp_path)
