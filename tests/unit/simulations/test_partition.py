from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr_datasets import partitioner
from sklearn.datasets import load_digits

from fedgraft_client.data import Records
from fedgraft_common.errors import DataError, PlanError, PrivacyError
from fedgraft_common.plan import Plan, parse_plan
from fedgraft_simulations.partition import Share, load_source, partition
from fedgraft_simulations.simulate import simulate
from fedgraft_simulations.sites import SimulatedSites

IID: dict[str, Any] = {"partitioner": "IidPartitioner"}


def plan(
    data: dict[str, Any] | None = None, sites: dict[str, Any] | None = None, seed: int = 0
) -> Plan:
    document = {"seed": seed, "data": data or {}, "sites": sites or {}}
    return parse_plan(document, origin="test")


def archive(directory: Path, **arrays: Any) -> str:
    path = directory / "data.npz"
    np.savez(path, **arrays)
    return f"npz:{path}"


def pixels(records: Records) -> torch.Tensor:
    assert isinstance(records.inputs, torch.Tensor)
    return records.inputs


def fingerprints(shares: list[Share]) -> list[bytes]:
    """Every record of every site: its pixels and its label."""
    return [
        image.numpy().tobytes() + bytes([int(label)])
        for share in shares
        for records in (share.train, share.test)
        for image, label in zip(pixels(records), records.labels, strict=True)
    ]


# --- spreading


@pytest.mark.parametrize(
    "sites",
    [
        {"count": 16, "partitioner": "DirichletPartitioner", "options": {"alpha": 1.0}},
        {"count": 5} | IID,
        {"count": 4, "partitioner": "LinearPartitioner"},
        {
            "count": 4,
            "partitioner": "PathologicalPartitioner",
            "options": {"num_classes_per_partition": 5},
        },
    ],
    ids=lambda sites: str(sites.get("partitioner", "default")),
)
def test_every_record_is_at_one_site_once(sites: dict[str, Any]) -> None:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    expected = [
        image.numpy().tobytes() + bytes([int(label)])
        for image, label in zip(images, digits.target, strict=True)
    ]
    shares = partition(plan(sites=sites))
    assert len(shares) == sites["count"]
    assert sorted(fingerprints(shares)) == sorted(expected)


def test_shares() -> None:
    shares = partition(plan(sites=IID | {"count": 5}))
    assert [share.name for share in shares] == [f"branch-{i:02d}" for i in range(5)]
    for share in shares:
        assert share.classes == tuple("0123456789")
        assert len(share.test) == round(0.2 * (len(share.train) + len(share.test)))
        assert pixels(share.train).shape[1:] == (1, 8, 8)
        assert pixels(share.train).dtype == torch.float32
        assert 0 <= float(pixels(share.train).min()) <= float(pixels(share.train).max()) <= 1


def test_the_seed_decides() -> None:
    one, same, other = (
        fingerprints(partition(plan(sites=IID | {"count": 4}, seed=s))) for s in (1, 1, 2)
    )
    assert one == same
    assert one != other


# --- what a site predicts


def fingerprint_labels(share: Share, true_label: dict[bytes, int]) -> list[int]:
    return [
        true_label[image.numpy().tobytes()]
        for records in (share.train, share.test)
        for image in pixels(records)
    ]


def test_label_sets_are_given_in_turn() -> None:
    label_sets = {"odd-even": [[1, 3, 5, 7, 9], [0, 2, 4, 6, 8]], "small": [[0, 1], [2], [3, 4]]}
    shares = partition(
        plan({"label_sets": label_sets}, IID | {"count": 4, "label_sets": ["odd-even", "small"]})
    )
    assert [len(share.classes) for share in shares] == [2, 3, 2, 3]
    assert shares[0].classes == ("1/3/5/7/9", "0/2/4/6/8")
    assert shares[1].classes == ("0/1", "2", "3/4")
    source = load_source("sklearn:digits")
    true_label = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(pixels(source), source.labels, strict=True)
    }
    for share, name in zip(shares, ["odd-even", "small"] * 2, strict=True):
        for image, label in zip(pixels(share.train), share.train.labels, strict=True):
            assert true_label[image.numpy().tobytes()] in label_sets[name][int(label)]
    held = [label for share in shares[1::2] for label in fingerprint_labels(share, true_label)]
    assert max(held) == 4  # records of no class are left out


