"""What is under deploy/: containers, chart, units, dashboard, guide. Long, for it is all of it.

No container or cluster runs here. hadolint reads the Dockerfiles, Helm itself renders the chart
and systemd-analyze reads the units, where they are installed; beyond that the files are held
against rules of our own. Not covered: that an image builds and starts, that Docker Compose or a
cluster accepts its file (only its structure is looked at), that Grafana draws the dashboard, and
that CUDA works under the site's unit.
"""

from __future__ import annotations

import configparser
import importlib.util
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import click
import pytest
import yaml
from pydantic import BaseModel

from fedgraft_client.health import Health, State
from fedgraft_client.policy import Policy
from fedgraft_client.site_file import Data, Monitoring, SiteFile, load_site_file
from fedgraft_common.cli import COMMANDS, group
from fedgraft_common.messages import Status
from fedgraft_common.task_spec import TaskSpec
from fedgraft_server import authority
from fedgraft_server.registry import utc_now
from fedgraft_server.settings import ServerDirectory, Settings

ROOT: Final = Path(__file__).parents[2]
DEPLOY: Final = ROOT / "deploy"
GUIDE: Final = DEPLOY / "operators-guide.md"
CHART: Final = DEPLOY / "helm" / "fedgraft"
DOCKERFILES: Final = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
UNITS: Final = sorted((DEPLOY / "systemd").glob("*.service"))

METRICS: Final = {
    "fedgraft_rounds_total": {"status"},
    "fedgraft_round_seconds": set(),
    "fedgraft_epsilon_spent": set(),
    "fedgraft_epsilon_limit": set(),
    "fedgraft_connected": set(),
    "fedgraft_last_round": set(),
    "fedgraft_server_rounds_total": set(),
    "fedgraft_server_updates_total": {"status"},
    "fedgraft_server_sites_connected": set(),
}
"""Every metric, with its own labels."""

PENDING: Final[dict[str, str]] = {}
"""Commands that the guide names and that do not exist yet."""

PORTS: Final = Settings.model_validate({"federation": {"name": "f", "host": "f.example"}})
OPEN: Final = [PORTS.gateway.port, PORTS.gateway.join_port, PORTS.backbone.port]
SUPERLINK: Final = [PORTS.superlink.port, PORTS.superlink.fleet_port]


# --- Dockerfiles


