"""Every error Fedgraft raises on purpose.

    FedgraftError
    ├── PlanError         a plan field, or the plan file itself
    ├── PrivacyError      a privacy parameter that cannot be met
    ├── BackboneError     a backbone directory, manifest or weights file
    ├── AdapterError      an adapter method or target that does not fit the backbone
    ├── ExportError       an adapted model in a format that cannot hold it
    ├── GradientError     per-example gradients that cannot be made exact
    ├── DeviceError       a site's machine: memory, disk
    ├── DataError         a site's records
    ├── LedgerError       a site's privacy ledger: damaged, rolled back, in use, overdrawn
    ├── PolicyError       what a site's own policy does not allow, or the site file is wrong
    │   ├── BudgetError       it would cost more privacy than the site has left
    │   ├── ApprovalError     the operator has not approved the plan yet
    │   ├── HoursError        not at this time of day
    │   └── SealedError       the site has left this run for good
    ├── EgressError       something that must not leave a site was about to
    ├── MessageError      what arrived over the network
    ├── AggregationError  a secure sum that cannot be finished
    ├── LinkError         the connection between a site and the server
    ├── CheckpointError   a server checkpoint or a site's store
    ├── IdentityError     an invite, a certificate, a key, or who may connect
    ├── ServerError       the federation server's directory, ports or processes
    └── AuditError        an audit's report: missing, altered, or signed by somebody else

Each one says the same four things, so that whoever reads it (a researcher, a hospital's
IT person) knows what to do next: the field or file, the value found, what is allowed, and
the action to take.
"""

from __future__ import annotations

from typing import Final

MOST: Final = 500
"""Characters of a field's name or a value that are shown: a server may send megabytes of them."""


class FedgraftError(Exception):
    """Base class; see the tree above.

    Args:
        field: the configuration field, file or tensor the error is about.
        value: what was found there.
        allowed: what would have been accepted.
        action: what the reader should do next.
    """

    def __init__(self, field: str, value: object, allowed: str, action: str) -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        self.action = action
        super().__init__(field, value, allowed, action)

    def __str__(self) -> str:
        found = repr(self.value) if isinstance(self.value, str) else str(self.value)
        field = _shown(self.field)
        return f"{field}: found {_shown(found)}; allowed: {self.allowed}. {self.action}"


def _shown(text: str) -> str:
    return text if len(text) <= MOST else f"{text[:MOST]}... ({len(text):,} characters)"


class PlanError(FedgraftError):
    """A plan field, or the plan file itself, is wrong."""


class PrivacyError(FedgraftError):
    """A privacy parameter is outside its range or cannot be met."""


class BackboneError(FedgraftError):
    """A backbone cannot be loaded, or is not the one the plan names."""


class AdapterError(FedgraftError):
    """An adapter does not fit its backbone."""


class ExportError(FedgraftError):
    """An adapted model cannot be written in another format."""


class GradientError(FedgraftError):
    """No available method computes exact per-example gradients for this model."""


class DeviceError(FedgraftError):
    """The machine that a site computes on has no room for the work."""


class DataError(FedgraftError):
    """A site's records cannot be used."""


class LedgerError(FedgraftError):
    """A ledger is damaged, was rolled back or is in use."""


class PolicyError(FedgraftError):
    """The site's own policy does not allow it."""


class BudgetError(PolicyError):
    """It would cost more privacy than the site has left."""


class ApprovalError(PolicyError):
    """The site's operator has not approved this plan."""


class HoursError(PolicyError):
    """The site does not take part at this time of day."""


class SealedError(PolicyError):
    """The site's head was refitted without noise; it takes no part in that run again."""


class EgressError(FedgraftError):
    """A reply holds something that must not leave the site."""


class MessageError(FedgraftError):
    """A message does not follow the protocol."""


class AggregationError(FedgraftError):
    """A secure sum cannot be finished; no site's input has been revealed."""


class LinkError(FedgraftError):
    """A site cannot reach the server, or the server does not let it in."""


class CheckpointError(FedgraftError):
    """Saved state is missing, damaged or belongs to another plan."""


class IdentityError(FedgraftError):
    """An invite, a certificate or a key cannot be used, or its owner may not connect."""


class ServerError(FedgraftError):
    """The federation server cannot be set up or cannot run."""


class AuditError(FedgraftError):
    """An audit's report is missing, was altered, or is signed by somebody else."""