@pytest.mark.parametrize(
    ("groups", "text"),
    [([[10], [1]], "10"), ([[-1], [1]], "-1"), ([[1, 2], [2, 3]], "2")],
    ids=["no such label", "negative", "in two classes"],
)
def test_label_set_that_does_not_fit(groups: list[list[int]], text: str) -> None:
    with pytest.raises((PlanError, DataError), match=text):
        partition(plan({"label_sets": {"x": groups}}, IID | {"count": 2, "label_sets": ["x"]}))


# --- what cannot be spread


def test_unknown_partitioner() -> None:
    with pytest.raises(PlanError) as caught:
        partition(plan(sites={"partitioner": "FairPartitioner"}))
    assert str(caught.value).startswith("sites.partitioner: found 'FairPartitioner'; allowed: ")
    assert "DirichletPartitioner" in caught.value.allowed


@pytest.mark.parametrize(
    ("sites", "text"),
    [
        ({"options": {"alpha": 1.0}} | IID, "what IidPartitioner takes .*alpha"),
        ({"partitioner": "DirichletPartitioner"}, "what DirichletPartitioner takes .*alpha"),
        ({"partitioner": "DirichletPartitioner", "options": {"alpha": -1.0}}, "alpha"),
        (
            {"count": 300, "partitioner": "DirichletPartitioner", "options": {"alpha": 1.0}},
            "another number of sites",
        ),
    ],
)
def test_options_that_do_not_fit(sites: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=text) as caught:
        partition(plan(sites=sites))
    assert caught.value.field == "sites.options"


PARTITIONERS = [n for n in partitioner.__all__ if n.endswith("Partitioner") and n != "Partitioner"]


@pytest.mark.parametrize("name", PARTITIONERS)
def test_every_partitioner_works_or_says_why_not(name: str) -> None:
    options = {"alpha": 1.0} if "Dirichlet" in name else {}
    try:
        shares = partition(plan(sites={"count": 12, "partitioner": name, "options": options}))
    except (PlanError, DataError) as error:
        assert name in str(error) or "records" in str(error)
    else:
        assert len(shares) == 12


def test_more_sites_than_records(tmp_path: Path) -> None:
    source = archive(tmp_path, images=np.zeros((3, 8, 8), np.uint8), labels=np.arange(3))
    with pytest.raises((PlanError, DataError), match="sites"):
        partition(plan({"source": source}, IID | {"count": 4}))


def test_site_with_one_record_is_too_small(tmp_path: Path) -> None:
    source = archive(tmp_path, images=np.zeros((3, 8, 8), np.uint8), labels=np.arange(3))
    with pytest.raises(DataError) as caught:
        partition(plan({"source": source}, IID | {"count": 2}))
    assert str(caught.value).startswith("site branch-01: records: found 1; allowed: at least two")
    assert "Use fewer sites" in caught.value.action


def test_site_of_two_records_trains_on_one_and_tests_on_the_other(tmp_path: Path) -> None:
    source = archive(tmp_path, images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4) % 2)
    for fraction in (0.01, 0.99):
        shares = partition(plan({"source": source, "test_fraction": fraction}, IID | {"count": 2}))
        assert [(len(s.train), len(s.test)) for s in shares] == [(1, 1), (1, 1)]


# --- units