def program(name: str) -> str:
    """One that a development dependency brings, or the machine has."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def instructions(file: Path) -> list[tuple[str, str]]:
    """Instruction and argument of each line, continued lines joined, comments gone."""
    text = re.sub(r"(?m)^\s*#.*\n", "", file.read_text(encoding="utf-8"))
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines) if word]


def faults(file: Path) -> list[str]:
    """What breaks our own rules for images."""
    found, lines = [], instructions(file)
    stages = [rest for word, rest in lines if word == "FROM"]
    if len(stages) < 2:
        found.append("one stage: the tools of the build would ship")
    for image in (stage.split()[0] for stage in stages):
        tag = image.partition(":")[2]
        if not re.search(r"\d+\.\d+\.\d+", tag):
            found.append(f"{image}: not pinned to a version")
    last = lines[max(i for i, (word, _) in enumerate(lines) if word == "FROM") :]
    users = [rest for word, rest in last if word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", users[-1]):
        found.append("the last USER is not a number other than root's")
    if not any(word == "HEALTHCHECK" and "CMD" in rest for word, rest in last):
        found.append("no HEALTHCHECK")
    if ("STOPSIGNAL", "SIGTERM") not in last:
        found.append("no STOPSIGNAL SIGTERM")
    for word, rest in last:
        if word == "EXPOSE" and not set(map(int, rest.split())) <= set(OPEN):
            found.append(f"EXPOSE {rest}")
    for word, rest in lines:
        if word in {"ARG", "ENV"} and re.search(r"(?i)password|token|secret|_key\b", rest):
            found.append(f"{word} {rest}: a secret would stay in the image")
        if word == "ADD" or (word == "COPY" and re.match(r"\.\s", rest)):
            found.append(f"{word} {rest}: takes more than it names")
    return found


def test_there_is_a_server_and_a_site() -> None:
    assert [file.name for file in DOCKERFILES] == ["server.Dockerfile", "site.Dockerfile"]
    assert "FROM nvidia/cuda:" in DOCKERFILES[1].read_text(encoding="utf-8")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint_has_nothing_to_say(file: Path) -> None:
    done = subprocess.run(
        [program("hadolint"), "--no-color", file], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_a_dockerfile_keeps_our_rules(file: Path) -> None:
    assert faults(file) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("FROM python:3.11.13-slim-bookworm", "FROM python:latest", "not pinned"),
        ("USER 10001:10001", "USER root", "the last USER"),
        ("HEALTHCHECK", "LABEL x=", "no HEALTHCHECK"),
        ("EXPOSE 9443 9444 9445", "EXPOSE 9443 9446", "EXPOSE 9443 9446"),
        ("COPY common common", "COPY . .", "takes more"),
        ("ENV PATH", "ENV CA_KEY=x PATH", "a secret"),
        ("STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL", "no STOPSIGNAL"),
    ],
)
def test_a_fault_in_a_dockerfile_is_found(tmp_path: Path, old: str, new: str, fault: str) -> None:
    text = DOCKERFILES[0].read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "Dockerfile").write_text(text.replace(old, new))
    assert any(fault in found for found in faults(tmp_path / "Dockerfile"))


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_what_is_copied_exists_and_is_let_through(file: Path) -> None:
    ignored = file.with_name(file.name + ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert next(line for line in ignored if not line.startswith("#")) == "*"
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert {"**/*.key", "**/*.pem"} <= set(ignored)
    copied = set()
    for word, rest in instructions(file):
        if word == "COPY" and not rest.startswith("--from"):
            copied |= set(rest.split()[:-1])
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_an_image_starts_a_command_that_exists(file: Path) -> None:
    facts = dict(instructions(file))
    words = json.loads(facts["ENTRYPOINT"]) + json.loads(facts["CMD"])
    assert words[0] == "fedgraft"
    assert command(words[1:]) is not None


# --- Health checks of the images


class Answer(BaseHTTPRequestHandler):
    """The joining port, as far as the health check asks it."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/ca" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Quiet."""


@contextmanager
def joining_port(files: ServerDirectory, status: int) -> Iterator[int]:
    certificate, key = files.server
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    handler = type("Answer", (Answer,), {"status": status})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def healthy(check: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, DEPLOY / "docker" / check],
        env=os.environ | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stderr


def federation(path: Path) -> ServerDirectory:
    files = ServerDirectory(path)
    authority.create(files, PORTS, utc_now())
    return files


def set_join_port(files: ServerDirectory, port: int) -> None:
    gateway = PORTS.gateway.model_copy(update={"join_port": port})
    files.write_settings(PORTS.model_copy(update={"gateway": gateway}))


def test_health_of_a_server(tmp_path: Path) -> None:
    files, other = federation(tmp_path / "server"), federation(tmp_path / "other")
    here = {"FEDGRAFT_SERVER_DIR": str(files.path)}
    with joining_port(files, 200) as port:
        set_join_port(files, port)
        assert healthy("server_health.py", **here) == (0, "")
    assert healthy("server_health.py", **here)[0] == 1  # gone
    with joining_port(files, 503) as port:
        set_join_port(files, port)
        assert healthy("server_health.py", **here) == (1, "not healthy: status 503\n")
    with joining_port(other, 200) as port:  # a certificate that no site would accept
        set_join_port(files, port)
        code, said = healthy("server_health.py", **here)
        assert code == 1 and "certificate verify failed" in said
    code, said = healthy("server_health.py", FEDGRAFT_SERVER_DIR=str(tmp_path / "none"))
    assert code == 1 and "not healthy: FileNotFoundError" in said


def test_health_of_a_site(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    here = {"FEDGRAFT_SITE": str(site)}
    site.write_text('home = "here"\n')
    (tmp_path / "here").mkdir()
    status = tmp_path / "here" / "status.json"  # where `fedgraft_client.up` has it written
    assert healthy("site_health.py", **here)[0] == 1
    Health(State.WAITING, connected=True).write(status)
    assert healthy("site_health.py", **here) == (0, "")
    Health(State.CONNECTING, connected=False).write(status)
    assert healthy("site_health.py", **here) == (1, "not healthy: connecting, connected: False\n")
    Health(State.STOPPED, connected=True).write(status)
    assert healthy("site_health.py", **here)[0] == 1


# --- Compose


def compose() -> dict[str, Any]:
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def test_compose_has_one_server_and_three_sites() -> None:
    document = compose()
    known = {"build", "cap_drop", "depends_on", "image", "init", "logging", "mem_limit"}
    known |= {"networks", "pids_limit", "ports", "read_only", "restart", "security_opt"}
    known |= {"stop_grace_period", "stop_signal", "tmpfs", "volumes"}
    services = document["services"]
    assert set(services) == {"server", "north", "south", "west"}
    assert {key for key in document if not key.startswith("x-")} == {
        "name", "services", "networks", "volumes",
    }  # fmt: skip
    for name, service in services.items():
        assert set(service) <= known, name
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["stop_signal"] == "SIGTERM" and service["init"] is True, name
        assert service["restart"] == "unless-stopped", name
        assert re.search(r":\d+\.\d+\.\d+$", service["image"]), name
        assert (ROOT / service["build"]["dockerfile"]).is_file(), name
        assert (DEPLOY / service["build"]["context"]).resolve() == ROOT, name
        assert set(service["networks"]) <= set(document["networks"]), name
        for volume in service["volumes"]:
            source, _, rest = volume.partition(":")
            # A folder of this machine is read only; what is written to is a named volume.
            assert source in document["volumes"] or rest.endswith(":ro"), volume
    used = [v.split(":")[0] for s in services.values() for v in s["volumes"] if v[0] != "."]
    assert sorted(used) == sorted(document["volumes"])  # each belongs to one service


def test_compose_opens_three_ports_of_the_server_and_none_of_a_site() -> None:
    document = compose()
    server = document["services"].pop("server")
    assert server["ports"] == [f"{port}:{port}" for port in OPEN]
    assert "build" in server and "server.Dockerfile" in server["build"]["dockerfile"]
    assert document["networks"]["federation"] == {"internal": True}
    for name, site in document["services"].items():
        assert "ports" not in site
        assert site["networks"] == ["federation"]  # no way out but to the server
        assert site["depends_on"] == {"server": {"condition": "service_healthy"}}
        assert {f"{name}:/var/lib/fedgraft", f"{name}-witness:/var/lib/fedgraft-witness"} <= set(
            site["volumes"]
        )


def test_compose_adds_a_gpu_to_each_site() -> None:
    document = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text(encoding="utf-8"))
    assert set(document["services"]) == {"north", "south", "west"}
    for service in document["services"].values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]


# --- Chart

RENDER: Final = """
import json, sys
import helm_python
chart, values = sys.argv[1], json.loads(sys.argv[2])
lint = helm_python.lint(chart, values, strict=True)
try:
    with helm_python.Chart.load(chart) as loaded:
        loaded.validate_schema(values)
        files = loaded.render(values, name="demo", namespace="prod")
    print(json.dumps({"lint": lint, "files": files, "error": ""}))
