"""Starts and stops the processes of a real federation on loopback, each by its own id."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fedgraft_common.errors import ServerError
from fedgraft_common.files import write_atomically
from fedgraft_common.plan import Plan
from fedgraft_simulations.partition import Share

COMMAND = Path(sys.executable).with_name("fedgraft")
HOST = "127.0.0.1"
_SITE_FILE = """name = "{name}"
classes = {classes}
[data]
name = "records"
source = "none.npz"
nominal_size = {units}
[policy]
maximum_epsilon = {epsilon}
maximum_delta = {delta}
mechanisms = ["local", "distributed"]
"""


def site_file(share: Share, plan: Plan) -> str:
    """The configuration of a rehearsed site, with a budget for many runs of the plan."""
    return _SITE_FILE.format(
        name=share.name,
        classes=list(share.classes),
        units=share.train.unit_count,
        epsilon=plan.privacy.epsilon * 1000,
        delta=plan.privacy.delta,
    )


class Federation:
    """A server and sites below one directory.

    Args:
        directory: new; holds the server's directory and one for each site.
        plan: says how many sites there are and what they hold.
    """

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.directory = directory
        self.server = directory / "server"
        self.plan_file = directory / "plan.json"
        self.names = [f"branch-{number:02d}" for number in range(plan.sites.count)]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        directory.mkdir(parents=True)
        write_atomically(self.plan_file, plan.model_dump_json().encode())
        port = free_ports(5)
        self.fedgraft("server", "init", str(self.server), "--host", HOST, "--bind", HOST,
                      "--port", str(port))  # fmt: skip

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def fedgraft(self, *arguments: str, timeout: float = 120) -> str:
        """Runs a command to its end and returns what it printed.

        Raises:
            ServerError: it failed.
        """
        done = subprocess.run(  # noqa: S603
            [str(COMMAND), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment(),
        )
        if done.returncode:
            raise ServerError(
                f"fedgraft {' '.join(arguments[:2])}", done.stderr.strip() or done.returncode,
                "a command that succeeds", "See the logs in the directory of the federation.",
            )  # fmt: skip
        return done.stdout

    def environment(self) -> dict[str, str]:
        """No telemetry, and Flower's own files below the directory."""
        return {
            **os.environ,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_HOME": str(self.directory / "flower"),
            "FEDGRAFT_SERVER_DIR": str(self.server),
            "OMP_NUM_THREADS": "1",
        }

    def start_server(self) -> None:
        """`fedgraft server up`; returns at once."""
        self.start("server", [str(COMMAND), "server", "up", str(self.server)])

    def join(self, share: Share, plan: Plan, groups: Sequence[str] = ()) -> None:
        """Invites a site, writes its site file and lets it join."""
        home = self.directory / share.name
        home.mkdir()
        write_atomically(home / "site.toml", site_file(share, plan).encode())
        self.admit(share.name, groups)

    def admit(self, name: str, groups: Sequence[str] = ()) -> Path:
        """Invites a site and lets it join; retries while the server starts.

        Returns:
            Its identity directory.
        """
        named = [option for group in groups for option in ("--group", group)]
        invite = self.fedgraft("server", "invite", name, *named).strip()
        identity = self.directory / name / "home" / "identity"
        end = time.monotonic() + 60
        while True:
            try:
                self.fedgraft("site", "join", invite, "--home", str(identity))
                return identity
            except ServerError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)

    def start_site(self, name: str) -> None:
        """The site's daemon; returns at once."""
        number = self.names.index(name)
        module = "fedgraft_simulations.federation.site"
        site_file = str(self.directory / name / "site.toml")
        self.start(
            name, [sys.executable, "-m", module, site_file, str(self.plan_file), str(number)]
        )

    def start(self, name: str, command: list[str]) -> None:
        """Starts a process; what it writes goes to `NAME.log`."""
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(  # noqa: S603
                command, stdout=log, stderr=log, env=self.environment()
            )

    def stop(self, timeout: float = 30) -> None:
        """SIGTERM to every process that runs, sites first; SIGKILL to those that do not end."""
        for name in sorted(self.processes, key=lambda name: name == "server"):
            process = self.processes[name]
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()

    def log(self, name: str) -> str:
        """What a process has written so far."""
        return (self.directory / f"{name}.log").read_text(encoding="utf-8", errors="replace")


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on."""
    for _ in range(200):
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            first = int(probe.getsockname()[1])
        if first + count < 65536 and all(_is_free(first + offset) for offset in range(count)):
            return first
    raise ServerError("ports", "none free", f"{count} free ports", "Stop some other servers.")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
