"""Every kind of source gives the same records; what is broken is named with what to do."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedgraft_client.loaders import load, survey
from fedgraft_client.tasks import IGNORED, build_task
from fedgraft_common.errors import DataError
from fedgraft_common.reading import Column, Reading
from fedgraft_common.task_spec import TaskSpec

CLASSES = TaskSpec(classes=("healthy", "ill"))
TASK = build_task(CLASSES)
FRUIT = ("apple", "pear")


def reading(**changes: Any) -> Reading:
    return Reading(label_map={"normal": "healthy", "pneumonia": "ill"}, **changes)


def picture(path: Path, value: int = 100, size: tuple[int, int] = (8, 6), mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two X-rays of each kind, in folders with names of two alphabets."""
    for label, value in (("normal", 51), ("pneumonia", 204)):
        for number in range(2):
            picture(tmp_path / "röntgen 肺" / label / f"bild ü{number}.png", value + number)
    return tmp_path / "röntgen 肺"


# --- kinds of sources


def test_imagefolder_takes_labels_from_folders_with_any_name(folder: Path) -> None:
    found = load(f"imagefolder:{folder}", reading(), TASK)
    assert isinstance(found.records.inputs, torch.Tensor)
    assert found.records.inputs.shape == (4, 1, 6, 8)
    assert found.records.labels.tolist() == [0, 0, 1, 1]
    assert found.records.inputs[:, 0, 0, 0].tolist() == pytest.approx(
        [0.2, 52 / 255, 0.8, 205 / 255]
    )
    assert found.records.units is None


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_says_label_and_unit(folder: Path, kind: str) -> None:
    rows = [
        {"file_name": f"{label}/bild ü{n}.png", "finding": label, "patient": f"p{n}"}
        for label in ("pneumonia", "normal") for n in range(2)
    ]  # fmt: skip
    write_table(folder / f"metadata.{kind}", rows)
    found = load(f"imagefolder:{folder}", reading(label="finding"), TASK, unit="patient")
    assert found.records.labels.tolist() == [1, 1, 0, 0]
    assert found.records.units is not None
    assert found.records.units.tolist() == [0, 1, 0, 1]
    assert isinstance(found.records.inputs, torch.Tensor)
    assert found.records.inputs[0, 0, 0, 0] == pytest.approx(0.8)


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    from pyarrow import csv, parquet

    table = pa.Table.from_pylist(rows)
    if path.suffix == ".csv":
        csv.write_csv(table, path)
    elif path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8"
        )
    return path


TEXTS = [{"text": "Grüße, my card?", "label": "apple", "branch": "a"},
         {"text": "second\nline", "label": "pear", "branch": "b"}]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "ending"), [("csv", "csv"), ("json", "jsonl"), ("parquet", "parquet")]
)
def test_tables_of_texts(tmp_path: Path, kind: str, ending: str) -> None:
    file = write_table(tmp_path / f"données.{ending}", TEXTS)
    task = build_task(TaskSpec(classes=FRUIT))
    found = load(f"{kind}:{file}", Reading(), task, extra=("branch",))
    assert found.modality == "text"
    assert found.records.inputs == ["Grüße, my card?", "second\nline"]
    assert found.records.labels.tolist() == [0, 1]
    assert found.extra == {"branch": ["a", "b"]}


def test_a_data_set_that_was_saved_to_disk(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=list(FRUIT))})
    rows = {"text": ["one", "two"], "label": [1, 0]}
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    task = build_task(TaskSpec(classes=("pear", "apple")))  # another order than the file's
    found = load(f"saved:{tmp_path / 'saved'}", Reading(), task)
    assert found.records.labels.tolist() == [0, 1]


def test_webdataset(tmp_path: Path, folder: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number, label in enumerate(("normal", "pneumonia")):
            tar.add(folder / label / "bild ü0.png", f"{number}.png")
            (tmp_path / "meta.json").write_text(json.dumps({"finding": label}))
            (tmp_path / "label.txt").write_text(label)
            tar.add(tmp_path / "label.txt", f"{number}.txt")
    found = load(f"webdataset:{tmp_path / 'shard.tar'}", reading(label="txt"), TASK)
    assert found.records.labels.tolist() == [0, 1]
    assert isinstance(found.records.inputs, torch.Tensor)
    assert found.records.inputs[:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.8])


