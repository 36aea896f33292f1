"""What the benchmarks compare must be the same work; their timings are not tested."""

from __future__ import annotations

import io
import json
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import ServerApp
from rich.console import Console
from transformers import ViTConfig, ViTModel

from fedgraft_client.randomness import NoiseSource
from fedgraft_common.adapted import adapted_backbone
from fedgraft_common.messages import Status, read_status, to_record
from fedgraft_common.packing import pack
from fedgraft_common.plan import Plan
from fedgraft_simulations.benchmarks import (
    digits_vit,
    echo_site,
    federation_overhead,
    glyph_vit,
    idle_site,
    peer,
    prefix_cache,
    round_overhead,
    secure_noise,
    soak,
    thousand_sites,
)
from fedgraft_simulations.benchmarks.__main__ import Name
from fedgraft_simulations.benchmarks.measure import Ratio, Report, Way, alternate
from fedgraft_simulations.local_grid import LocalGrid, local_context
from fedgraft_simulations.partition import partition


def test_a_ratio_is_one_of_medians() -> None:
    ratio = Ratio("step", Way("whole", (8.0, 1.0, 6.0)), Way("cached", (2.0, 50.0, 1.0)), 2.5)
    assert ratio.value == 3.0


def test_a_report_is_data_and_a_table() -> None:
    ratio = Ratio("step", Way("whole", (6.0,), {"accuracy": 0.5}), Way("cached", (0.002,)), 2.5)
    report = Report("name", "title", (ratio,), {"memory, GB": 1.25}, ("a note",))
    document = json.loads(json.dumps(report.document()))
    assert document["ratios"][0]["ratio"] == pytest.approx(3000)
    assert document["ratios"][0]["slow"]["facts"] == {"accuracy": 0.5}
    console = Console(record=True, width=120, file=io.StringIO())
    report.show(console)
    text = console.export_text()
    for expected in ("3e+03x", "2.5x", "2 ms", "accuracy 0.500", "1.25", "a note"):
        assert expected in text


def test_rows_are_a_table() -> None:
    report = Report("name", "title", rows=({"round": 1.0}, {"round": 2.0, "MiB": 71.25}))
    console = Console(record=True, width=120, file=io.StringIO())
    report.show(console)
    text = console.export_text()
    assert all(word in text for word in ("round", "MiB", "nan", "71.25"))
    assert report.document()["rows"][1]["MiB"] == 71.25


def test_growth_is_a_slope_once_everything_is_warm() -> None:
    samples = [
        soak.Sample(n, 0.0, {"server": 100 * min(n, 20) + 3 * n}, {"server": 7}, {}, {"logs": n})
        for n in range(10, 110, 10)
    ]
    for what, name, slope in (("memory", "server", 3000), ("handles", "server", 0),
                              ("disk", "logs", 1000)):  # fmt: skip
        [(found, value)] = soak.growth(samples, what)
        assert found == name
        assert value == pytest.approx(slope, abs=1e-6)


