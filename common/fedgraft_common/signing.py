"""A plan and the operator's signature on it: Ed25519 over the canonical JSON.

Ed25519 from the `cryptography` package; the text is prefixed so that a signature on a plan is never
one on anything else that the same key signs.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedgraft_common.errors import PlanError

_PURPOSE = b"fedgraft plan\n"


def sign_plan(canonical: str, key: Ed25519PrivateKey) -> str:
    """The signature of a plan, in hexadecimal."""
    return key.sign(_PURPOSE + canonical.encode()).hex()


def check_signature(canonical: str, signature: str, key: Ed25519PublicKey) -> None:
    """Refuses a plan that the federation's operator did not sign.

    Raises:
        PlanError: there is no signature, or it is for something else.
    """
    try:
        key.verify(bytes.fromhex(signature), _PURPOSE + canonical.encode())
    except (InvalidSignature, ValueError):
        raise PlanError(
            "plan: signature", signature[:16] or "none", "the federation operator's",
            "The plan was altered, or comes from another server; nothing was done.",
        ) from None  # fmt: skip