def test_an_npz_of_each_modality(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "images": np.zeros((2, 4, 4), np.uint8), "audio": np.zeros((2, 16)),
        "series": np.zeros((2, 9, 3)), "tabular": np.zeros((2, 5)),
        "video": np.full((2, 3, 4, 4, 3), 255, np.uint8), "texts": np.array(["a", "b"]),
    }  # fmt: skip
    for name, array in arrays.items():
        np.savez(tmp_path / f"{name}.npz", labels=np.array([0, 1]), **{name: array})
        found = load(str(tmp_path / f"{name}.npz"), Reading(), TASK)
        assert found.modality == name.removesuffix("s") if name in ("images", "texts") else name
        assert len(found.records) == 2
    video = load(str(tmp_path / "video.npz"), Reading(), TASK).records.inputs
    assert isinstance(video, torch.Tensor)
    assert video.shape == (2, 3, 3, 4, 4)
    assert video.max() == 1


@pytest.mark.parametrize("rates", [(8000, 8000), (8000, 16000)])
def test_audiofolder_is_brought_to_one_rate_and_length(
    tmp_path: Path, rates: tuple[int, int]
) -> None:
    sounds(tmp_path, rates)
    wanted = reading(sample_rate=8000, samples=2000)
    found = load(f"audiofolder:{tmp_path}", wanted, TASK).records.inputs
    assert isinstance(found, torch.Tensor)
    assert found.shape == (2, 2000)
    times = torch.arange(800, 1200) / 8000
    for sound in found:  # the same tone, whatever the rate it was recorded at
        assert torch.allclose(sound[800:1200], torch.sin(2 * torch.pi * 440 * times), atol=0.02)
    assert found[:, 1700:].eq(0).all()


def sounds(folder: Path, rates: tuple[int, ...]) -> None:
    import soundfile

    for label, rate in zip(("normal", "pneumonia"), rates, strict=True):
        (folder / label).mkdir()
        times = np.arange(int(0.2 * rate)) / rate
        both = np.stack([np.sin(2 * np.pi * 440 * times)] * 2, axis=1)
        soundfile.write(folder / label / "ton.wav", both, rate, subtype="FLOAT")


def test_series_of_lists(tmp_path: Path) -> None:
    rows = [{"x": [1.0, 2.0], "y": [3.0, 4.0], "label": "apple"},
            {"x": [5.0, 6.0, 9.0], "y": [7.0, 8.0, 9.0], "label": "pear"}]  # fmt: skip
    file = write_table(tmp_path / "ecg.parquet", rows)
    wanted = Reading(modality="series", input=("x", "y"), samples=2)
    found = load(f"parquet:{file}", wanted, build_task(TaskSpec(classes=FRUIT))).records.inputs
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == [[[1, 3], [2, 4]], [[5, 7], [6, 8]]]


# --- tables of numbers and categories

COLUMNS = {
    "age": Column(mean=50, std=10, missing=50, indicator=True),
    "sex": Column(values=("female", "male"), names={"f": "female", "m": "male", "1": "male"}),
}


def test_columns_become_numbers_with_public_constants(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("age,sex,label\n60,f,healthy\n?,male,ill\n,1,ill\n", "utf-8")
    found = load(f"csv:{file}", Reading(columns=COLUMNS), TASK)
    assert found.modality == "tabular"
    assert isinstance(found.records.inputs, torch.Tensor)
    assert found.records.inputs.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [0, 1, 0, 1]]


def test_a_record_is_encoded_alone(tmp_path: Path) -> None:
    """No constant comes from the other records: a neighbour would move every input."""
    lines = ["60,f,healthy", "20,m,ill", "99,m,ill"]
    for kept in (lines, lines[:1]):
        (tmp_path / "t.csv").write_text("\n".join(["age,sex,label", *kept]), "utf-8")
        found = load(f"csv:{tmp_path / 't.csv'}", Reading(columns=COLUMNS), TASK).records.inputs
        assert isinstance(found, torch.Tensor)
        assert found[0].tolist() == [1, 0, 1, 0]