except helm_python.HelmError as error:
    print(json.dumps({"lint": lint, "files": {}, "error": str(error)}))
"""
HOST: Final = {"host": "fed.example.org"}


def rendered(values: Mapping[str, object], chart: Path = CHART) -> dict[str, Any]:
    """What Helm 4 makes of the chart, in a process of its own: it is written in Go."""
    if importlib.util.find_spec("helm_python") is None:
        pytest.skip("helm-python-sdk is not installed (there are wheels for x86-64 only)")
    done = subprocess.run(
        [sys.executable, "-c", RENDER, chart, json.dumps(values)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def objects(values: Mapping[str, object], chart: Path = CHART) -> dict[str, dict[str, Any]]:
    """Kubernetes objects by `kind/name`."""
    document = rendered(values, chart)
    assert document["error"] == ""
    found = {}
    for name, text in document["files"].items():
        if not name.endswith(".txt"):
            for item in filter(None, yaml.safe_load_all(text)):
                found[f"{item['kind']}/{item['metadata']['name']}"] = item
    return found


def test_the_chart_lints_and_renders() -> None:
    document = rendered(HOST)
    assert document["lint"]["errors"] == []
    found = objects(HOST)
    assert set(found) == {
        "Service/demo-server", "Service/demo-server-pod", "StatefulSet/demo-server",
        "NetworkPolicy/demo-server",
    }  # fmt: skip
    notes = document["files"]["fedgraft/templates/NOTES.txt"]
    assert "fed.example.org, ports\n9443, 9444 and 9445" in notes


def test_the_charts_version_is_the_packages() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert chart["appVersion"] == project["version"]
    for image in (f"fedgraft-{name}:{project['version']}" for name in ("server", "site")):
        assert image in (DEPLOY / "compose.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("port", [9443, 12000])
def test_the_chart_opens_three_ports(port: int) -> None:
    found = objects(HOST | {"port": port})
    (container,) = found["StatefulSet/demo-server"]["spec"]["template"]["spec"]["containers"]
    named = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert named == {"gateway": port, "join": port + 1, "backbone": port + 2}
    service = found["Service/demo-server"]["spec"]
    assert {p["name"]: p["port"] for p in service["ports"]} == named
    assert all(p["targetPort"] == p["name"] for p in service["ports"])
    assert found["Service/demo-server-pod"]["spec"]["clusterIP"] == "None"
    policy = found["NetworkPolicy/demo-server"]["spec"]
    assert [p["port"] for p in policy["ingress"][0]["ports"]] == list(named)
    assert policy["policyTypes"] == ["Ingress", "Egress"] and policy["egress"] == []
    selector = found["StatefulSet/demo-server"]["spec"]["selector"]["matchLabels"]
    labels = found["StatefulSet/demo-server"]["spec"]["template"]["metadata"]["labels"]
    assert service["selector"] == selector == policy["podSelector"]["matchLabels"]
    assert selector.items() <= labels.items()
    assert str(port + 3) not in json.dumps(found)  # the SuperLink's


def test_the_charts_pod_is_guarded_and_keeps_its_state() -> None:
    spec = objects(HOST)["StatefulSet/demo-server"]["spec"]
    assert spec["replicas"] == 1
    pod = spec["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not pod.get("hostNetwork") and len(pod["containers"]) == 1  # loopback is shared in a pod
    user = dict(instructions(DOCKERFILES[0]))["USER"]
    identity = pod["securityContext"]
    assert user == f"{identity['runAsUser']}:{identity['runAsGroup']}"
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["image"] == "fedgraft-server:0.1.0"
        assert {"name": "state", "mountPath": "/var/lib/fedgraft"} in container["volumeMounts"]
        for item in container["env"]:
            assert isinstance(item["value"], str)
    (container,) = pod["containers"]
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container)
    assert command(container["args"]) is not None
    (claim,) = spec["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert claim["spec"]["resources"] == {"requests": {"storage": "20Gi"}}
    assert spec["persistentVolumeClaimRetentionPolicy"] == {
        "whenDeleted": "Retain", "whenScaled": "Retain",
    }  # fmt: skip


def test_the_charts_init_makes_a_directory_once(tmp_path: Path) -> None:
    """The script that the chart renders, run here with a `fedgraft` that writes down its call."""
    pod = objects(HOST | {"federation": "lungs & hearts", "port": 12000})[
        "StatefulSet/demo-server"
    ]["spec"]["template"]["spec"]
    (init,) = pod["initContainers"]
    called = tmp_path / "called"
    fake = tmp_path / "fedgraft"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {called}\n')
    fake.chmod(0o700)
    state = tmp_path / "state"
    environment = {item["name"]: item["value"] for item in init["env"]}
    environment |= {"FEDGRAFT_SERVER_DIR": str(state), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    words = [*init["command"], *init["args"]]
    subprocess.run(words, env=environment, check=True, timeout=60)
    expected = ["server", "init", str(state), "--host", "fed.example.org"]
    expected += ["--name", "lungs & hearts", "--port", "12000"]
    assert called.read_text().splitlines() == expected
    state.mkdir()
    (state / "federation.toml").touch()
    called.unlink()
    subprocess.run(words, env=environment, check=True, timeout=60)
    assert not called.exists()
    found = command(words := expected[:2])
    assert found is not None, words
    options = {name for item in found.params for name in item.opts}
    assert {"--host", "--name", "--port"} <= options


def test_the_charts_settings() -> None:
    values = HOST | {
        "service": {"type": "LoadBalancer", "sourceRanges": ["192.0.2.0/24"]},
        "persistence": {"size": "5Gi", "storageClass": "fast"},
        "networkPolicy": {"enabled": False},
        "image": {"repository": "mirror.example/fedgraft", "tag": "9.9.9", "pullSecrets": [{}]},
    }
    found = objects(values)
    assert "NetworkPolicy/demo-server" not in found
    assert found["Service/demo-server"]["spec"]["loadBalancerSourceRanges"] == ["192.0.2.0/24"]
    spec = found["StatefulSet/demo-server"]["spec"]
    assert spec["volumeClaimTemplates"][0]["spec"]["storageClassName"] == "fast"
    assert spec["template"]["spec"]["containers"][0]["image"] == "mirror.example/fedgraft:9.9.9"
    inside = objects(HOST | {"service": {"type": "ClusterIP"}})["Service/demo-server"]["spec"]
    assert "externalTrafficPolicy" not in inside


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "host"),
        (HOST | {"hots": "x"}, "hots"),
        (HOST | {"host": "a b"}, "host"),
        (HOST | {"port": 65535}, "port"),
        (HOST | {"image": {"tag": "latest"}}, "tag"),
        (HOST | {"replicas": 2}, "replicas"),
    ],
)
def test_the_chart_refuses(values: Mapping[str, object], said: str) -> None:
    assert said in rendered(values)["error"]


# --- systemd

HARDENING: Final = {
    "NoNewPrivileges": "yes", "PrivateTmp": "yes", "ProtectSystem": "strict", "ProtectHome": "yes",
    "CapabilityBoundingSet": "", "AmbientCapabilities": "", "ProtectClock": "yes",
    "ProtectKernelModules": "yes", "ProtectKernelTunables": "yes", "ProtectKernelLogs": "yes",
    "ProtectControlGroups": "yes", "RestrictNamespaces": "yes", "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes", "SystemCallFilter": "@system-service", "UMask": "0077",
    "SystemCallArchitectures": "native",
}  # fmt: skip


def service(file: Path) -> configparser.SectionProxy:
    unit = configparser.RawConfigParser(strict=False, delimiters=("=",), comment_prefixes=("#",))
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(file, encoding="utf-8")
    assert set(unit) == {"DEFAULT", "Unit", "Service", "Install"}
    return unit["Service"]


@pytest.mark.parametrize("file", UNITS, ids=lambda file: file.stem)
def test_a_unit_is_hardened_and_drains(file: Path) -> None:
    found = service(file)
    assert {key: found.get(key) for key in HARDENING} == HARDENING
    assert found["User"] == found["Group"] == file.stem
    assert f"/var/lib/{file.stem}" in found["ReadWritePaths"].split()
    assert all(path.startswith("/var/lib/") for path in found["ReadWritePaths"].split())
    assert found["Restart"] == "always" and found["KillSignal"] == "SIGTERM"
    assert int(found["TimeoutStopSec"]) >= (1800 if "site" in file.stem else 60)
    program_, *words = found["ExecStart"].split()
    assert program_ == "/opt/fedgraft/bin/fedgraft"
    assert command(words) is not None


def test_there_is_a_unit_for_either_side() -> None:
    assert [file.stem for file in UNITS] == ["fedgraft-server", "fedgraft-site"]
    assert service(UNITS[0])["PrivateDevices"] == "yes"
    assert service(UNITS[1])["DevicePolicy"] == "closed"
    assert "/var/lib/fedgraft-witness" in service(UNITS[1])["ReadWritePaths"]


@pytest.mark.parametrize("file", UNITS, ids=lambda file: file.stem)
def test_systemd_accepts_a_unit(file: Path, tmp_path: Path) -> None:
    analyze = program("systemd-analyze")
    copy = tmp_path / file.name  # the program has to exist
    text = file.read_text(encoding="utf-8")
    copy.write_text(text.replace("/opt/fedgraft/bin/fedgraft", shutil.which("true") or ""))
    done = subprocess.run(
        [analyze, "verify", "--man=no", copy], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    done = subprocess.run(
        [analyze, "security", "--offline=yes", "--threshold=20", copy],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze is too old for --offline")
    assert done.returncode == 0, done.stdout  # exposure at most 2.0 of 10


# --- Dashboard


def expressions(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "expr":
                yield value
            else:
                yield from expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from expressions(value)


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    board = json.loads((DEPLOY / "grafana" / "fedgraft.json").read_text(encoding="utf-8"))
    queries = list(expressions(board))
    asked = {name for query in queries for name in re.findall(r"\bfedgraft_\w+", query)}
    assert asked == set(METRICS)  # none that does not exist, and none forgotten
    for query in queries:
        names = re.findall(r"\bfedgraft_\w+", query)
        grouped = [
            label.strip()
            for labels in re.findall(r"\bby\s*\(([^)]*)\)", query)
            for label in labels.split(",")
        ]
        allowed = {"instance", "job"}.union(*(METRICS[name] for name in names))
        assert set(grouped) <= allowed, query
        if any(name.endswith("_total") for name in names):
            assert re.search(r"\b(rate|increase)\(", query), query
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    for panel in board["panels"]:
        if panel["type"] != "row":
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
            assert panel["title"] and panel["description"] and panel["targets"]
            letters = [target["refId"] for target in panel["targets"]]
            assert len(set(letters)) == len(letters)


# --- The operator's guide


def command(words: list[str]) -> click.Command | None:
    """The command that words lead to; None if there is none."""
    context = click.Context(group)
    found: click.Command = group
    for word in words:
        if word.startswith("-") or not isinstance(found, click.Group):
            break
        if found is group:
            if word not in COMMANDS:
                return None
            _, real, _ = group.resolve_command(context, [word])
            assert real is not None
            found = real
        else:
            inner = found.get_command(context, word)
            if inner is None:
                return None
            found = inner
    return found


def calls() -> Iterator[tuple[list[str], set[str]]]:
    """Every `fedgraft ...` of the guide's code: its words, and its long options."""
    text = GUIDE.read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for code in [line for block in blocks for line in block.splitlines()] + spans:
        for call in re.findall(r"(?:^|[\s#])fedgraft ([^|>]+)", code):
            words = list(takewhile(re.compile(r"[a-z]+(-[a-z]+)*").fullmatch, call.split()))
            if words:
                yield words, {word for word in call.split() if word.startswith("--")}