PATIENTS: dict[str, np.ndarray[Any, Any]] = {
    "images": np.arange(60 * 64, dtype=np.uint32).reshape(60, 8, 8).astype(np.uint8),
    "labels": np.arange(60) % 2,
    "patient_id": np.array([f"p{n * n % 17}" for n in range(60)]),
}
PATIENTS["images"][:, 0, 0] = np.arange(60)  # tells the records apart


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.99])
def test_the_records_of_a_unit_are_on_one_side(tmp_path: Path, count: int, fraction: float) -> None:
    source = archive(tmp_path, **PATIENTS)
    data = {"source": source, "test_fraction": fraction}
    by_patient = plan(data, IID | {"count": count}).replace({"privacy.unit": "patient_id"})
    shares = partition(by_patient)
    everyone = 0
    for share in shares:
        sides = []
        for records in (share.train, share.test):
            rows = (pixels(records)[:, 0, 0, 0] * 255).round().long().numpy()
            names = PATIENTS["patient_id"][rows]
            everyone += len(rows)
            assert records.units is not None
            values, numbers = np.unique(records.units.numpy(), return_inverse=True)
            assert values.tolist() == list(range(records.unit_count))
            for number in values:  # one number, one patient
                assert len(set(names[numbers == number])) == 1
            assert len(set(names)) == len(values) >= 1
            sides.append(set(names))
        assert not sides[0] & sides[1]
        units = sum(len(side) for side in sides)
        assert len(sides[1]) == min(max(1, round(fraction * units)), units - 1)
    assert everyone == 60


def test_a_simulated_site_declares_its_units(tmp_path: Path) -> None:
    source = archive(tmp_path, **PATIENTS)
    by_record = plan({"source": source}, IID | {"count": 2})
    by_patient = by_record.replace({"privacy.unit": "patient_id"})
    for each in (by_record, by_patient):  # the same data: the unit tells the sites apart
        simulated = SimulatedSites(each, tmp_path / each.privacy.unit, "cpu")
        sites, shares = simulated.all(), simulated.shares()
        declared = [site.config.nominal_size for site in sites]
        assert declared == [share.train.unit_count for share in shares]
        fewer = each.privacy.unit != "record"
        assert [d < len(s.train) for d, s in zip(declared, shares, strict=True)] == [fewer] * 2
        asked = by_patient.replace({"training.expected_batch": 3.0})
        if fewer:
            assert sites[0].step(asked).sample_rate == 3 / declared[0]
        else:
            with pytest.raises(PrivacyError, match="site branch-00 do not say which unit"):
                sites[0].step(asked)


def test_a_simulation_protects_patients(tmp_path: Path, resnet_directory: Path) -> None:
    """From the file to the answers of two sites: a cap, a private head, one round."""
    changes = {
        "backbone.source": f"dir:{resnet_directory}",
        "adapter.method": "film",
        "head.training": "private",
        "privacy.unit": "patient_id",
        "privacy.records_per_unit": 2,
        "training.expected_batch": 4.0,
        "rounds.count": 1,
    }
    images = np.repeat(np.repeat(PATIENTS["images"], 2, axis=1), 2, axis=2)
    source = archive(tmp_path, **PATIENTS | {"images": images})
    by_patient = plan({"source": source}, IID | {"count": 2}).replace(changes)
    comparison = simulate(by_patient, tmp_path / "run", ("local",), device="cpu")
    assert len(comparison.rows) == 1
    units = [share.train.unit_count for share in partition(by_patient)]
    assert [site.sample_rate for site in comparison.sites] == [4 / n for n in units]
    assert all(0 < site.epsilon <= by_patient.privacy.epsilon for site in comparison.sites)


def test_without_a_column_the_column_is_not_read(tmp_path: Path) -> None:
    shares = partition(plan({"source": archive(tmp_path, **PATIENTS)}, IID | {"count": 2}))
    assert all(r.units is None for share in shares for r in (share.train, share.test))


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (None, "patient_id: found 'no such array'; allowed: 60 strings or integers, for privacy"),
        (np.arange(59), "patient_id: found '59 identifiers'; allowed: 60, one for each image"),
        (np.arange(60) / 2, "patient_id: found 'float64.60,.'"),
    ],
    ids=["missing", "short", "floats"],
)
def test_npz_without_the_units(
    tmp_path: Path, column: np.ndarray[Any, Any] | None, text: str
) -> None:
    arrays = {k: v for k, v in PATIENTS.items() if k != "patient_id"}
    source = archive(tmp_path, **arrays, **({} if column is None else {"patient_id": column}))
    by_patient = plan({"source": source}, IID | {"count": 2})
    with pytest.raises(DataError, match=text):
        partition(by_patient.replace({"privacy.unit": "patient_id"}))


