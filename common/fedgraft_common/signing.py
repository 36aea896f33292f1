"""The operator's signature on a plan and the auditor's on a report: Ed25519 over canonical JSON.

Ed25519 from the `cryptography` package; the text is prefixed so that a signature on a plan is never
one on anything else that the same key signs.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedgraft_common.errors import AuditError, PlanError

_PLAN = b"fedgraft plan\n"
_AUDIT = b"fedgraft audit\n"


def sign_plan(canonical: str, key: Ed25519PrivateKey) -> str:
    """The signature of a plan, in hexadecimal."""
    return key.sign(_PLAN + canonical.encode()).hex()


def check_signature(canonical: str, signature: str, key: Ed25519PublicKey) -> None:
    """Refuses a plan that the federation's operator did not sign.

    Raises:
        PlanError: there is no signature, or it is for something else.
    """
    if not _is_signed(_PLAN + canonical.encode(), signature, key):
        raise PlanError(
            "plan: signature", signature[:16] or "none", "the federation operator's",
            "The plan was altered, or comes from another server; nothing was done.",
        )  # fmt: skip


def sign_audit(canonical: str, key: Ed25519PrivateKey) -> str:
    """The signature of an audit's report, in hexadecimal."""
    return key.sign(_AUDIT + canonical.encode()).hex()


def check_audit(canonical: str, signature: str, key: Ed25519PublicKey) -> None:
    """Refuses a report that the auditor did not sign.

    Raises:
        AuditError: there is no signature, or it is for something else.
    """
    if not _is_signed(_AUDIT + canonical.encode(), signature, key):
        raise AuditError(
            "audit.json: signature", signature[:16] or "none", "the auditor's, on this report",
            "The report was altered after it was signed; ask the auditor for the original.",
        )  # fmt: skip


def _is_signed(text: bytes, signature: str, key: Ed25519PublicKey) -> bool:
    try:
        key.verify(bytes.fromhex(signature), text)
    except (InvalidSignature, ValueError):
        return False
    return True
