"""The Ed25519 key that signs a site's ledger: made once, never replaced."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedgraft_common.atomic import write_new
from fedgraft_common.errors import LedgerError


def signing_key(path: Path, durable: bool, existing: bool) -> Ed25519PrivateKey:
    """Reads the key, or makes one for a new ledger.

    Args:
        path: of the key, in PEM.
        durable: whether to wait for the disk, and to insist on the key of an existing ledger.
        existing: whether there is a ledger already.

    Raises:
        LedgerError: it is missing though there is a ledger, or is no Ed25519 key.
    """
    if not path.exists():
        if existing and durable:
            raise LedgerError(
                str(path), "no such file", "the key that signed this ledger",
                "Put it back from a backup; a ledger cannot be continued without it.",
            )  # fmt: skip
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        if write_new(path, pem, durable):
            return key  # else another process was first: theirs counts
    try:
        found = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, OSError) as error:
        raise LedgerError(
            str(path), str(error), "an Ed25519 key in PEM", "Put it back from a backup."
        ) from None
    if not isinstance(found, Ed25519PrivateKey):
        raise LedgerError(
            str(path), type(found).__name__, "an Ed25519 key in PEM", "Put it back from a backup."
        )
    return found
