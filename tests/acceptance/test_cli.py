"""The `fedgraft` command as people and scripts use it."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedgraft_common.cli import COMMANDS, main
from fedgraft_common.plan import Plan, load_plan

COMMAND = Path(sys.executable).with_name("fedgraft")


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def fedgraft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fedgraft:
    return Fedgraft(monkeypatch, capsys)


class Fedgraft:
    """The entry point, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> Outcome:
        self._capsys.readouterr()
        self._monkeypatch.setattr(sys, "argv", ["fedgraft", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        printed = self._capsys.readouterr()
        code = end.value.code
        return Outcome(code if isinstance(code, int) else int(bool(code)), printed.out, printed.err)


@pytest.fixture
def tiny(vit_directory: Path, tmp_path: Path) -> Path:
    """Three sites, two rounds, one block of a tiny ViT."""
    file = tmp_path / "tiny.toml"
    file.write_text(
        f"""
        name = "tiny"
        [backbone]
        source = "dir:{vit_directory}"
        pooling = "mean"
        frozen_dtype = "float32"
        [adapter]
        rank = 2
        layers = "last:1"
        [training]
        sample_rate = 0.25
        expected_batch = 100
        [privacy]
        delta = 1e-4
        [aggregation]
        strategy = "FedAvgM"
        options = {{ server_momentum = 0.5 }}
        [rounds]
        count = 2
        [sites]
        count = 3
        partitioner = "IidPartitioner"
        """,
        encoding="utf-8",
    )
    return file


def assert_one_line_error(outcome: Outcome, *parts: str) -> None:
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("fedgraft: ")
    assert outcome.err.count("\n") == 1
    assert outcome.err.endswith("\n")
    for part in parts:
        assert part in outcome.err


# --- help


def test_help_names_every_command(fedgraft: Fedgraft) -> None:
    outcome = fedgraft("--help")
    assert outcome.code == 0
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name}\s+{re.escape(command.help)}$", outcome.out, re.M)


@pytest.mark.parametrize(
    "arguments", [["simulate"], ["plan", "check"], ["plan", "schema"], ["predict"]]
)
def test_every_command_has_help(fedgraft: Fedgraft, arguments: list[str]) -> None:
    outcome = fedgraft(*arguments, "--help")
    assert outcome.code == 0
    assert "Usage: fedgraft " + " ".join(arguments) in outcome.out


@pytest.mark.parametrize(
    "arguments", [["plann"], ["plan", "chek"], ["plan", "check"], ["simulate", "--x"]]
)
def test_wrong_command_line_ends_with_2(fedgraft: Fedgraft, arguments: list[str]) -> None:
    outcome = fedgraft(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err


def test_interrupted_ends_with_130(
    fedgraft: Fedgraft, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Plan:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedgraft_common.plan_cli.load_plan", interrupted)
    assert fedgraft("plan", "check", tiny).code == 130


# --- plan


def test_plan_check(fedgraft: Fedgraft, tiny: Path) -> None:
    outcome = fedgraft("plan", "check", tiny)
    assert outcome.code == 0
    lines = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    plan = load_plan(tiny).replace({"aggregation.sites": 3})
    assert lines["plan"] == "tiny"
    assert lines["hash"] == plan.hash
    assert lines["adapter"] == "ffa-lora: 448 values in 6 tensors, 1792 bytes a round"
    assert lines["steps"] == "2 in 2 rounds"
    found = re.fullmatch(
        r"local: epsilon ([\d.]+) at delta 0\.0001 with q 0\.25, sigma ([\d.]+)", lines["privacy"]
    )
    assert found
    assert 7.92 <= float(found[1]) <= 8.0
    assert float(found[2]) > 0.3


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["privacy.mechanism=none"], "privacy     none"),
        (
            ["privacy.mechanism=distributed", "privacy.epsilon=2"],
            "privacy     distributed: epsilon 1.9",
        ),
        (["privacy.mechanism=distributed"], "promise     against the server and any one other"),
        (
            ["privacy.mechanism=distributed", "privacy.secure_aggregation=summed"],
            "promise     none against the server, which sees each update",
        ),
    ],
)
def test_plan_check_with_changes(
    fedgraft: Fedgraft, tiny: Path, changes: list[str], text: str
) -> None:
    sets = [word for change in changes for word in ("--set", change)]
    outcome = fedgraft("plan", "check", tiny, *sets)
    assert outcome.code == 0
    assert text in outcome.out


