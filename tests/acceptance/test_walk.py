"""The README's walk, from a backbone to a deployed model: its files, its commands, its output."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedgraft_common.cli import group

README = Path(__file__).parents[2] / "README.md"
NUMBER = re.compile(r"\d+\.\d+(?:e-\d+)?|\d+e-\d+|\d+")
MACHINES = 0.02  # of a share, or 2 of 100: what another processor's rounding may move a figure
SMALL = {"count = 40": "count = 2", "sites = 16": "sites = 4", "count = 16": "count = 4"}


def blocks() -> Iterator[tuple[str, str]]:
    """Language and text of each block of code in the walk."""
    text = README.read_text(encoding="utf-8")
    walk = text.split("<!-- walk -->")[1].split("<!-- /walk -->")[0]
    yield from re.findall(r"```(\w+)\n(.*?)```", walk, re.DOTALL)


def steps(console: str) -> Iterator[tuple[str, list[str]]]:
    """Each command, and the lines that are printed below it."""
    for part in re.split(r"^\$ ", console.replace("\\\n", ""), flags=re.MULTILINE)[1:]:
        command, *lines = part.splitlines()
        yield command, lines


def run(command: str) -> list[str]:
    """What a command prints; `cp` is the only one that is not Fedgraft's."""
    name, *arguments = shlex.split(command)
    if name == "cp":
        (source,) = Path().glob(arguments[0])
        shutil.copy(source, arguments[1])
        return []
    assert name == "fedgraft"
    done = CliRunner().invoke(group, arguments, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout.splitlines()


def words(line: str) -> str:
    """A line without its numbers and without how it is laid out."""
    return " ".join(NUMBER.sub("#", line).split())


def check(printed: list[str], found: list[str], exact: bool) -> None:
    """Every printed line is among what was found, in order; with its numbers, if they count."""
    left = iter(found)
    for line in printed:
        same = next((other for other in left if words(other) == words(line)), None)
        assert same is not None, f"{line!r} is not in {found}"
        if exact and "agree" not in line:  # how well two programs agree differs from run to run
            for here, there in zip(NUMBER.findall(same), NUMBER.findall(line), strict=True):
                allowed = MACHINES * (100 if float(there) > 1 else 1) if "." in there else 0.0
                assert float(here) == pytest.approx(float(there), abs=allowed), line


@pytest.mark.parametrize("size", ["small", pytest.param("as printed", marks=pytest.mark.slow)])
def test_the_walk(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`small` has fewer sites and rounds, and compares everything but numbers."""
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    ran = []
    for language, text in blocks():
        if language == "python":
            exec(compile(text, "README.md", "exec"), {})  # noqa: S102 - it is what the README says
        if language == "toml":
            for old, new in SMALL.items() if size == "small" else ():
                text = text.replace(old, new)
            Path(text.splitlines()[0].removeprefix("# ")).write_text(text, encoding="utf-8")
        for command, printed in steps(text) if language == "console" else ():
            check(printed, run(command), size != "small")
            ran.append(" ".join(command.split()[:3]))
    assert ran[:3] == ["fedgraft plan check", "fedgraft data check", "fedgraft data extract"]
    assert [words.split()[1] for words in ran[3:]] == ["simulate", ran[4].split()[1], "evaluate",
                                                       "export"]  # fmt: skip
    assert (tmp_path / "model" / "model.onnx").is_file()
    assert (tmp_path / "home" / "data" / "look" / "contact-sheet.png").is_file()
