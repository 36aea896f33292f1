"""Runs that go on whatever dies: the server looks after those that ended without having ended.

A run is over when its own process said so (`outcome.json`) or the coordinator stopped it. Until
then somebody has to work on it. If nobody does (the process was killed, or the SuperLink, or the
whole server), Flower is told that its process is gone, which Flower itself would notice a minute
later, and a new one is started; it goes on at the round after the newest checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from fedgraft_common.errors import FedgraftError, ServerError
from fedgraft_common.plan import Plan
from fedgraft_server.registry import Registry
from fedgraft_server.run_folder import (
    FAILED,
    INTERRUPTED,
    RUNNING,
    STOPPED,
    Outcome,
    RunFolder,
)
from fedgraft_server.runs import Runs, RunState
from fedgraft_server.settings import ServerDirectory

log = logging.getLogger(__name__)

ATTEMPTS: Final = 10
"""Processes in a row that may die without finishing a round, before the run counts as failed."""
_PATIENCE: Final = 300.0  # seconds that a process may take from its start until it holds its run
_SETTLING: Final = 3.0  # seconds until a process that was just begun can be seen
_LAST_WAIT: Final = 60.0  # seconds between two attempts at most


def standing(folder: RunFolder, newest: RunState | None) -> str:
    """Where a run stands, in a word.

    Args:
        folder: of the run.
        newest: what Flower says about it, if anything.

    Returns:
        `completed`, `failed`, `stopped`, `running`, or `pending` and `starting` before that; or
        `interrupted`: the server will continue it.
    """
    if (outcome := folder.outcome) is not None:
        return outcome.word
    if folder.facts.stopped:
        return STOPPED
    if folder.is_worked_on():
        return RUNNING
    return INTERRUPTED if newest is None or newest.is_over else newest.status


def begin(server: ServerDirectory, folder: RunFolder, link: Runs) -> int:
    """Starts a run, or lets it go on. Call it inside `folder.changing()`.

    Args:
        server: its registry says who takes part: a site that was revoked is left out.
        folder: of the run, with run.json.
        link: to the SuperLink.

    Returns:
        Flower's number.

    Raises:
        ServerError: too few sites, no backbone, or the SuperLink cannot be reached or refuses.
    """
    facts, plan = folder.facts, folder.plan
    with Registry(server.registry) as registry:
        present = {site.name: site for site in registry.sites() if site.revoked is None}
    if gone := [name for name in facts.sites if name not in present]:
        log.warning("%s: without %s", folder.name, ", ".join(gone), extra={"action": "revoked"})
    members = [present[name] for name in facts.sites if name in present]
    if unknown := [site.name for site in members if site.node_id is None]:
        raise ServerError(
            "sites", ", ".join(unknown), "sites that the SuperLink knows",
            "Start `fedgraft server up` and try again in a moment.",
        )  # fmt: skip
    if len(members) < plan.aggregation.minimum_sites:
        raise ServerError(
            "sites", f"{len(members)} ({', '.join(site.name for site in members) or 'none'})",
            f"at least {plan.aggregation.minimum_sites} (aggregation.minimum_sites)",
            "Invite more sites, or lower aggregation.minimum_sites.",
        )  # fmt: skip
    backbone = _assembled(server, plan)
    for state in link.of(folder.name):  # an attempt whose answer was lost
        if not state.is_over:
            link.stop(state.id)
    folder.reopen()
    nodes = [site.node_id for site in members if site.node_id is not None]
    return link.start(
        plan, folder.path, nodes, facts.signature, backbone, server.ca[0], server.registry
    )


def _assembled(server: ServerDirectory, plan: Plan) -> Path | None:
    """Where a `server:NAME` backbone lies on the server itself."""
    if not plan.backbone.source.startswith("server:"):
        return None
    from fedgraft_common.backbone_protocol import ManifestRequest
    from fedgraft_server.backbone_library import BackboneLibrary

    config = plan.backbone
    request = ManifestRequest(sha256=config.sha256, manifest_sha256=config.manifest_sha256)
    return BackboneLibrary(server.backbones).assembled(request)


@dataclass(slots=True)
class _Care:
    """What is remembered of a run between two looks.

    Attributes:
        attempts: continuations in a row without a finished round.
        round: newest finished round at the last one.
        after: clock before which there is no other.
        idle: Flower's number and the clock when it was first seen without a process.
        told: what was last logged about it.
    """

    attempts: int = 0
    round: int = -1
    after: float = 0.0
    idle: tuple[int, float] = (0, 0.0)
    told: str = ""


class Continuation:
    """Looks after all runs of a server.

    Args:
        server: the server's directory.
        link: to its SuperLink.
        launched: seconds since the epoch when the SuperExec was started that runs now; processes
            that an earlier one began are dead or about to be.
        alive: how many processes of this SuperExec there are now.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        server: ServerDirectory,
        link: Runs,
        launched: Callable[[], float],
        alive: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = server
        self._link = link
        self._launched = launched
        self._alive = alive
        self._clock = clock
        self._spare = 0  # processes that are alive and hold no run, at the last look
        self._cares: dict[str, _Care] = {}

    def look(self) -> None:
        """Continues every run that nobody works on.

        Raises:
            ServerError: the SuperLink cannot be reached.
        """
        folders = RunFolder.all(self._server.runs)
        idle = [folder for folder in folders if self._is_idle(folder)]
        if not idle:
            return
        self._spare = self._alive() - sum(folder.is_worked_on() for folder in folders)
        states = self._link.all()
        for folder in idle:
            mine = [state for state in states if state.folder == folder.name]
            care = self._cares.setdefault(folder.name, _Care())
            try:
                if self._is_due(folder, mine, care):
                    self._continue(folder, care)
            except FedgraftError as error:
                if care.told != str(error):
                    log.warning("%s: %s", folder.name, error, extra={"action": "continue"})
                care.told = str(error)
                care.after = self._clock() + _LAST_WAIT / 12

    def _is_idle(self, folder: RunFolder) -> bool:
        try:
            over = folder.outcome is not None or folder.facts.stopped
            return not over and not folder.is_worked_on() and not folder.is_changing()
        except (FedgraftError, OSError):
            return False  # damaged: `fedgraft runs` says so

    def _is_due(self, folder: RunFolder, states: list[RunState], care: _Care) -> bool:
        """Whether its process is gone for good, and it is time for another."""
        now = self._clock()
        if now < care.after:
            return False
        under_way = [state for state in states if not state.is_over]
        return all(self._is_dead(folder, state, care, now) for state in under_way)

    def _is_dead(self, folder: RunFolder, state: RunState, care: _Care, now: float) -> bool:
        if not state.claimed:
            return False  # pending: the SuperExec will take it
        if folder.worker == state.id:
            return True  # it held the run and does not any more
        if datetime.fromisoformat(state.claimed).timestamp() < self._launched():
            return True
        if care.idle[0] != state.id:
            care.idle = state.id, now
        # It may be slow on a busy machine, as long as there is a process that may be it.
        return now - care.idle[1] >= (_PATIENCE if self._spare > 0 else _SETTLING)

    def _continue(self, folder: RunFolder, care: _Care) -> None:
        with folder.changing():
            if folder.outcome is not None or folder.facts.stopped or folder.is_worked_on():
                return
            states = self._link.of(folder.name)  # anew: a command may have been quicker
            if not self._is_due(folder, states, care):
                return
            finished = folder.round
            care.attempts = 1 if finished > care.round else care.attempts + 1
            care.round = finished
            if care.attempts > ATTEMPTS:
                reason = (
                    f"Its process died {ATTEMPTS} times in a row before it had finished round "
                    f"{finished + 1}. Look into `fedgraft logs {folder.name}` and at the memory "
                    f"and the disk of this machine; then `fedgraft resume {folder.name}`."
                )
                folder.end(Outcome(FAILED, reason))
                log.error("%s: %s", folder.name, reason, extra={"action": "give-up"})
                return
            number = begin(self._server, folder, self._link)
            care.after = self._clock() + min(2.0 ** (care.attempts - 1), _LAST_WAIT)
            care.told = ""
        log.warning(
            "%s was cut short; it goes on at round %d (run %d of Flower)", folder.name,
            finished + 1, number, extra={"action": "continue"},
        )  # fmt: skip