def test_plan_check_as_json(fedgraft: Fedgraft, tiny: Path) -> None:
    outcome = fedgraft("plan", "check", tiny, "--json", "--set", "seed=5")
    document = json.loads(outcome.out)
    plan = Plan.model_validate(document["plan"])
    assert (plan.seed, plan.aggregation.sites) == (5, 3)
    assert plan.hash == document["hash"]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("privacy.epsilon=eight", ["tiny.toml: privacy.epsilon: found 'eight'", "valid number"]),
        ("privacy.epsilon=0", ["privacy.epsilon: found 0", "greater than 0"]),
        ("training.sample_rate=1.5", ["training.sample_rate: found 1.5", "equal to 1"]),
        ("privacy.epsilonn=3", ["privacy.epsilonn", "one of clipping_norm"]),
        ("nonsense", ["--set: found 'nonsense'", "KEY=VALUE"]),
        ("adapter.layers=last:9", ["adapter.layers: found 'last:9'", "last:1 to last:4"]),
        (
            "adapter.method=adalora",
            ["adapter.method: found 'adalora'", "dora, ffa-lora, film, full"],
        ),
        ("backbone.source=dir:/nowhere", ["'/nowhere'", "an existing directory"]),
    ],
)
def test_plan_check_error_is_one_line(
    fedgraft: Fedgraft, tiny: Path, change: str, parts: list[str]
) -> None:
    assert_one_line_error(fedgraft("plan", "check", tiny, "--set", change), *parts)


def test_plan_that_cannot_be_read(fedgraft: Fedgraft, tmp_path: Path) -> None:
    assert_one_line_error(fedgraft("plan", "check", tmp_path / "none.toml"), "no such file")
    assert_one_line_error(fedgraft("plan", "check", tmp_path), str(tmp_path))


def test_plan_schema(fedgraft: Fedgraft) -> None:
    schema = json.loads(fedgraft("plan", "schema").out)
    validator: Any = importlib.import_module("jsonschema").Draft202012Validator
    validator.check_schema(schema)
    check = validator(schema)
    assert check.is_valid(Plan().model_dump(mode="json"))
    assert check.is_valid({"privacy": {"epsilon": 2}})
    for wrong in ('{"privcy": {}}', '{"privacy": {"epsilonn": 2}}', '{"privacy": {"epsilon": 0}}'):
        assert not check.is_valid(json.loads(wrong))


# --- simulate


