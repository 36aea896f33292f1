"""The parts of an audit, in the order in which they run; one line each.

A part is loaded when it is asked for, so that `fedgraft audit --part ledger` starts fast.
"""

from __future__ import annotations

from importlib import import_module

from fedgraft_common.errors import PlanError
from fedgraft_simulations.audit.part import Part

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
