"""Reading certificates and keys, with errors that say what to do. Issuing is the server's."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

from fedgraft_common.errors import IdentityError

MAX_PEM: Final = 64 * 1024
"""Bytes; a chain of certificates is far below it."""
UNREADABLE: Final = (
    ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm,
    x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType,
)  # fmt: skip
"""What `cryptography` raises for keys and certificates that are damaged or of no kind it knows.

Much is read when it is asked for, not when it is loaded: `public_key()` may raise each of them."""


def read_certificate(path: Path) -> x509.Certificate:
    """The first certificate of a PEM file.

    Raises:
        IdentityError: missing or not a certificate.
    """
    try:
        return x509.load_pem_x509_certificate(read_pem(path))
    except UNREADABLE:
        raise _unreadable(path, "no certificate", "a certificate in PEM format") from None


def read_private_key(path: Path) -> PrivateKeyTypes:
    """An unencrypted private key in a PEM file.

    Raises:
        IdentityError: missing, or not such a key.
    """
    try:
        return serialization.load_pem_private_key(read_pem(path), password=None)
    except UNREADABLE:
        raise _unreadable(path, "no usable key", "an unencrypted private key in PEM") from None


def read_pem(path: Path) -> bytes:
    """The bytes of a small file.

    Raises:
        IdentityError: missing, unreadable or too large.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise _unreadable(path, "no such file", "a file written by fedgraft") from None
    except OSError as error:
        raise _unreadable(path, error.strerror or "an error", "a readable file") from None
    if len(content) > MAX_PEM:
        raise _unreadable(path, f"{len(content)} bytes", f"at most {MAX_PEM} bytes")
    return content


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate (DER), hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def check_validity(certificate: x509.Certificate, where: str, now: dt.datetime) -> None:
    """Holds a certificate against a clock.

    Args:
        certificate: any.
        where: the file it is from.
        now: with time zone.

    Raises:
        IdentityError: expired, or not valid yet.
    """
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise IdentityError(
            where, f"a certificate that expired on {end:%Y-%m-%d %H:%M} UTC",
            f"one that is valid now ({now:%Y-%m-%d %H:%M} UTC)",
            "Check this machine's clock; if it is right, ask the federation's operator to revoke "
            "this site and to invite it again.",
        )  # fmt: skip
    if now < begin:
        raise IdentityError(
            where, f"a certificate that is valid from {begin:%Y-%m-%d %H:%M} UTC",
            f"one that is valid now ({now:%Y-%m-%d %H:%M} UTC)",
            "Set this machine's clock right.",
        )  # fmt: skip


def is_renewal_due(certificate: x509.Certificate, now: dt.datetime) -> bool:
    """Whether less than a third of the lifetime is left."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return end - now < (end - begin) / 3


def is_pair(certificate: x509.Certificate, key: PrivateKeyTypes) -> bool:
    """Whether a private key belongs to a certificate."""
    return public_pem(key.public_key()) == public_pem(certificate.public_key())


def public_pem(key: PublicKeyTypes) -> str:
    """SubjectPublicKeyInfo in PEM: the form in which Flower compares node keys."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form).decode("ascii")


def private_pem(key: PrivateKeyTypes) -> bytes:
    """PKCS#8 in PEM, without a passphrase: a daemon starts unattended, file modes protect it."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def is_on_curve(key: object, curve: type[ec.EllipticCurve]) -> bool:
    """Whether a private or public key is an elliptic-curve key on this curve."""
    kinds = ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey
    return isinstance(key, kinds) and isinstance(key.curve, curve)


def _unreadable(path: Path, found: str, allowed: str) -> IdentityError:
    return IdentityError(
        str(path), found, allowed,
        "Restore the directory from a backup; without one, a site has to be invited again.",
    )  # fmt: skip
