"""A network for tables, from a public seed or from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedgraft_common.architectures.tabular_network import TabularNetwork
from fedgraft_common.backbone import Backbone, load_backbone
from fedgraft_common.errors import BackboneError, DataError
from fedgraft_common.plan import Backbone as Config


def load(**changes: Any) -> Backbone:
    config = {"source": "tabular:16x2", "options": {"columns": 3}} | changes
    return load_backbone(Config.model_validate(config))


def features(backbone: Backbone, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return backbone.features(backbone.model, backbone.prepare(rows))


def test_every_process_draws_the_same_network() -> None:
    rows = torch.randn(4, 3)
    torch.manual_seed(1)
    one = load()
    torch.manual_seed(2)
    assert torch.equal(features(one, rows), features(load(sha256=one.sha256), rows))
    assert one.blocks == ("blocks.0", "blocks.1")
    assert load(source="tabular:16x3").sha256 != one.sha256
    with pytest.raises(BackboneError, match=r"backbone\.sha256"):
        load(sha256="0" * 64)


def test_columns_are_in_the_plan_s_units() -> None:
    rows = torch.tensor([[60.0, 1.0, 200.0]])
    plain = load()
    scaled = load(preprocessing={"mean": [50, 0, 180], "std": [10, 1, 40]})
    expected = features(plain, torch.tensor([[1.0, 1.0, 0.5]]))
    assert torch.allclose(features(scaled, rows), expected, atol=1e-6)


def test_features_are_of_one_size_whatever_the_depth() -> None:
    """He's rule keeps the stream's scale, so the last normalisation has something to work on."""
    for shape in ("8x1", "64x8"):
        found = features(load(source=f"tabular:{shape}"), torch.randn(50, 3))
        torch.testing.assert_close(found.mean(dim=1), torch.zeros(50), rtol=0, atol=1e-4)
        torch.testing.assert_close(found.std(dim=1), torch.ones(50), rtol=0.1, atol=0)


def test_weights_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(3)
    own = TabularNetwork(3, 16, 2)
    save_file(own.state_dict(), tmp_path / "t.safetensors")
    rows = torch.randn(4, 3)
    with torch.no_grad():
        assert torch.equal(features(load(weights=str(tmp_path / "t.safetensors")), rows), own(rows))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"source": "tabular:big"}, "WIDTHxDEPTH"),
        ({"source": "tabular:9999x2"}, "WIDTHxDEPTH"),
        ({"options": {}}, "number of columns"),
        ({"options": {"columns": 0}}, "number of columns"),
        ({"options": {"columns": True}}, "number of columns"),
        ({"preprocessing": {"mean": [1, 2]}}, "preprocessing: .*one per column"),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(BackboneError, match=text):
        load(**changes)


def test_another_number_of_columns_is_refused() -> None:
    with pytest.raises(DataError, match="found '4 columns'; allowed: 3"):
        load().prepare(torch.zeros(2, 4))
