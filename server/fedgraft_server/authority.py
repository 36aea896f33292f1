"""The federation's certificate authority: one per server directory, trusted by nothing else.

A site's certificate may only be used as a client's and the server's only as a server's
(extended key usage), so no site can pose as the server to another site. Subjects come from the
registry, never from the request: of a site's request only the public key is used.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgraft_common.atomic import write_atomically
from fedgraft_common.certificates import (
    UNREADABLE,
    certificate_pem,
    check_validity,
    is_on_curve,
    is_pair,
    is_renewal_due,
    private_pem,
    public_pem,
    read_certificate,
    read_private_key,
)
from fedgraft_common.errors import IdentityError, ServerError
from fedgraft_server.registry import Registry
from fedgraft_server.settings import ServerDirectory, Settings

CA_LIFETIME: Final = dt.timedelta(days=3650)
SERVER_LIFETIME: Final = dt.timedelta(days=397)
_SKEW: Final = dt.timedelta(minutes=10)  # clocks of sites may be this much behind
_LOOPBACK: Final = ("127.0.0.1", "localhost")


@dataclass(frozen=True, slots=True)
class Authority:
    """The CA's certificate and key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def load(cls, directory: ServerDirectory) -> Authority:
        """Reads ca.pem and ca.key.

        Raises:
            IdentityError: missing, damaged, or not a pair.
        """
        certificate_path, key_path = directory.ca
        certificate, key = read_certificate(certificate_path), read_private_key(key_path)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not is_pair(certificate, key):
            raise IdentityError(
                str(key_path), "a key that does not belong to ca.pem", "the CA's own key",
                "Restore both from the same backup.",
            )  # fmt: skip
        return cls(certificate, key)

    def issue_site(
        self, name: str, key: ec.EllipticCurvePublicKey, lifetime: dt.timedelta, now: dt.datetime
    ) -> x509.Certificate:
        """A client certificate for a site; it ends no later than the CA's own."""
        return self._issue(name, key, lifetime, now, ExtendedKeyUsageOID.CLIENT_AUTH, ())

    def issue_server(
        self,
        hosts: tuple[str, ...],
        key: ec.EllipticCurvePublicKey,
        lifetime: dt.timedelta,
        now: dt.datetime,
    ) -> x509.Certificate:
        """A server certificate for names and addresses."""
        return self._issue(hosts[0], key, lifetime, now, ExtendedKeyUsageOID.SERVER_AUTH, hosts)

    def _issue(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        lifetime: dt.timedelta,
        now: dt.datetime,
        usage: x509.ObjectIdentifier,
        hosts: tuple[str, ...],
    ) -> x509.Certificate:
        own_key = x509.SubjectKeyIdentifier.from_public_key(key)
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = (
            _builder(name, now, min(now + lifetime, self.certificate.not_valid_after_utc))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
            .add_extension(own_key, critical=False)
            .add_extension(signer, critical=False)
        )
        if hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self.key, hashes.SHA256())


def requested_key(pem: str) -> ec.EllipticCurvePublicKey:
    """The public key of a certificate request, after its own signature is verified.

    Raises:
        IdentityError: not such a request.
    """
    try:
        request = x509.load_pem_x509_csr(pem.encode("ascii"))
        key = request.public_key()
        if not request.is_signature_valid:
            raise InvalidSignature
    except UNREADABLE:
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not is_on_curve(key, ec.SECP256R1):
        raise IdentityError(
            "certificate request", "something else",
            "a PEM request, signed with its own EC P-256 key",
            "Join with the fedgraft of the same version as the server's.",
        )  # fmt: skip
    return key


def create(directory: ServerDirectory, settings: Settings, now: dt.datetime) -> Authority:
    """Writes federation.toml, the CA, the server's certificates, operator's key and registry.

    Args:
        directory: made here; must not hold a federation yet.
        settings: for federation.toml.
        now: with time zone.

    Raises:
        ServerError: the directory holds something already.
    """
    if directory.path.exists() and any(directory.path.iterdir()):
        raise ServerError(
            str(directory.path), "a directory with something in it", "a new or empty directory",
            "Choose another; a CA is never overwritten, because every site's trust hangs on it.",
        )  # fmt: skip
    directory.path.mkdir(parents=True, exist_ok=True)
    directory.path.chmod(0o700)
    key = ec.generate_private_key(ec.SECP256R1())
    name = f"{settings.federation.name} CA"
    certificate = (
        _builder(name, now, now + CA_LIFETIME)
        .issuer_name(_subject(name))
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    authority = Authority(certificate, key)
    operator = ed25519.Ed25519PrivateKey.generate()
    operator_public, operator_private = directory.operator
    write_atomically(operator_private, private_pem(operator))
    write_atomically(operator_public, public_pem(operator.public_key()).encode())
    write_atomically(directory.ca[1], private_pem(key))
    write_atomically(directory.ca[0], certificate_pem(certificate))
    renew_server_certificates(directory, settings, authority, now)
    Registry(directory.registry).close()
    directory.write_settings(settings)  # last: with it the directory counts as a server's
    return authority


def renew_server_certificates(
    directory: ServerDirectory, settings: Settings, authority: Authority, now: dt.datetime
) -> bool:
    """Issues the server's own certificates anew if that is due or the host name changed.

    The SuperLink's lasts as long as the CA, because only this machine ever sees it and replacing
    it would restart the SuperLink.

    Returns:
        Whether a certificate was replaced.
    """
    replaced = False
    for (certificate_path, key_path), hosts, lifetime in (
        (directory.server, (settings.federation.host,), SERVER_LIFETIME),
        (directory.superlink, _LOOPBACK, CA_LIFETIME),
    ):
        if certificate_path.exists() and key_path.exists():
            certificate = read_certificate(certificate_path)
            same = is_pair(certificate, read_private_key(key_path))  # not after a crash in between
            if same and _names(certificate) == hosts and not is_renewal_due(certificate, now):
                continue
        key = ec.generate_private_key(ec.SECP256R1())
        issued = authority.issue_server(hosts, key.public_key(), lifetime, now)
        write_atomically(key_path, private_pem(key))
        write_atomically(certificate_path, certificate_pem(issued))
        replaced = True
    return replaced


def check_own_certificates(directory: ServerDirectory, now: dt.datetime) -> None:
    """Refuses to start with certificates every site would refuse.

    Raises:
        IdentityError: the CA's or the server's certificate is missing, expired or not valid yet.
    """
    for path, _ in (directory.ca, directory.server, directory.superlink):
        check_validity(read_certificate(path), str(path), now)


def _builder(name: str, now: dt.datetime, end: dt.datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(end)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _key_usage(ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return tuple(str(name.value) for name in names)
