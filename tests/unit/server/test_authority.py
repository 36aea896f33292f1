from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgraft_common.certificates import is_pair, read_certificate, read_private_key
from fedgraft_common.errors import IdentityError, ServerError
from fedgraft_server.authority import (
    Authority,
    check_own_certificates,
    create,
    renew_server_certificates,
    requested_key,
)
from fedgraft_server.settings import FederationTable, ServerDirectory, Settings

START = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
SETTINGS = Settings(federation=FederationTable(name="test", host="fed.example.org"))


@pytest.fixture
def directory(tmp_path: Path) -> ServerDirectory:
    made = ServerDirectory(tmp_path / "server")
    create(made, SETTINGS, START)
    return made


def request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, name: str = "x") -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    signed = builder.sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


def usages(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def test_files_are_private(directory: ServerDirectory) -> None:
    assert directory.path.stat().st_mode & 0o777 == 0o700
    names = {file.name for file in directory.path.iterdir()}
    assert names >= {"ca.pem", "ca.key", "server.pem", "server.key", "operator.key"}
    assert all(file.stat().st_mode & 0o077 == 0 for file in directory.path.iterdir())
    assert directory.settings() == SETTINGS


def test_a_directory_with_something_in_it_is_left_alone(directory: ServerDirectory) -> None:
    before = {file: file.read_bytes() for file in directory.path.iterdir()}
    with pytest.raises(ServerError, match="a CA is never overwritten"):
        create(directory, SETTINGS, START)
    assert before == {file: file.read_bytes() for file in directory.path.iterdir()}


def test_sites_are_clients_only_and_the_server_is_a_server_only(
    directory: ServerDirectory,
) -> None:
    authority = Authority.load(directory)
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    site = authority.issue_site("north", key, DAY, START)
    assert usages(site) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    for path, _ in (directory.server, directory.superlink):
        assert usages(read_certificate(path)) == [ExtendedKeyUsageOID.SERVER_AUTH]
    constraints = site.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical and not constraints.value.ca
    site.verify_directly_issued_by(authority.certificate)


def test_no_certificate_outlives_the_ca(directory: ServerDirectory) -> None:
    authority = Authority.load(directory)
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    late = authority.issue_site("north", key, 800 * DAY, START + 3600 * DAY)
    assert late.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_server_certificate_is_renewed_in_its_last_third_or_for_another_host(
    directory: ServerDirectory,
) -> None:
    authority = Authority.load(directory)
    assert not renew_server_certificates(directory, SETTINGS, authority, START + 200 * DAY)
    before = directory.superlink[0].read_bytes()
    assert renew_server_certificates(directory, SETTINGS, authority, START + 300 * DAY)
    assert read_certificate(directory.server[0]).not_valid_after_utc == START + 697 * DAY
    assert directory.superlink[0].read_bytes() == before
    other = SETTINGS.model_copy(
        update={"federation": FederationTable(name="test", host="192.0.2.7")}
    )
    assert renew_server_certificates(directory, other, authority, START + 300 * DAY)
    assert not renew_server_certificates(directory, other, authority, START + 300 * DAY)


def test_a_crash_between_key_and_certificate_is_repaired(directory: ServerDirectory) -> None:
    certificate, key = directory.server
    key.write_bytes(directory.superlink[1].read_bytes())
    authority = Authority.load(directory)
    assert renew_server_certificates(directory, SETTINGS, authority, START)
    assert is_pair(read_certificate(certificate), read_private_key(key))


def test_expired_and_premature_certificates_stop_the_start(directory: ServerDirectory) -> None:
    check_own_certificates(directory, START)
    with pytest.raises(IdentityError, match=r"ca\.pem: .*expired on 2039-12-30"):
        check_own_certificates(directory, START + 4000 * DAY)
    with pytest.raises(IdentityError, match="Set this machine's clock right"):
        check_own_certificates(directory, START - DAY)


def test_the_ca_needs_its_own_key(directory: ServerDirectory) -> None:
    directory.ca[1].write_bytes(directory.server[1].read_bytes())
    with pytest.raises(IdentityError, match=r"does not belong to ca\.pem"):
        Authority.load(directory)
    directory.ca[1].unlink()
    with pytest.raises(IdentityError, match=r"ca\.key: found 'no such file'"):
        Authority.load(directory)


def test_requested_key() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    assert requested_key(request(key)) == key.public_key()


@pytest.mark.parametrize("kind", ["text", "p384", "rsa", "signature"])
def test_other_requests_are_refused(kind: str) -> None:
    text = {
        "text": "no request é",
        "p384": request(ec.generate_private_key(ec.SECP384R1())),
        "rsa": request(rsa.generate_private_key(65537, 2048)),
        "signature": _with_broken_signature(request(ec.generate_private_key(ec.SECP256R1()))),
    }[kind]
    with pytest.raises(IdentityError, match="signed with its own EC P-256 key"):
        requested_key(text)


def _with_broken_signature(pem: str) -> str:
    parsed = x509.load_pem_x509_csr(pem.encode())
    der = bytearray(parsed.public_bytes(serialization.Encoding.DER))
    der[der.index(b"x", 10)] = ord("y")  # the common name
    broken = x509.load_der_x509_csr(bytes(der))
    assert not broken.is_signature_valid
    return broken.public_bytes(serialization.Encoding.PEM).decode()
