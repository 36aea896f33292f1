"""The parts of an audit, in the order in which they run; one line each.

A part is loaded when it is asked for, so that `fedgraft audit --part ledger` starts fast.
"""

from __future__ import annotations

import logging
import time
from importlib import import_module

from fedgraft_common.errors import FedgraftError, PlanError
from fedgraft_simulations.audit.part import AuditContext, Finding, Part, PartResult, Report

log = logging.getLogger(__name__)

PARTS: dict[str, str] = {
    "ledger": "fedgraft_simulations.audit.ledger:LedgerPart",
    "egress": "fedgraft_simulations.audit.egress:EgressPart",
    "mechanism": "fedgraft_simulations.audit.mechanism:MechanismPart",
    "membership": "fedgraft_simulations.audit.membership:MembershipPart",
    "inversion": "fedgraft_simulations.audit.inversion:InversionPart",
    "robustness": "fedgraft_simulations.audit.robustness:RobustnessPart",
}
"""Name to `module:class`; the class takes no arguments."""


def load_part(name: str) -> Part:
    """The part of this name.

    Raises:
        PlanError: there is none.
    """
    if name not in PARTS:
        raise PlanError("--part", name, ", ".join(PARTS), "Name parts of the audit.")
    module, _, kind = PARTS[name].partition(":")
    part: Part = getattr(import_module(module), kind)()
    return part


def run_part(part: Part, context: AuditContext, progress: Report) -> PartResult:
    """Runs a part; one that cannot be finished has failed, and the others still run."""
    started = time.perf_counter()
    try:
        return part.run(context, progress)
    except Exception as error:
        if not isinstance(error, FedgraftError):
            log.exception("the part %s broke off", part.name)
        reason = str(error) or type(error).__name__
    return PartResult(
        name=part.name,
        title=part.title,
        verdict="fail",
        summary="This part could not be finished, so it shows nothing.",
        findings=(Finding("The part can be run to its end", reason, "fail", name="finished"),),
        seconds=time.perf_counter() - started,
    )