def test_a_file_without_a_line_of_names(tmp_path: Path) -> None:
    (tmp_path / "t.data").write_text("60;f;0\n70;m;3\n")
    wanted = Reading(
        columns=COLUMNS, header=("age", "sex", "num"), label="num", delimiter=";",
        label_map={"0": "healthy", "1": "ill", "2": "ill", "3": "ill"},
    )  # fmt: skip
    found = load(f"csv:{tmp_path / 't.data'}", wanted, TASK)
    assert found.records.labels.tolist() == [0, 1]


# --- labels of other tasks


def test_words_and_their_labels(tmp_path: Path) -> None:
    rows = [{"tokens": ["Ada", "lives", "here"], "tags": ["P", "O", "O"]},
            {"tokens": ["Rome"], "tags": ["L"]}]  # fmt: skip
    file = write_table(tmp_path / "t.jsonl", rows)
    task = build_task(TaskSpec(kind="token-classification", classes=("O", "P", "L")))
    found = load(f"json:{file}", Reading(input="tokens", label="tags"), task).records
    assert found.inputs == ["Ada lives here", "Rome"]
    assert found.labels.tolist() == [[1, 0, 0], [2, IGNORED, IGNORED]]


def test_masks_are_cut_like_their_images(tmp_path: Path) -> None:
    mask = np.zeros((8, 16), np.uint8)
    mask[:4, 4:12] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    Image.fromarray(mask).save(tmp_path / "i.png")
    write_table(tmp_path / "metadata.csv", [{"file_name": "i.png", "mask_file_name": "m.png"}])
    task = build_task(TaskSpec(kind="segmentation", classes=("ground", "thing")))
    wanted = Reading(label="mask", label_map={"0": "ground", "255": "thing"}, size=4)
    found = load(f"imagefolder:{tmp_path}", wanted, task).records
    assert isinstance(found.inputs, torch.Tensor)
    assert found.labels.tolist() == [[[1, 1, 1, 1]] * 2 + [[0, 0, 0, 0]] * 2]
    assert torch.equal(found.inputs[0, 0].round().long(), found.labels[0])


def test_boxes_are_cut_like_their_images(tmp_path: Path) -> None:
    picture(tmp_path / "i.png", size=(20, 10))
    objects = {"bbox": [[5, 0, 10, 5], [0, 0, 4, 4]], "category": ["pear", "apple"]}
    row = {"file_name": "i.png", "objects": objects}
    write_table(tmp_path / "metadata.jsonl", [row])
    task = build_task(TaskSpec(kind="detection", classes=FRUIT, boxes=3))
    found = load(f"imagefolder:{tmp_path}", Reading(label="objects", size=8), task).records
    assert found.labels[0, 0].tolist() == [1, 0, 0, 1, 0.5]  # the middle of 20 x 10 is 10 x 10
    assert found.labels[0, 1:, 0].tolist() == [-1, -1]  # the other box is in the margin