def test_ways_are_run_in_alternate_order() -> None:
    order: list[str] = []

    def way(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = alternate([lambda: way("a"), lambda: way("b")], repetitions=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == [(1.0, 4.0, 5.0), (2.0, 3.0, 6.0)]


def test_growing_keeps_the_function() -> None:
    def vit(layers: int) -> ViTModel:
        config = ViTConfig(
            hidden_size=12, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
            image_size=8, patch_size=4, num_channels=1,
        )  # fmt: skip
        return ViTModel(config, add_pooling_layer=False).eval()

    torch.manual_seed(0)
    small, large = vit(2), vit(6)
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        before = large(images).last_hidden_state
        glyph_vit.grow(small, large)
        expected, found = small(images).last_hidden_state, large(images).last_hidden_state
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(before, expected)


def test_the_vit_is_made_once(tmp_path: Path) -> None:
    made = glyph_vit.glyph_vit(tmp_path, steps=0)
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    assert glyph_vit.glyph_vit(tmp_path, steps=0) == made
    assert (made / "model.safetensors").stat().st_mtime_ns == stamp
    model = adapted_backbone(Plan().replace({"backbone.source": f"dir:{made}"}))
    assert len(model.blocks) == glyph_vit.LAYERS
    assert model.feature_dim == glyph_vit.HIDDEN


@pytest.mark.parametrize(("method", "layers"), [("lora", "last:2"), ("none", "all")])
def test_cached_and_whole_step_have_the_same_gradients(
    vit_directory: Path, method: str, layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_cache, "SIZE", 16)
    plan = Plan().replace(
        {
            "backbone.source": f"dir:{vit_directory}",
            "backbone.frozen_dtype": "float32",
            "backbone.pooling": "mean",  # the fixture was saved without a pooler
            "adapter.method": method,
            "adapter.layers": layers,
            "head.training": "private",
        }
    )
    cpu = torch.device("cpu")
    cached = prefix_cache.Step(plan, cpu, batch=6, whole=False)
    whole = prefix_cache.Step(plan, cpu, batch=6, whole=True)
    assert (cached.door, whole.door) == ("layers.2" if method == "lora" else "features", "inputs")
    for here, there in zip(cached.parameters, whole.parameters, strict=True):
        assert here.grad is not None and there.grad is not None  # one step was taken
        torch.testing.assert_close(here.grad, there.grad, atol=1e-5, rtol=1e-4)


def test_secure_and_plain_noise_differ_in_nothing_but_the_draw(
    vit_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same step, same parameters, noise of the same deviation on every value."""
    monkeypatch.setattr(prefix_cache, "SIZE", 16)
    monkeypatch.setattr(secure_noise, "glyph_vit", lambda cache, steps: vit_directory)
    change = {"backbone.pooling": "mean"}  # the fixture was saved without a pooler
    plan = secure_noise.lora_plan(vit_directory, "float32").replace(change)
    monkeypatch.setattr(secure_noise, "lora_plan", lambda backbone, dtype: plan)
    cpu = torch.device("cpu")
    step = prefix_cache.Step(plan, cpu, batch=6, whole=False)
    step.noise = silent = secure_noise.PlainNoise(cpu)
    monkeypatch.setattr(silent, "gaussian", lambda shape, std: torch.zeros(shape))
    step.run()
    exact = [p.grad.clone() for p in step.parameters if p.grad is not None]
    assert len(exact) == len(step.parameters)
    for noise in (NoiseSource.for_simulation("test"), secure_noise.PlainNoise(cpu)):
        step.noise = noise
        step.run()
        pairs = zip(step.parameters, exact, strict=True)
        drawn = torch.cat([(p.grad - e).flatten() for p, e in pairs if p.grad is not None])
        assert float(drawn.std()) == pytest.approx(1.0, abs=0.05)  # noise_std of the step
    report = secure_noise.measure(repetitions=1, batch=6, cache=tmp_path, steps=1)
    assert report.figures["trained values"] == drawn.numel()
    assert 0 < report.figures["drawing it alone, % of the step"] < 100
    (ratio,) = report.ratios
    assert (len(ratio.slow.seconds), len(ratio.fast.seconds)) == (1, 1)
    assert ratio.target == pytest.approx(1 / 0.95)


def test_every_benchmark_is_in_the_list() -> None:
    assert "secure_noise" in list(Name)
    for name in Name:
        assert callable(import_module(f"fedgraft_simulations.benchmarks.{name}").measure)


def test_the_echo_site_follows_the_protocol(vit_directory: Path, tmp_path: Path) -> None:
    plan = Plan().replace(
        {
            "backbone.source": f"dir:{vit_directory}",
            "adapter.method": "lora",
            "privacy.mechanism": "none",
            "rounds.count": 2,
            "sites.count": 3,
        }
    )
    engine = round_overhead.Engine("in-process", plan, tmp_path, round_overhead.in_process)
    assert engine.run() > 0
    start = adapted_backbone(plan).state()
    assert len(engine.total) == len(engine.later) == 1
    for name, tensor in engine.adapter.items():
        torch.testing.assert_close(tensor, start[name])  # the mean of equal replies


def test_the_networked_echo_sends_something_new_from_every_site_in_every_round() -> None:
    """What is equal would not travel: Flower addresses objects by their hash."""
    seen = set()
    for node in (3, 4):
        context = local_context(0, 1)
        context.node_id = node
        for number in (1, 2):
            grid = LocalGrid(echo_site.app, 1)
            plan = ConfigRecord({"plan": "{}", "round": number})
            adapter = to_record({"a": torch.zeros(3), "b": torch.ones(2, 2)})
            content = RecordDict({"adapter": pack(adapter), "plan": plan})
            message = grid.create_message(content, "train", 1, "")
            reply = echo_site.app(message, context)
            assert read_status(reply) is Status.OK
            seen.add(reply.content.array_records["adapter"]["package"].data)
    assert len(seen) == 4


def test_the_stock_way_has_its_own_apps() -> None:
    [text] = federation_overhead.bundle("flower_app").values()
    named = tomllib.loads(text.decode())["tool"]["flwr"]["app"]["components"]
    module, _, name = named["serverapp"].partition(":")
    assert isinstance(getattr(import_module(module), name), ServerApp)
    module, _, name = named["clientapp"].partition(":")
    assert getattr(import_module(module), name) is echo_site.app


def test_an_idle_site_counts_what_it_carries() -> None:
    traffic = idle_site.Traffic()
    request = httpx.Request("POST", "https://server/", content=b"four", headers={"a": "bc"})
    answer = httpx.Response(200, content=b"answer")
    send = traffic.watched(lambda client, context, **_: answer)
    headers = sum(len(name) + len(value) + 4 for name, value in request.headers.raw)
    for _ in range(2):
        assert send(None, SimpleNamespace(request=request), stream=True) is answer
    assert traffic.totals == [2 * (headers + 4), 12, 2]


def test_a_small_crowd_of_sites_runs_in_one_process(resnet_directory: Path, tmp_path: Path) -> None:
    thousand_sites.write_images(tmp_path / "images.npz", 60)
    plan = thousand_sites.crowd_plan(
        tmp_path, sites=3, rounds=2, records=20, mechanism="distributed",
        backbone=f"dir:{resnet_directory}",
    )  # fmt: skip
    figures = thousand_sites.run(plan, tmp_path / "run")
    assert figures["child processes"] == 0
    assert 0 < figures["a later round, s"] < 60


def test_both_sides_of_the_digits_job_see_the_same_records_and_settings(
    vit_directory: Path, tmp_path: Path
) -> None:
    plan = digits_vit.common_plan(vit_directory)
    digits_vit.write_data(plan, tmp_path)
    task = digits_vit.peer_task(plan, "last:4", tmp_path)
    assert task.layers == [8, 9, 10, 11]
    shares = partition(plan)
    assert sum(len(s.train) + len(s.test) for s in shares) == 1797
    for site, share in enumerate(shares):
        images, labels = peer.load_data(task, site, "train").tensors
        assert np.array_equal(labels.numpy(), share.train.labels.numpy())
        assert images.shape[1:] == (1, 16, 16)
        steps = -(-len(labels) // task.batch)  # batches of the peer's Poisson loader in an epoch
        assert steps == plan.training.local_steps
        assert plan.training.sample_rate == pytest.approx(1 / steps)
    assert plan.training.schedule == "constant"
    assert plan.privacy.clipping_norm == task.clipping_norm
    assert plan.training.learning_rate == task.learning_rate


def test_a_short_ledger_is_timed() -> None:
    from fedgraft_simulations.benchmarks import long_ledger

    report = long_ledger.measure(repetitions=3, events=60)
    assert set(report.figures) == {
        "open and check (s)", "first dry run (s)", "warm dry run (ms)",
        "reservation on the disk (ms)", "verify with two accountants (s)",
    }  # fmt: skip
    assert all(value > 0 for value in report.figures.values())