def named() -> set[str]:
    return {" ".join(words) for words, _ in calls()}


def between(mark: str) -> str:
    text = GUIDE.read_text(encoding="utf-8")
    return text.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0]


def test_every_command_in_the_guide_exists() -> None:
    found = named()
    assert {"server init", "site join", "site up", "ledger recover", "run"} <= found
    missing = {call for call in found if command(call.split()) is None}
    assert missing == set(PENDING), "a command is missing, or one of PENDING is there by now"


def test_every_command_in_the_guide_has_a_help_page(capsys: pytest.CaptureFixture[str]) -> None:
    for call in sorted(named() - set(PENDING)):
        found = command(call.split())
        assert found is not None
        assert found.main(["--help"], prog_name="fedgraft", standalone_mode=False) in (0, None)
        assert "Usage" in capsys.readouterr().out


def test_options_in_the_guide_exist() -> None:
    seen = set()
    for words, options in calls():
        found = command(words)
        if found is not None:
            known = {name for item in found.params for name in item.opts}
            assert options <= known, words
            seen |= options
    assert {"--home", "--host", "--group", "--adapter"} <= seen


def test_every_site_command_is_in_the_guide() -> None:
    for name in ("site", "ledger", "server"):
        found = command([name])
        assert isinstance(found, click.Group)
        for inner in found.list_commands(click.Context(found)):
            if not isinstance(command([name, inner]), click.Group):
                assert f"{name} {inner}" in named()


