"""A throw-away certificate authority, for benchmarks and tests on loopback."""

from __future__ import annotations

import datetime as dt
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgraft_common.backbone_protocol import TlsFiles

_LIFETIME = dt.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class LoopbackAuthority:
    """A CA with its key in memory; files go to `directory`."""

    directory: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def create(cls, directory: Path) -> LoopbackAuthority:
        """A new CA; ca.pem is written."""
        directory.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("Test CA")
        builder = _builder(name, name, key.public_key(), _LIFETIME)
        extension = x509.BasicConstraints(ca=True, path_length=0)
        certificate = builder.add_extension(extension, critical=True).sign(key, hashes.SHA256())
        (directory / "ca.pem").write_bytes(_pem(certificate))
        return cls(directory, key, certificate)

    def server(self, name: str = "server", lifetime: dt.timedelta = _LIFETIME) -> TlsFiles:
        """Files of a server on 127.0.0.1."""
        hosts = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        return self._issue(name, ExtendedKeyUsageOID.SERVER_AUTH, lifetime, hosts)

    def site(self, name: str, lifetime: dt.timedelta = _LIFETIME) -> TlsFiles:
        """Files of a site; a negative lifetime gives a certificate that has expired."""
        return self._issue(name, ExtendedKeyUsageOID.CLIENT_AUTH, lifetime, None)

    def _issue(
        self,
        name: str,
        usage: x509.ObjectIdentifier,
        lifetime: dt.timedelta,
        hosts: x509.SubjectAlternativeName | None,
    ) -> TlsFiles:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(name), self.certificate.subject, key.public_key(), lifetime)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
        if hosts is not None:
            builder = builder.add_extension(hosts, critical=False)
        files = TlsFiles(
            self.directory / "ca.pem",
            self.directory / f"{name}.pem",
            self.directory / f"{name}.key",
        )
        files.certificate.write_bytes(_pem(builder.sign(self.key, hashes.SHA256())))
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return files


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, lifetime: dt.timedelta
) -> x509.CertificateBuilder:
    end = dt.datetime.now(dt.UTC) + lifetime
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - abs(lifetime) - dt.timedelta(hours=1))
        .not_valid_after(end)
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
