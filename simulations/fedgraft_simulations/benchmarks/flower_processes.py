"""Flower's own processes on loopback, for benchmarks and tests: started, waited for, stopped.

Every process gets a private FLWR_HOME and is stopped by its process id, with its children.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

START = 60.0  # seconds a process may take to start
STOP = 10.0  # seconds it may take to end before it is killed


def free_port() -> int:
    """A TCP port of the loopback address that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def process(
    command: Sequence[str], home: Path, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[psutil.Process]:
    """A process with a private FLWR_HOME; stopped at the end, with everything it started.

    Args:
        command: a program beside this Python, and its arguments.
        home: FLWR_HOME.
        log: where its output goes.
        environment: variables in addition to this process' own.
    """
    home.mkdir(parents=True, exist_ok=True)
    surroundings = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(part for part in sys.path if part),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    program = str(Path(sys.executable).parent / command[0])
    with log.open("ab") as output:
        child = subprocess.Popen(
            [program, *command[1:]],
            env=surroundings | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    started = psutil.Process(child.pid)
    try:
        yield started
    finally:
        family = [started, *started.children(recursive=True)] if child.poll() is None else []
        for member in family[:1]:
            member.terminate()
        _, alive = psutil.wait_procs(family, timeout=STOP)
        for member in alive:
            member.kill()
        child.wait(STOP)


@contextmanager
def superlink(
    directory: Path, port: int | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """An unmodified SuperLink without TLS on loopback; its `host:port`."""
    port = port or free_port()
    command = [
        "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port),
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    log = directory / "superlink.log"
    with process(command, directory / "superlink-home", log, environment) as started:
        wait_for(f"http://127.0.0.1:{port}/health", started, log)
        yield f"127.0.0.1:{port}"


@contextmanager
def supernode(
    address: str,
    directory: Path,
    name: str,
    config: str = "",
    environment: Mapping[str, str] | None = None,
) -> Iterator[psutil.Process]:
    """An unmodified SuperNode without TLS; returns at once, before it has connected."""
    command = [
        "flower-supernode", "--insecure", "--superlink", address, "--port", str(free_port()),
        *(["--node-config", config] if config else []),
    ]  # fmt: skip
    home, log = directory / f"{name}-home", directory / f"{name}.log"
    with process(command, home, log, environment) as started:
        yield started


def wait_for(url: str, started: psutil.Process, log: Path) -> None:
    """Waits until a server answers.

    Raises:
        RuntimeError: it ended, or did not answer in time; with the end of its log.
    """
    end = time.monotonic() + START
    while time.monotonic() < end and started.is_running():
        try:
            if httpx.get(url, timeout=2.0).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"no answer from {url}: {log.read_text(errors='replace')[-2000:]}")