def simulate(plan: Path, out: Path, *more: str, **environment: str) -> Outcome:
    """In a process of its own."""
    done = subprocess.run(
        [COMMAND, "simulate", plan, "--out", out, "--device", "cpu", *more],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | environment,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def strict(text: str) -> dict[str, Any]:
    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    document: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return document


def rows(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The table by key, without what a clock says."""
    found = {row["key"]: row for row in document["comparisons"][0]["rows"]}
    return {key: {n: v for n, v in row.items() if n != "seconds"} for key, row in found.items()}


def test_simulate_as_json_and_again(fedgraft: Fedgraft, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = simulate(tiny, out, "--rows", "local,distributed,none", "--json")
    assert first.code == 0, first.err
    document = strict(first.out)
    assert strict((out / "result.json").read_text(encoding="utf-8")) == document
    assert "<html" in (out / "report.html").read_text(encoding="utf-8")
    table = rows(document)
    assert list(table) == ["local", "distributed", "none"]
    assert 7.92 <= table["local"]["epsilon"] <= 8.0
    assert table["none"]["epsilon"] is None
    for row in table.values():
        assert len(row["refit"]) == len(row["trained"]) == 3
        assert all(0 <= share <= 1 for share in row["refit"])
        assert row["bytes_per_round"] == 1792
        assert [point["round"] for point in row["curve"]] == [1, 2]
    assert (out / "seed-0" / "local" / "adapter" / "adapter_model.safetensors").is_file()
    second = fedgraft(
        "simulate",
        tiny,
        "--out",
        out,
        "--rows",
        "local,distributed,none",
        "--json",
        "--device",
        "cpu",
    )
    assert second.code == 0, second.err
    assert rows(strict(second.out)) == table


def test_a_run_on_top_of_an_earlier_one(fedgraft: Fedgraft, tiny: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    quick = ("simulate", tiny, "--rows", "local", "--device", "cpu", "--out")
    assert fedgraft(*quick, old).code == 0
    again = fedgraft(*quick, new, "--after", old, "--set", "name=next", "--json")
    assert again.code == 0, again.err
    document = strict(again.out)
    assert document["comparisons"][0]["plan"]["adapter"]["start"] == str(
        old / "seed-0" / "local" / "adapter"
    )
    kept = document["earlier"]
    assert kept["plan"] == "tiny"
    first = strict((old / "result.json").read_text(encoding="utf-8"))
    assert [site["before"] for site in kept["sites"]] == pytest.approx(
        first["comparisons"][0]["rows"][0]["refit"]
    )
    people = fedgraft(*quick, new, "--after", old, "--set", "name=next")
    assert "Plan tiny, looked at again" in people.out
    assert_one_line_error(
        fedgraft(*quick, new, "--after", tmp_path / "gone"), "the result.json of a finished"
    )


def test_simulate_for_people(fedgraft: Fedgraft, tiny: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_COLOR", "1")
        patch.setenv("FORCE_COLOR", "1")
        patch.setenv("FEDGRAFT_OUT", str(tmp_path / "out"))
        outcome = fedgraft("simulate", tiny, "--rows", "alone-head,local", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert "federated, local mechanism" in outcome.out
    assert "Federating" in outcome.out
    assert not re.search(r"\x1b\[[\d;]*(3[0-8]|9[0-7])", outcome.out)  # NO_COLOR: no colour
    assert "report.html" in outcome.err
    assert "report.html" not in outcome.out


def test_simulate_says_nothing_it_should_not(tiny: Path, tmp_path: Path) -> None:
    """No library's warnings, no progress bar in a pipe: standard error is for people."""
    outcome = simulate(tiny, tmp_path / "out", "--rows", "local", NO_COLOR="1")
    assert outcome.code == 0, outcome.err
    assert "Warning" not in outcome.err
    assert "\x1b" not in outcome.out + outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_results_are_not_resumed_with_other_data(
    fedgraft: Fedgraft, tiny: Path, tmp_path: Path
) -> None:
    """The plan's hash leaves [data] and [sites] out; a simulation's files must not."""
    options = ["--rows", "local", "--json", "--device", "cpu"]
    change = ["--set", "sites.partitioner=LinearPartitioner"]
    fresh = fedgraft("simulate", tiny, "--out", tmp_path / "fresh", *options, *change)
    assert fedgraft("simulate", tiny, "--out", tmp_path / "used", *options).code == 0
    again = fedgraft("simulate", tiny, "--out", tmp_path / "used", *options, *change)
    if again.code == 0:  # or it is refused
        assert rows(strict(again.out)) == rows(strict(fresh.out))
    else:
        assert_one_line_error(again)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--rows", "local,best"], ["--rows: found 'best'", "alone-head, alone-adapter, local"]),
        (["--engine", "mpi"], ["--engine: found 'mpi'", "local, flower"]),
        (["--device", "cuda:99"], ["device: found 'cuda:99'", "auto, cpu"]),
        (["--set", "sites.count=0"], ["sites.count: found 0"]),
        (["--set", "sites.count=1"], ["minimum_sites"]),
        (["--set", "privacy.delta=0.5"], ["privacy.delta: found 0.5", "branch-"]),
        (["--set", "data.source=npz:/none.npz"], ["/none.npz", "an npz file"]),
        (["--set", "aggregation.strategy=Krum", "--rows", "distributed"], ["FedAvgM"]),
    ],
)
@pytest.mark.timeout(20)
def test_simulate_error_is_one_line(
    fedgraft: Fedgraft, tiny: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    options = [] if "--rows" in arguments else ["--rows", "local"]
    outcome = fedgraft("simulate", tiny, "--out", tmp_path / "out", *options, *arguments)
    assert_one_line_error(outcome, *parts)


def test_a_row_that_cannot_run_is_refused_before_the_first_one(
    fedgraft: Fedgraft, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validate all, then work: not after minutes spent on the other rows."""

    def worked(*_: object) -> dict[str, torch.Tensor]:
        raise AssertionError("a row was run before the plan of every row was checked")

    monkeypatch.setattr("fedgraft_simulations.simulate.train_alone", worked)
    outcome = fedgraft(
        "simulate", tiny, "--out", tmp_path / "out",
        "--rows", "alone-adapter,distributed", "--set", "aggregation.strategy=Krum",
    )  # fmt: skip
    assert_one_line_error(outcome, "FedAvgM")
