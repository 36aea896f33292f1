"""A malicious server over real processes: gateway with mutual TLS, SuperLink, `fedgraft site up`.

The server is the federation's own, with its operator's key; only the ServerApp it runs is hostile.
The site is the daemon of `fedgraft site up` with randomness of the operating system.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch

from fedgraft_client.site_file import load_site_file
from fedgraft_common.accounting import SamplingEvent
from fedgraft_common.adapted import adapted_backbone
from fedgraft_common.backbone import load_backbone
from fedgraft_common.errors import ServerError
from fedgraft_common.mechanism import step_noise
from fedgraft_common.modality import fits
from fedgraft_common.plan import Plan
from fedgraft_server.registry import Registry
from fedgraft_server.runs import STUB, Runs, stub
from fedgraft_server.settings import ServerDirectory
from fedgraft_server.superlink import SuperLink
from fedgraft_simulations.audit.hostile import HostileServer
from fedgraft_simulations.audit.hostile_server import ANSWERS, JOB, stages
from fedgraft_simulations.audit.part import Finding
from fedgraft_simulations.audit.robustness import (
    alter_backbone,
    ledger_finding,
    plan_of_attack,
)
from fedgraft_simulations.federation.processes import COMMAND, Federation
from fedgraft_simulations.partition import Share

SITE_FILE = """name = "{name}"
classes = {classes}
device = "cpu"
[data]
name = "records"
source = "train.npz"
unit = "{unit}"
nominal_size = {units}
[policy]
maximum_epsilon = {epsilon}
maximum_delta = {delta}
backbones = ["{backbone}"]
"""
START = 90.0  # seconds for a server and a site to find each other
RUN = 300.0  # seconds for all attempts


def attack_processes(plan: Plan, share: Share, directory: Path) -> list[Finding]:
    """Lets a hostile server loose on a site, each in processes of their own.

    Args:
        plan: under audit.
        share: the records of the site.
        directory: new.

    Returns:
        What the site answered, and what its ledger says; one finding that decides nothing if the
        processes could not be started on this machine.
    """
    if share.spec is not None or not fits(share.train.inputs, "image"):
        return [_not_tried("the site is written as a file of images with classes")]
    try:
        return _attack(plan, share, directory)
    except (ServerError, OSError) as error:
        return [_not_tried(f"the processes did not do as they should: {error}")]


def _not_tried(why: str) -> Finding:
    words = why.splitlines()[0]
    return Finding(
        "Over real processes a site refuses the same", "not tried", "info", words, "processes"
    )


def write_site(directory: Path, share: Share, plan: Plan) -> None:
    """Writes `site.toml` and `train.npz` of a site that allows this backbone and this epsilon."""
    images = share.train.inputs
    assert isinstance(images, torch.Tensor)  # noqa: S101 - see `attack_processes`
    arrays = {"images": images.permute(0, 2, 3, 1).numpy(), "labels": share.train.labels.numpy()}
    if share.train.units is not None:
        arrays[plan.privacy.unit] = share.train.units.numpy()
    np.savez(directory / "train.npz", **arrays)  # type: ignore[arg-type]
    text = SITE_FILE.format(
        name=share.name,
        classes=json.dumps(list(share.classes)),
        unit=plan.privacy.unit,
        units=share.train.unit_count,
        epsilon=plan.privacy.epsilon,
        delta=plan.privacy.delta,
        backbone=plan.backbone.sha256,
    )
    (directory / "site.toml").write_text(text, encoding="utf-8")


def _attack(plan: Plan, share: Share, directory: Path) -> list[Finding]:
    backbone = load_backbone(plan.backbone)
    plan = plan_of_attack(plan, backbone.sha256)
    with Federation(directory, plan) as federation:
        altered, sha256 = alter_backbone(backbone.directory, directory / "altered")
        job = {"server": str(federation.server), "altered": str(altered), "altered_sha256": sha256}
        (directory / JOB).write_text(json.dumps(job), encoding="utf-8")
        federation.start_server()
        federation.join(share, plan)
        home = directory / share.name
        write_site(home, share, plan)
        site_file = home / "site.toml"
        federation.start(share.name, [str(COMMAND), "site", "up", "--site", str(site_file)])
        server = ServerDirectory(federation.server)
        node = _connected(server, share.name)
        _run(server, plan, directory, node, federation)
        answers = json.loads((directory / ANSWERS).read_text(encoding="utf-8"))
    initial = adapted_backbone(plan).state()
    hostile = HostileServer(plan, server.operator_private_key(), initial, str(altered), sha256)
    expected = [attempt for stage in stages(hostile) for attempt in stage]
    wrong = [
        f"{attempt.title}: {found['answer']}"
        for attempt, found in zip(expected, answers, strict=True)
        if found["answer"] not in [word.value for word in attempt.expected]
    ]
    file = load_site_file(site_file)
    ledger = file.store_directory(home) / "ledger.sqlite3"
    event = step_noise(plan, share.train.unit_count, share.name).event
    assert event is not None  # noqa: S101 - the local mechanism has noise
    cost = SamplingEvent(event.sample_rate, event.noise_multiplier, plan.training.local_steps)
    honest = sum(attempt.spends for attempt in expected)
    account = ledger_finding(plan, ledger, cost, honest)
    return [
        Finding(
            "Over real processes a site refuses the same: mutual TLS, SuperLink, site daemon",
            f"{len(expected) - len(wrong)} of {len(expected)} as they must be",
            "fail" if wrong else "pass",
            "; ".join(wrong) or "The hostile ServerApp had the operator's key.",
            "processes",
        ),
        Finding(f"Real processes: {account.claim.lower()}", account.measured, account.verdict,
                account.detail),
    ]  # fmt: skip


def _connected(server: ServerDirectory, name: str) -> int:
    """The site's node id, as soon as the SuperLink says it is online."""
    end = time.monotonic() + START
    while time.monotonic() < end:
        with Registry(server.registry) as registry:
            node = registry.node_ids([name]).get(name)
        if node is not None:
            with _runs(server) as runs:
                if any(n.id == node and n.status == "online" for n in runs.nodes()):
                    return node
        time.sleep(0.3)
    raise ServerError(f"site {name}", "not connected", "a site that connects", "See its log.")


def _runs(server: ServerDirectory) -> Runs:
    superlink = SuperLink(server, server.settings())
    return Runs(superlink.address, superlink.client_context())


def _run(
    server: ServerDirectory, plan: Plan, directory: Path, node: int, federation: Federation
) -> None:
    """Runs the hostile ServerApp to its end."""
    text = stub()[STUB].decode()
    hostile = text.replace("fedgraft_server.app:app", f"{__package__}.hostile_server:app")
    config = {"plan": plan.canonical, "directory": str(directory), "sites": str(node)}
    with _runs(server) as runs:
        number = runs.start_bundle({STUB: hostile.encode()}, config)
        end = time.monotonic() + RUN
        while time.monotonic() < end:
            state = runs.state(number)
            if state.status == "finished":
                break
            time.sleep(0.3)
        if not (directory / ANSWERS).exists():
            raise ServerError(
                "hostile run", f"{state.status} {state.outcome} {state.details}".strip(),
                "a run that ends", federation.log("server")[-500:],
            )  # fmt: skip
