"""An adapter that Fedgraft wrote is an ordinary PEFT adapter, and predicts as it trained."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fedgraft_client.app import client_app
from fedgraft_client.data import Records, load_images
from fedgraft_client.predict import predict
from fedgraft_client.runtime import Runtime
from fedgraft_client.site import Site, SiteConfig
from fedgraft_client.store import SiteStore
from fedgraft_common.adapted import AdaptedBackbone
from fedgraft_common.backbone import load_backbone
from fedgraft_common.cli import main
from fedgraft_common.errors import AdapterError, CheckpointError
from fedgraft_common.plan import Adapter, Backbone, Plan
from fedgraft_server.federation import run_federation
from fedgraft_simulations.local_grid import LocalGrid

CASES = [(model, method) for model in ("vit", "resnet") for method in ("ffa-lora", "lora", "film")]


# --- without Fedgraft

STRANGER = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

torch.set_num_threads(1)
for case in json.loads(sys.argv[1]):
    model = AutoModel.from_pretrained(case["backbone"])
    model = PeftModel.from_pretrained(model, case["adapter"]).eval()
    with torch.no_grad():
        output = model(load_file(case["inputs"])["inputs"])
    kept = {"hidden": output.last_hidden_state.contiguous()}
    save_file(kept, case["outputs"])
assert not any(name.startswith("fedgraft") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def exported(
    vit_directory: Path, resnet_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states of every case: here with random adapter values, and loaded elsewhere."""
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("exported")
    here: dict[tuple[str, str], torch.Tensor] = {}
    cases = []
    for name, method in CASES:
        directory = vit_directory if name == "vit" else resnet_directory
        backbone = load_backbone(Backbone(source=f"dir:{directory}", pooling="mean"))
        model = AdaptedBackbone(backbone, Adapter(method=method, rank=2), seed=1)
        generator = torch.Generator().manual_seed(2)
        model.load(
            {n: 0.5 * torch.randn(t.shape, generator=generator) for n, t in model.state().items()}
        )
        (inputs,) = backbone.example(4, generator)
        folder = root / f"{name}-{method}"
        model.save(folder / "adapter")
        save_file({"inputs": inputs}, folder / "inputs.safetensors")
        with torch.no_grad():
            here[name, method] = model.peft(inputs).last_hidden_state
        files = {"inputs": "inputs.safetensors", "outputs": "outputs.safetensors"}
        paths = {key: str(folder / file) for key, file in files.items()}
        cases.append({"backbone": str(directory), "adapter": str(folder / "adapter")} | paths)
    code = [sys.executable, "-c", STRANGER, json.dumps(cases)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    there = [load_file(case["outputs"])["hidden"] for case in cases]
    return {key: (here[key], hidden) for key, hidden in zip(CASES, there, strict=True)}


@pytest.mark.parametrize(("model", "method"), CASES)
def test_peft_alone_gives_the_same_features(
    exported: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]], model: str, method: str
) -> None:
    here, there = exported[model, method]
    # Transformers alone takes other kernels (flash attention, MKL): float32 rounding, amplified.
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)
    other_method = "film" if method != "film" else "lora"
    assert not torch.allclose(exported[model, other_method][0], here, atol=1e-2)


