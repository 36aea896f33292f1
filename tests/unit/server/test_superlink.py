from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedgraft_common.errors import ServerError
from fedgraft_server.registry import Registry
from fedgraft_server.settings import (
    FederationTable,
    ServerDirectory,
    Settings,
    SuperLinkTable,
)
from fedgraft_server.superlink import SuperLink, synchronise


@pytest.fixture
def superlink(tmp_path: Path) -> SuperLink:
    settings = Settings(
        federation=FederationTable(name="t", host="localhost"), superlink=SuperLinkTable(port=1)
    )
    return SuperLink(ServerDirectory(tmp_path), settings)


def test_command_is_on_loopback_authenticated_and_installs_nothing(superlink: SuperLink) -> None:
    program, *options = superlink.command()
    assert Path(program).name == "flower-superlink"
    assert options[options.index("--host") + 1] == "127.0.0.1"
    assert "--enable-supernode-auth" in options
    assert "--disable-runtime-dependency-installation" in options
    assert "--insecure" not in options
    assert options[options.index("--database") + 1].endswith("flower.sqlite")


def test_the_superexec_is_the_servers_own(superlink: SuperLink, tmp_path: Path) -> None:
    """A SuperLink does not notice when the one that it started dies."""
    options = superlink.command()
    assert options[options.index("--isolation") + 1] == "process"
    program, *options = superlink.superexec_command()
    assert Path(program).name == "flower-superexec"
    assert options[options.index("--runtime-api-address") + 1] == "127.0.0.1:1"
    assert options[options.index("--root-certificates") + 1] == str(tmp_path / "ca.pem")
    assert not {"--insecure", "--allow-runtime-dependency-installation"} & set(options)


def test_environment_keeps_flower_private(superlink: SuperLink, tmp_path: Path) -> None:
    given = {"PATH": "/x", "FLWR_HOME": "/home/someone", "FLWR_TELEMETRY_ENABLED": "1", "LANG": "C"}
    made = superlink.environment(given)
    assert made["FLWR_HOME"] == str(tmp_path / "flower")
    assert (made["FLWR_TELEMETRY_ENABLED"], made["FLWR_DISABLE_UPDATE_CHECK"]) == ("0", "1")
    assert made["LANG"] == "C"
    programs = made["PATH"].split(os.pathsep)
    assert programs[-1] == "/x"
    assert (Path(programs[0]) / "flower-superexec").exists()


def test_a_superlink_that_is_away_is_an_error_that_says_so(
    superlink: SuperLink, tmp_path: Path
) -> None:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with (
        Registry(tmp_path / "registry") as registry,
        pytest.raises(ServerError, match="an answer on its loopback port"),
    ):
        synchronise(registry, superlink.url, context)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_tied_process_dies_with_a_killed_parent() -> None:
    parent = subprocess.Popen(
        [
            sys.executable, "-c",
            "import os, subprocess, sys\n"
            "child = subprocess.Popen([sys.executable, '-m', 'fedgraft_server.tied',"
            " str(os.getpid()), '/bin/sleep', '60'])\n"
            "print(child.pid, flush=True)\n"
            "child.wait()",
        ],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    deadline = time.monotonic() + 10
    while child.name() != "sleep":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    child.wait(10)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_tied_process_whose_parent_is_gone_does_not_start() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedgraft_server.tied", "1", "/bin/echo", "started"],
        capture_output=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, b"")
