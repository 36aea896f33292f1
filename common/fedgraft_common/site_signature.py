"""A site's signature, by the key of its certificate, and who vouches for that certificate.

ECDSA on P-256 with SHA-256 (the key the site joined with), in the deterministic form of RFC 6979:
signing the same text again gives the same bytes, so an answer can be repeated after a crash. Every
text is prefixed with its purpose; TLS, which uses the same key, signs nothing with these prefixes.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgraft_common.certificates import (
    check_validity,
    is_on_curve,
    is_pair,
    read_certificate,
)
from fedgraft_common.errors import IdentityError, MessageError

_PREFIX: Final = b"fedgraft "


@dataclass(frozen=True, slots=True)
class SiteKey:
    """What a site signs with.

    Attributes:
        name: the site's, as in the certificate's subject.
        certificate: of the federation's CA, or in a simulation of a throwaway one.
        key: P-256, the certificate's.
    """

    name: str
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    def __post_init__(self) -> None:
        if common_name(self.certificate) != self.name or not is_pair(self.certificate, self.key):
            raise IdentityError(
                f"key of site {self.name}", "another site's certificate or key",
                "the certificate and the key of this site", "Restore both from the same backup.",
            )  # fmt: skip

    @property
    def certificate_der(self) -> bytes:
        """The certificate as it travels."""
        return self.certificate.public_bytes(serialization.Encoding.DER)

    def sign(self, purpose: str, content: bytes) -> bytes:
        """70 to 72 bytes, the same each time."""
        algorithm = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
        return self.key.sign(_text(purpose, content), algorithm)


@dataclass(frozen=True, slots=True)
class Trust:
    """Whose certificates count.

    The CA is the federation operator's, and the operator runs the server: a server that misuses
    the CA's key can issue a certificate in any name. What a site does about that is another matter:
    `fedgraft_client.peers`.

    Attributes:
        ca: the federation's.
        now: the time at which certificates must be valid, with time zone.
    """

    ca: x509.Certificate
    now: dt.datetime

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Trust in the CA of a PEM file, as of now.

        Raises:
            IdentityError: no certificate there.
        """
        return cls(read_certificate(path), dt.datetime.now(dt.UTC))

    def check(self, name: str, certificate_der: bytes) -> ec.EllipticCurvePublicKey:
        """The key that a site signs with, after its certificate has been checked.

        Args:
            name: the site that is said to send it.
            certificate_der: what arrived.

        Raises:
            IdentityError: not a valid client certificate of this CA for this name.
        """
        where = f"certificate of site {name}"
        try:
            certificate = x509.load_der_x509_certificate(certificate_der)
            certificate.verify_directly_issued_by(self.ca)
            usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
            ours = ExtendedKeyUsageOID.CLIENT_AUTH in usage and common_name(certificate) == name
            key = certificate.public_key()
        except Exception:  # a stranger's bytes: the library has a dozen kinds, not all documented
            ours = False
        if not ours:
            raise _distrust(where, "something else", "one the federation's CA issued to this site")
        check_validity(certificate, where, self.now)
        if not isinstance(key, ec.EllipticCurvePublicKey) or not is_on_curve(key, ec.SECP256R1):
            raise _distrust(where, "another kind of key", "an EC P-256 key")
        return key


def public_key(certificate_der: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a certificate that `Trust.check` has accepted before."""
    key = x509.load_der_x509_certificate(certificate_der).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise _distrust("certificate of a site", "another kind of key", "an EC P-256 key")
    return key


def verify(
    key: ec.EllipticCurvePublicKey, purpose: str, content: bytes, signature: bytes, who: str
) -> None:
    """Checks a site's signature.

    Raises:
        MessageError: it is by another key, or for another text or purpose.
    """
    try:
        key.verify(signature, _text(purpose, content), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise MessageError(
            f"{purpose} of site {who}", "a signature that does not fit",
            "one by the key of the site's certificate",
            "Somebody changed the message on the way; nothing was done.",
        ) from None  # fmt: skip


def key_fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the public key (SubjectPublicKeyInfo, DER), hexadecimal."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def common_name(certificate: x509.Certificate) -> str:
    """The name in a certificate's subject; empty if there is not exactly one."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def _text(purpose: str, content: bytes) -> bytes:
    return _PREFIX + purpose.encode("ascii") + b"\n" + content


def _distrust(where: str, found: str, allowed: str) -> IdentityError:
    return IdentityError(
        where, found, allowed,
        "Somebody may be posing as that site. Nothing was sent; tell the site and the operator.",
    )  # fmt: skip