# --- at home, after DP training


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished federation of two sites, and what one of them predicts while still running."""

    plan: Plan
    config: Backbone
    directory: Path
    images: Path
    sealed: Path
    expected: torch.Tensor
    engine: str


CLASSES = ("fracture", "no fracture", "unclear, repeat")


def records(seed: int) -> Records:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(30) % 3
    images = torch.rand(30, 1, 10, 12, generator=generator) / 2
    images[:, 0, 0, :] += labels[:, None] / 4
    return Records(images, labels)


@pytest.fixture(
    scope="module",
    params=[("vit", "ffa-lora", "private"), ("vit", "film", "fixed"), ("resnet", "film", "fixed")],
    ids=lambda case: "-".join(case),
)
def trained(
    request: pytest.FixtureRequest,
    vit_directory: Path,
    resnet_directory: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    model, method, head = request.param
    root = tmp_path_factory.mktemp("trained")
    source = f"dir:{vit_directory if model == 'vit' else resnet_directory}"
    plan = Plan().replace(
        {
            "backbone.source": source,
            "backbone.pooling": "cls" if model == "vit" else "auto",
            "backbone.frozen_dtype": "float32",
            "adapter.method": method,
            "adapter.layers": "last:2",
            "adapter.rank": 2,
            "head.training": head,
            "training.sample_rate": 0.5,
            "training.expected_batch": 15,
            "privacy.delta": 1e-3,
            "rounds.count": 2,
            "aggregation.sites": 2,
        }
    )
    runtime = Runtime("cpu")
    sites = [
        Site(
            SiteConfig(name, CLASSES, 30, simulated=True),
            records(number),
            runtime,
            SiteStore(root / name, durable=False),
        )
        for number, name in enumerate(("north", "south"))
    ]
    app = client_app(lambda context: sites[int(context.node_config["partition-id"])])
    adapter = run_federation(plan, LocalGrid(app, 2), root / "server", durable=False)
    bench = runtime.workbench(plan)
    head_at_home = sites[0].refit(plan, adapter)
    pixels = np.random.default_rng(9).integers(0, 256, (300, 10, 12), dtype=np.uint8)
    np.savez(root / "new.npz", images=pixels)
    features = bench.features(adapter, bench.cache(load_images(root / "new.npz")))
    bench.adapted.save(root / "warm")  # while Opacus' hooks are still attached
    return Trained(
        plan=plan,
        config=plan.backbone,
        directory=root,
        images=root / "new.npz",
        sealed=root / "north" / plan.hash / "sealed.safetensors",
        expected=head_at_home(features).softmax(dim=1),
        engine=bench.verdicts[-1].engine,
    )


def test_the_cases_cover_attached_hooks_and_their_absence(trained: Trained) -> None:
    is_vit = "vit" in trained.config.source
    assert trained.engine == ("hooks" if is_vit else "vmap")


@pytest.mark.parametrize("saved_by", ["server/adapter", "warm"])
def test_predictions_are_the_same_after_saving(trained: Trained, saved_by: str) -> None:
    adapter = trained.directory / saved_by
    found = predict(adapter, trained.sealed, load_images(trained.images))
    assert found.classes == CLASSES
    torch.testing.assert_close(found.probabilities, trained.expected, rtol=0, atol=1e-5)
    best = trained.expected.argmax(dim=1).tolist()
    assert found.labels == [CLASSES[i] for i in best]


def test_the_adapter_matters(trained: Trained, tmp_path: Path) -> None:
    model = AdaptedBackbone(load_backbone(trained.config), trained.plan.adapter, trained.plan.seed)
    model.save(tmp_path)  # untrained
    found = predict(tmp_path, trained.sealed, load_images(trained.images))
    assert not torch.allclose(found.probabilities, trained.expected, atol=1e-4)


def test_saved_names_carry_no_wrapper(trained: Trained) -> None:
    for saved_by in ("server/adapter", "warm"):
        path = trained.directory / saved_by / "adapter_model.safetensors"
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        assert names
        assert not any("_module" in name or "prefix" in name for name in names)


def run_cli(capsys: pytest.CaptureFixture[str], trained: Trained, *more: str) -> str:
    adapter, head = trained.directory / "server" / "adapter", trained.sealed
    arguments = [str(trained.images), "--adapter", str(adapter), "--head", str(head)]
    with pytest.MonkeyPatch.context() as patch:
        source = ["--backbone", trained.config.source]
        patch.setattr(sys, "argv", ["fedgraft", "predict", *arguments, *source, *more])
        with pytest.raises(SystemExit) as end:
            main()
    assert not end.value.code
    return capsys.readouterr().out


def test_command_line(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever pooling the plan chose: the operator must not need to know it."""
    rows = json.loads(run_cli(capsys, trained, "--json"))
    best = trained.expected.max(dim=1)
    assert [row["record"] for row in rows] == list(range(300))
    assert [row["label"] for row in rows] == [CLASSES[i] for i in best.indices.tolist()]
    assert [row["probability"] for row in rows] == pytest.approx(best.values.tolist(), abs=1e-5)
    table = list(csv.DictReader(io.StringIO(run_cli(capsys, trained))))
    assert [{k: str(v) for k, v in row.items()} for row in rows] == table


# --- what is refused


def test_adapter_that_is_not_there(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is a path: it must never become a name to look up on the network."""
    import huggingface_hub

    def online(*_: object, **__: object) -> None:
        raise AssertionError("looked for the adapter on the network")

    for module in ("peft.config", "peft.utils.save_and_load", "peft.peft_model"):
        monkeypatch.setattr(f"{module}.hf_hub_download", online, raising=False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", online)
    images = load_images(trained.images)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        predict(Path("nobody/nothing"), trained.sealed, images)


def test_pickled_adapter(trained: Trained, tmp_path: Path) -> None:
    config = trained.directory / "server" / "adapter" / "adapter_config.json"
    (tmp_path / "adapter_config.json").write_bytes(config.read_bytes())
    torch.save({"weight": torch.ones(1)}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=str(tmp_path)):
        predict(tmp_path, trained.sealed, load_images(trained.images))


def test_a_file_that_is_no_sealed_head(trained: Trained) -> None:
    adapter = trained.directory / "server" / "adapter"
    images = load_images(trained.images)
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        predict(adapter, trained.directory / "none.safetensors", images)
    other = trained.sealed.parents[1] / "ledger.sqlite3"
    assert other.is_file()
    with pytest.raises(CheckpointError, match=r"ledger\.sqlite3"):
        predict(adapter, other, images)