def test_the_site_file_in_the_guide(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(between("site.toml").split("```toml\n")[1].split("```")[0])
    file = load_site_file(tmp_path / "site.toml")
    unit = service(UNITS[1])["ReadWritePaths"].split()
    assert file.home.startswith(unit[0]) and str(file.witness).startswith(unit[1])


def test_the_guide_has_every_key_of_a_site_file_with_its_default() -> None:
    expected = {}
    tables: dict[str, type[BaseModel]] = {
        "": SiteFile, "data.": Data, "task.": TaskSpec, "policy.": Policy,
        "monitoring.": Monitoring,
    }  # fmt: skip
    for prefix, model in tables.items():
        for key, field in model.model_fields.items():
            if key in {"data", "task", "policy", "monitoring"}:
                continue
            if field.is_required():
                expected[prefix + key] = "required"
            elif field.default is None:
                expected[prefix + key] = "absent"
            else:
                value = field.get_default(call_default_factory=True)
                expected[prefix + key] = json.dumps(value)
    rows = re.findall(r"^\| `([\w.]+)` \| ([^|]+) \|", between("keys"), re.MULTILINE)
    found = {key: default.partition(":")[0].strip(" `") for key, default in rows}
    assert found == expected


def test_the_guide_explains_every_status_word() -> None:
    words = re.findall(r"^\| `([a-z-]+)` \|", between("statuses"), re.MULTILINE)
    assert sorted(words) == sorted(status.value for status in Status)


def test_the_guide_has_every_file_of_a_server(tmp_path: Path) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for file in federation(tmp_path / "server").path.iterdir():
        if not file.name.endswith(("-wal", "-shm")):
            assert f"`{file.name}`" in text


def test_ports_in_the_guide_and_its_links() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| P(?:\+\d)? \| (\d+) \|", text, re.MULTILINE)
    assert list(map(int, rows)) == [*OPEN, *SUPERLINK]
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (DEPLOY / link).exists(), link
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
        assert anchor in slugs
