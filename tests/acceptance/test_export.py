"""From two sites' real files to what they deploy, with the commands an operator types."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from peft import PeftModel
from safetensors.torch import load_file

from fedgraft_client.app import client_app
from fedgraft_client.opening import open_site
from fedgraft_common.adapted import quiet_peft
from fedgraft_common.backbone import load_backbone
from fedgraft_common.cli import group
from fedgraft_common.errors import FedgraftError
from fedgraft_common.plan import Backbone, Plan, load_plan
from fedgraft_server.federation import run_federation
from fedgraft_simulations.local_grid import LocalGrid

SITE = """
name = "{name}"
classes = ["dark", "bright"]
[data]
source = "{name}.npz"
held_out = "{name}-test.npz"
nominal_size = 60
[policy]
maximum_epsilon = 9.0
maximum_delta = 1e-3
"""
PLAN = """
name = "lamps"
[adapter]
method = "film"
layers = "last:1"
[training]
sample_rate = 0.5
expected_batch = 30
[privacy]
epsilon = 8.0
delta = 1e-3
[rounds]
count = 2
[aggregation]
sites = 2
"""


def write_records(path: Path, seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = generator.random((count, 12, 12), dtype=np.float32) / 2
    images += labels[:, None, None].astype(np.float32) / 3
    np.savez(path, images=images, labels=labels)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two sites after a run; `north` has sealed its head."""
    root = tmp_path_factory.mktemp("home")
    (root / "plan.toml").write_text(PLAN)
    (root / "about.md").write_text("Lamps of two wards, photographed in 2026.\n")
    plan = load_plan(root / "plan.toml")
    sites = []
    for number, name in enumerate(("north", "south")):
        folder = root / name
        folder.mkdir()
        write_records(folder / f"{name}.npz", number, 60)
        write_records(folder / f"{name}-test.npz", 10 + number, 40)
        (folder / "site.toml").write_text(SITE.format(name=name))
        sites.append(open_site(folder / "site.toml"))
    app = client_app(lambda context: sites[int(context.node_config["partition-id"])])
    adapter = run_federation(plan, LocalGrid(app, 2), root / "server", durable=False)
    sites[0].refit(plan, adapter)
    for site in sites:
        site.store.close()
    yield root


def plan_of(home: Path) -> Plan:
    return load_plan(home / "plan.toml")


def sealed_of(home: Path) -> str:
    return str(home / "north" / "home" / "data" / plan_of(home).hash / "sealed.safetensors")


def export(home: Path, out: str, *more: str) -> Result:
    """The command in this process: a new one needs seconds for its imports."""
    arguments = [
        "export", str(home / out), "--plan", str(home / "plan.toml"),
        "--adapter", str(home / "server" / "adapter"), "--head", sealed_of(home), *more,
    ]  # fmt: skip
    return CliRunner().invoke(group, arguments, standalone_mode=False)


def test_everything_a_site_deploys(home: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    from fedgraft_client.exporting.onnx import run_onnx

    site, about = str(home / "north" / "site.toml"), str(home / "about.md")
    formats = "peft,merged,onnx,onnx-int8"
    done = export(home, "out", "--site", site, "--about", about, "--format", formats)
    assert done.exception is None
    out = home / "out"
    assert "model card; stays at the site" in done.output
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "adapter", "merged", "model.int8.onnx", "model.onnx"
    ]  # fmt: skip

    images = np.load(home / "north" / "north-test.npz")["images"]
    np.savez(home / "new.npz", images=images)
    predicted = subprocess.run(
        [
            str(Path(sys.executable).with_name("fedgraft")), "predict", str(home / "new.npz"),
            "--adapter", str(out / "adapter"), "--head", sealed_of(home),
        ],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(predicted.stdout)))
    probabilities = [float(row["probability"]) for row in rows]

    backbone = load_backbone(plan_of(home).backbone)
    inputs = backbone.prepare(torch.from_numpy(images)[:, None])
    by_onnx = run_onnx(out / "model.onnx", inputs).softmax(dim=1)
    assert by_onnx.max(dim=1).values.tolist() == pytest.approx(probabilities, abs=1e-4)

    merged = load_backbone(Backbone(source=f"dir:{out / 'merged'}"))
    head = load_file(out / "merged" / "head.safetensors")
    with torch.no_grad():
        features = merged.features(merged.model, merged.prepare(torch.from_numpy(images)[:, None]))
        unit = torch.nn.functional.normalize(features, dim=1)
        scores = (unit @ head["linear.weight"].T + head["linear.bias"]).softmax(dim=1)
    torch.testing.assert_close(scores, by_onnx, rtol=1e-3, atol=1e-4)

    card = (out / "README.md").read_text()
    ledger = "this run, from the site's ledger | epsilon "
    assert 7.5 < float(card.split(ledger)[1].split()[0]) <= 8.0
    assert "Lamps of two wards" in card
    assert "On 40 held-out records" in card
    assert plan_of(home).hash in card


def test_what_may_leave_holds_neither_head_nor_results(home: Path) -> None:
    done = export(home, "public", "--site", str(home / "north" / "site.toml"), "--public")
    assert done.exception is None
    out = home / "public"
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "adapter"]
    card = (out / "README.md").read_text()
    assert "held-out" not in card.replace("names no held-out", "")
    assert "Left out" in card
    with quiet_peft():
        backbone = load_backbone(plan_of(home).backbone)
        PeftModel.from_pretrained(backbone.model, str(out / "adapter"))
    done = export(home, "public-2", "--public", "--format", "onnx")
    assert "the head is not" in str(done.exception)
    assert not (home / "public-2").exists()


def test_mistakes_leave_nothing_behind(home: Path) -> None:
    (home / "there").mkdir(exist_ok=True)
    (home / "other.toml").write_text(PLAN.replace("count = 2", "count = 3"))
    before = sorted(path.name for path in home.iterdir())
    for arguments, text in (
        (("there",), "something that exists"),
        (("new", "--format", "coreml"), "found 'coreml'; allowed: peft, merged, onnx, onnx-int8"),
        (("new", "--about", "gone.md"), "gone.md"),
        (("new", "--plan", str(home / "other.toml")), "as the head was sealed for"),
    ):
        done = export(home, *arguments)
        assert isinstance(done.exception, FedgraftError)
        assert text in str(done.exception)
    assert sorted(path.name for path in home.iterdir()) == before
