"""What an operator writes, and what is said when it is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedgraft_client.opening import open_site
from fedgraft_client.site_file import load_site_file
from fedgraft_common.errors import DataError, PolicyError

GOOD = """
name = "north"
classes = ["healthy", "ill"]
[data]
name = "x-rays-2026"
source = "train.npz"
nominal_size = 12
[policy]
maximum_epsilon = 4.0
"""


def write(directory: Path, text: str = GOOD) -> Path:
    path = directory / "site.toml"
    path.write_text(text)
    return path


def save_records(path: Path, **changes: object) -> None:
    generator = np.random.default_rng(0)
    arrays: dict[str, object] = {
        "images": generator.random((12, 8, 8), dtype=np.float32),
        "labels": np.arange(12) % 2,
    }
    arrays |= changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})  # type: ignore[arg-type]


def test_a_site_is_opened_from_its_file(tmp_path: Path) -> None:
    save_records(tmp_path / "train.npz")
    site = open_site(write(tmp_path))
    try:
        assert site.config.name == "north"
        assert not site.config.simulated
        assert site.policy is not None and site.policy.maximum_epsilon == 4.0
        assert site.store.directory == tmp_path / "home" / "x-rays-2026"
        assert len(site.records) == 12
    finally:
        site.store.close()


def test_data_that_cannot_be_used_leaves_the_ledger_free(tmp_path: Path) -> None:
    save_records(tmp_path / "train.npz", labels=np.arange(12))
    for _ in range(2):
        with pytest.raises(DataError, match="labels: found 2"):
            open_site(write(tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[policy]", "[policy]\nmaximum_epsilom = 1", "policy.maximum_epsilom: found 1"),
        ("maximum_epsilon = 4.0", "maximum_epsilon = -1", "policy.maximum_epsilon: found -1"),
        ("maximum_epsilon = 4.0", "hours = '8-9'", "policy.hours: found '8-9'; allowed: two"),
        ("maximum_epsilon = 4.0", "maximum_delta = 0.1", "less than 1/12"),
        ("nominal_size = 12", "", "data.nominal_size: found 'nothing'"),
        ("nominal_size = 12", "nominal_size = 0", "data.nominal_size: found 0"),
        ('name = "x-rays-2026"', 'name = "../other"', "data.name: found '../other'"),
        ('["healthy", "ill"]', '["healthy"]', "classes: found"),
        ("[data]", "[data", "a site file: TOML"),
        ('name = "north"', "simulated = true", "simulated: found True; allowed: no such key"),
    ],
)
def test_a_wrong_site_file(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in GOOD
    with pytest.raises(PolicyError) as caught:
        load_site_file(write(tmp_path, GOOD.replace(old, new)))
    assert words in str(caught.value)
    assert "site.toml" in str(caught.value)


def test_a_missing_site_file(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="No such file"):
        load_site_file(tmp_path / "site.toml")


def test_delta_is_held_against_the_real_number_of_units(tmp_path: Path) -> None:
    save_records(tmp_path / "train.npz")
    text = GOOD.replace("nominal_size = 12", "nominal_size = 2")
    path = write(tmp_path, text.replace("maximum_epsilon = 4.0", "maximum_delta = 0.3"))
    with pytest.raises(PolicyError, match="units that the data really has"):
        open_site(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": None}, "labels: found 'no such array'"),
        ({"labels": np.array(["a"] * 12)}, "labels: found 'a'; allowed: healthy, ill"),
        ({"labels": np.zeros(12)}, "one class number per record"),
        ({"labels": np.zeros((12, 1), dtype=int)}, "one int64 class index for each record"),
        ({"images": np.zeros((12, 64), dtype=np.float32)}, "images"),
    ],
)
def test_wrong_arrays(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    save_records(tmp_path / "train.npz", **changes)
    with pytest.raises(DataError, match=words):
        open_site(write(tmp_path, GOOD))