def test_the_digits_have_no_units() -> None:
    with pytest.raises(DataError) as caught:
        partition(plan(sites=IID).replace({"privacy.unit": "patient_id"}))
    assert str(caught.value).startswith("privacy.unit: found 'patient_id'; allowed: record, for")


def test_site_with_one_unit_is_too_small(tmp_path: Path) -> None:
    arrays = PATIENTS | {"patient_id": np.zeros(60, np.int64)}
    one = plan({"source": archive(tmp_path, **arrays)}, IID | {"count": 2})
    with pytest.raises(DataError) as caught:
        partition(one.replace({"privacy.unit": "patient_id"}))
    assert "branch-00: values of patient_id: found 1; allowed: at least two" in str(caught.value)


# --- npz files


@pytest.mark.parametrize(
    ("images", "shape"),
    [
        (np.full((4, 6, 5), 51, np.uint8), (4, 1, 6, 5)),
        (np.full((4, 6, 5, 3), 51, np.uint8), (4, 3, 6, 5)),
        (np.full((4, 6, 5), 0.2, np.float64), (4, 1, 6, 5)),
        (np.full((4, 6, 5, 1), 0.2, np.float16), (4, 1, 6, 5)),
    ],
)
def test_npz(tmp_path: Path, images: np.ndarray[Any, Any], shape: tuple[int, ...]) -> None:
    records = load_source(archive(tmp_path, images=images, labels=np.array([0, 1, 2, 1])))
    assert pixels(records).shape == shape
    torch.testing.assert_close(pixels(records), torch.full(shape, 0.2), rtol=0, atol=1e-4)
    assert records.labels.tolist() == [0, 1, 2, 1]
    assert records.labels.dtype == torch.int64


IMAGES = np.zeros((4, 8, 8), np.uint8)
LABELS = np.arange(4)


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"images": IMAGES}, "labels"),
        ({"labels": LABELS}, "images"),
        (
            {"images": IMAGES, "labels": LABELS[:3]},
            "labels: found 'int64.3,.'; allowed: 4 integers",
        ),
        ({"images": IMAGES, "labels": LABELS[None]}, "labels: found"),
        ({"images": IMAGES, "labels": LABELS / 2}, "labels: found 'float64"),
        ({"images": IMAGES[0], "labels": LABELS}, "images: found 'uint8.8, 8.'"),
        ({"images": IMAGES.astype(np.int64), "labels": LABELS}, "images: found 'int64"),
        ({"images": IMAGES, "labels": LABELS - 1}, "labels"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "records|images|labels"),
    ],
    ids=[
        "no labels",
        "no images",
        "few",
        "nested",
        "floats",
        "one image",
        "ints",
        "negative",
        "empty",
    ],
)
def test_npz_with_wrong_arrays(tmp_path: Path, arrays: dict[str, Any], text: str) -> None:
    source = archive(tmp_path, **arrays)
    with pytest.raises(DataError, match=text):
        partition(plan({"source": source}, IID | {"count": 2}))


def bare_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, IMAGES)


def cut(path: Path) -> None:
    np.savez(path, images=IMAGES, labels=LABELS)
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"rubbish"),
        lambda path: path.write_bytes(b"PK\x03\x04rubbish"),
        cut,
        bare_array,
    ],
    ids=["missing", "directory", "empty", "rubbish", "zip", "cut", "npy"],
)
def test_file_that_is_no_npz(tmp_path: Path, write: Callable[[Path], object]) -> None:
    path = tmp_path / "data.npz"
    write(path)
    with pytest.raises(DataError) as caught:
        load_source(f"npz:{path}")
    assert caught.value.field == str(path)
    assert "an npz file with arrays images and labels" in caught.value.allowed


def test_pickled_objects_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Speaks:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
            return print, ("the pickle was opened",)

    source = archive(tmp_path, images=np.array([Speaks()] * 4, object), labels=LABELS)
    with pytest.raises(DataError, match="allow_pickle=False"):
        load_source(source)
    assert capsys.readouterr().out == ""