def test_several_label_columns(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("text,time,event,a,b,both\nx,2.5,dead,0,1,a|b\ny,4,alive,1,1,\n", "utf-8")
    survival = build_task(TaskSpec(kind="survival", cuts=(1.0, 3.0)))
    wanted = Reading(label=("time", "event"), label_map={"dead": "1", "alive": "0"})
    assert load(f"csv:{file}", wanted, survival).records.labels.tolist() == [[2.5, 1], [4, 0]]
    several = build_task(TaskSpec(kind="multi-label", classes=("a", "b")))
    found = load(f"csv:{file}", Reading(label=("a", "b")), several).records.labels
    assert found.tolist() == [[0, 1], [1, 1]]
    regression = build_task(TaskSpec(kind="regression", targets=("t",), low=(0,), high=(9,)))
    assert load(f"csv:{file}", Reading(label="time"), regression).records.labels.tolist() == [
        [2.5],
        [4],
    ]


# --- bad data: the text of the error


def refused(source: str, wanted: Reading, task: Any = TASK, **more: Any) -> str:
    with warnings.catch_warnings(), pytest.raises(DataError) as caught:
        load(source, wanted, task, **more)
    return str(caught.value)


def test_a_truncated_jpeg_is_named(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    whole = folder / "normal" / "x.jpg"
    Image.fromarray(noise).save(whole)
    whole.write_bytes(whole.read_bytes()[:1500])
    wanted = reading(size=8, channels=1)
    text = refused(f"imagefolder:{folder}", wanted)
    assert "1 broken records: found 'normal/x.jpg: damaged: " in text
    assert "truncated" in text
    assert "data.skip_broken = true" in text
    found = load(f"imagefolder:{folder}", wanted.model_copy(update={"skip_broken": True}), TASK)
    assert len(found.records) == 4
    assert found.records.labels.tolist() == [0, 0, 1, 1]
    assert [where for where, _ in found.broken] == ["normal/x.jpg"]


def test_a_text_file_that_is_called_png(folder: Path) -> None:
    (folder / "normal" / "z.png").write_text("hello")
    assert "normal/z.png: not an image that Pillow reads" in refused(
        f"imagefolder:{folder}", reading()
    )


def test_sixteen_bits_need_to_be_explained(tmp_path: Path) -> None:
    deep = np.array([[0, 4095], [2048, 1024]], np.uint16)
    (tmp_path / "ill").mkdir()
    Image.fromarray(deep).save(tmp_path / "ill" / "x.png")
    text = refused(f"imagefolder:{tmp_path}", reading())
    assert "ill/x.png: 16 bits a pixel, and data.bits does not say how many are in use" in text
    found = load(f"imagefolder:{tmp_path}", reading(bits=12), TASK).records.inputs
    assert isinstance(found, torch.Tensor)
    assert found[0, 0].tolist() == [
        [0, 1],
        [pytest.approx(2048 / 4095), pytest.approx(1024 / 4095)],
    ]
    assert "a value of 4095, beyond data.bits = 10" in refused(
        f"imagefolder:{tmp_path}", reading(bits=10)
    )


def test_images_of_two_sizes(folder: Path) -> None:
    picture(folder / "normal" / "big.png", size=(30, 20))
    text = refused(f"imagefolder:{folder}", reading())
    assert "images: found '(1, 6, 8) after (1, 20, 30) (channels, height, width)'" in text
    assert "State data.size" in text
    assert len(load(f"imagefolder:{folder}", reading(size=6), TASK).records) == 5


def test_grey_and_colour(folder: Path) -> None:
    picture(folder / "pneumonia" / "colour.png", mode="RGB")
    assert "State data.channels" in refused(f"imagefolder:{folder}", reading())
    found = load(f"imagefolder:{folder}", reading(channels=3), TASK).records.inputs
    assert isinstance(found, torch.Tensor)
    assert found.shape == (5, 3, 6, 8)


def test_a_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    file = write_table(tmp_path / "t.csv", TEXTS)
    text = refused(f"csv:{file}", Reading(label="intent"), build_task(TaskSpec(classes=FRUIT)))
    assert (
        f"{file}: label: found \"no column 'intent'\"; allowed: one of text, label, branch" in text
    )
    text = refused(f"csv:{file}", Reading(columns={"weight": Column()}), TASK)
    assert "no column 'weight'" in text
    text = refused(f"csv:{file}", Reading(), TASK, unit="customer")
    assert "unit: found \"no column 'customer'\"" in text


def test_labels_outside_the_map(folder: Path) -> None:
    picture(folder / "covid" / "a.png")
    picture(folder / "covid" / "b.png")
    wanted = reading(skip_broken=True)  # which is about files, not about what they mean
    text = refused(f"imagefolder:{folder}", wanted)
    assert (
        "labels: found \"'covid' (2x)\"; allowed: healthy, ill; or, of the label map, normal"
        in text
    )
    assert "data.label_map" in text


def test_mixed_sample_rates(tmp_path: Path) -> None:
    sounds(tmp_path, (8000, 16000))
    text = refused(f"audiofolder:{tmp_path}", reading())
    assert "pneumonia/ton.wav: 16000 Hz where others have 8000 Hz; state data.sample_rate" in text


def test_a_damaged_sound(tmp_path: Path) -> None:
    sounds(tmp_path, (8000, 8000))
    (tmp_path / "normal" / "x.flac").write_bytes(b"fLaC but not really")
    assert "normal/x.flac: damaged: " in refused(f"audiofolder:{tmp_path}", reading())


def test_lengths_that_differ(tmp_path: Path) -> None:
    sounds(tmp_path, (8000, 8000))
    import soundfile

    soundfile.write(tmp_path / "normal" / "z.wav", np.zeros(77), 8000)
    assert "State data.samples" in refused(f"audiofolder:{tmp_path}", reading())


def test_empty_text(tmp_path: Path) -> None:
    file = write_table(
        tmp_path / "t.csv", [*TEXTS, {"text": "  \n", "label": "pear", "branch": "c"}]
    )
    text = refused(f"csv:{file}", Reading(), build_task(TaskSpec(classes=FRUIT)))
    assert "1 broken records: found 'row 3: empty text'" in text


def test_a_missing_value_without_a_constant(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("age,label\n60,ill\n?,ill\nold,ill\n", "utf-8")
    text = refused(f"csv:{tmp_path / 't.csv'}", Reading(columns={"age": Column()}))
    assert "row 2: a missing value in column age, and data.columns.age.missing does not say" in text
    assert "row 3: 'old' in column age is no number" in text


def test_an_unknown_category(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("age,sex,label\n1,x,ill\n", "utf-8")
    text = refused(f"csv:{tmp_path / 't.csv'}", Reading(columns=COLUMNS))
    assert "row 1: 'x' in column sex is none of female, male" in text


def test_a_record_without_a_unit(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label,who\nx,ill,7\ny,ill,\n", "utf-8")
    text = refused(f"csv:{tmp_path / 't.csv'}", Reading(), unit="who")
    assert "row 2: no who, so whom it belongs to is unknown" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"a,b\n1,2,3\n", "lines of 2 fields"),
        (b"a,a\n1,2\n", "a different name for each column"),
        ("a,läbel\n".encode("utf-16"), "a CSV file in UTF-8"),
    ],
)
def test_a_csv_file_that_is_none(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    assert words in refused(f"csv:{tmp_path / 't.csv'}", Reading(input="a", label="b"))


@pytest.mark.parametrize("kind", ["csv", "parquet", "json", "imagefolder", "saved", "dicom", "npz"])
def test_a_source_that_is_not_there(tmp_path: Path, kind: str) -> None:
    text = refused(f"{kind}:{tmp_path / 'nothing'}", Reading())
    assert str(tmp_path / "nothing") in text


def test_words_and_labels_of_different_number(tmp_path: Path) -> None:
    file = write_table(tmp_path / "t.jsonl", [{"tokens": ["a", "b"], "tags": ["O"]}])
    task = build_task(TaskSpec(kind="token-classification", classes=("O", "P")))
    text = refused(f"json:{file}", Reading(input="tokens", label="tags"), task)
    assert "row 1: 1 labels for 2 words" in text


def test_a_survey_tells_everything_at_once(folder: Path) -> None:
    picture(folder / "covid" / "a.png")
    (folder / "normal" / "z.png").write_text("hello")
    found = survey(f"imagefolder:{folder}", reading(), TASK)
    assert dict(found.unknown) == {"covid": 1}
    assert [where for where, _ in found.broken] == ["normal/z.png"]
    assert len(found.records) == 4


# --- size

PROBE = """
import sys, threading, time
from fedgraft_client.loaders import load
from fedgraft_client.tasks import build_task
from fedgraft_common.reading import Column, Reading
from fedgraft_common.task_spec import TaskSpec

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))

peak, before = 0.0, anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
columns = {f"x{i}": Column(missing=0) for i in range(10)}
task = build_task(TaskSpec(classes=("0", "1")))
found = load("csv:" + sys.argv[1], Reading(columns=columns), task).records
print(len(found), float(found.inputs[-1].sum()), int(found.labels.sum()), peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, Linux only")
def test_ten_million_rows_in_bounded_memory(tmp_path: Path) -> None:
    """450 MB of text become 400 MB of numbers in a mapped file; half a GB of memory is enough."""
    line = "1,2,3,4,5,6,7,8,9,0.5,1\n,2,3,4,5,6,7,8,9,0.5,0\n"
    with (tmp_path / "big.csv").open("w") as file:
        file.write(",".join([f"x{i}" for i in range(10)]) + ",label\n")
        for _ in range(50):
            file.write(line * 100_000)
    ran = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "big.csv")],
        capture_output=True, text=True, check=True, timeout=900,
    )  # fmt: skip
    count, last, ones, peak = map(float, ran.stdout.split())
    assert (count, last, ones) == (10_000_000, 44.5, 5_000_000)
    assert peak < 700  # MiB; as Python objects the fields would take six thousand
