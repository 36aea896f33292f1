"""What may import what, what starts fast, and which doors stay shut."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("common", "client", "server", "simulations")
SOURCES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
HEAVY = {"datasets", "flwr", "matplotlib", "numpy", "opacus", "peft", "pydantic", "ray", "sklearn"}
HEAVY |= {"torch", "transformers"}


def python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_contracts() -> None:
    path = os.pathsep.join(str(ROOT / package) for package in PACKAGES)
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["-h"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = """
import sys
from fedgraft_common.cli import main
sys.argv = ["fedgraft", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("LOADED", *sorted({name.partition(".")[0] for name in sys.modules}))
"""
    printed, _, loaded = python(code, *arguments).partition("LOADED")
    assert "fedgraft" in printed.lower()
    assert "click" in loaded.split()  # the list is the real one
    assert not set(loaded.split()) & HEAVY


@pytest.mark.parametrize(
    ("package", "strangers"),
    [
        ("fedgraft_common", {"fedgraft_client", "fedgraft_server", "fedgraft_simulations"}),
        ("fedgraft_client", {"fedgraft_server", "fedgraft_simulations"}),
        ("fedgraft_server", {"fedgraft_client", "fedgraft_simulations"}),
    ],
)
def test_importing_all_of_a_package_loads_no_stranger(package: str, strangers: set[str]) -> None:
    code = """
import importlib, pkgutil, sys, warnings
warnings.simplefilter("ignore")
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(*{name.partition(".")[0] for name in sys.modules})
"""
    loaded = set(python(code, package).split())
    assert package in loaded
    assert not loaded & strangers


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_pickle_and_no_code_from_elsewhere(file: Path) -> None:
    """DESIGN.md: no pickle anywhere; no code that arrives over the network ever runs."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = getattr(node, "module", None) or ""
            assert not {"pickle", "dill", "joblib"} & {*names, module}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "torch.load", "pickle.loads", "os.system"}
            switches = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
            assert switches.get("allow_pickle", "False") == "False"
            assert switches.get("trust_remote_code", "False") == "False"
            assert switches.get("shell", "False") == "False"


def test_the_sources_were_found() -> None:
    assert len(SOURCES) > 30
