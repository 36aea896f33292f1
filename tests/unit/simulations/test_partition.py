from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr_datasets import partitioner
from sklearn.datasets import load_digits

from fedgraft_common.errors import DataError, PlanError
from fedgraft_common.plan import Plan, parse_plan
from fedgraft_simulations.partition import Share, load_source, partition

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


def fingerprints(shares: list[Share]) -> list[bytes]:
    """Every record of every site: its pixels and its label."""
    return [
        image.numpy().tobytes() + bytes([int(label)])
        for share in shares
        for records in (share.train, share.test)
        for image, label in zip(records.images, records.labels, strict=True)
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
        assert share.train.images.shape[1:] == (1, 8, 8)
        assert share.train.images.dtype == torch.float32
        assert 0 <= float(share.train.images.min()) <= float(share.train.images.max()) <= 1


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
        for image in records.images
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
        for image, label in zip(source.images, source.labels, strict=True)
    }
    for share, name in zip(shares, ["odd-even", "small"] * 2, strict=True):
        for image, label in zip(share.train.images, share.train.labels, strict=True):
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
    assert records.images.shape == shape
    torch.testing.assert_close(records.images, torch.full(shape, 0.2), rtol=0, atol=1e-4)
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
