"""Whose signature counts: the federation's CA, the name, the pinned key."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgraft_common.errors import IdentityError, MessageError
from fedgraft_common.site_signature import (
    SiteKey,
    Trust,
    key_fingerprint,
    public_key,
    verify,
)
from fedgraft_simulations.throwaway_keys import throwaway_authority, throwaway_key

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
AUTHORITY = throwaway_authority(NOW)
SITE = throwaway_key(AUTHORITY, "a", NOW)
TRUST = Trust(AUTHORITY.certificate, NOW)


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def test_a_signature_is_checked_against_key_purpose_and_content() -> None:
    signature = SITE.sign("roster", b"text")
    key = TRUST.check("a", SITE.certificate_der)
    verify(key, "roster", b"text", signature, "a")
    other = throwaway_key(AUTHORITY, "b", NOW).key.public_key()
    for args in ((other, "roster", b"text"), (key, "answer", b"text"), (key, "roster", b"Text")):
        with pytest.raises(MessageError, match="does not fit"):
            verify(*args, signature, "a")
    for damaged in (b"", signature[:-1], bytes(len(signature))):
        with pytest.raises(MessageError, match="does not fit"):
            verify(key, "roster", b"text", damaged, "a")


def test_signing_again_gives_the_same_bytes() -> None:
    assert SITE.sign("roster", b"text") == SITE.sign("roster", b"text")


def test_a_certificate_of_another_ca_is_refused() -> None:
    foreign = throwaway_key(throwaway_authority(NOW), "a", NOW)
    with pytest.raises(IdentityError, match="certificate of site a"):
        TRUST.check("a", foreign.certificate_der)


def test_a_certificate_in_another_name_is_refused() -> None:
    with pytest.raises(IdentityError, match="certificate of site b"):
        TRUST.check("b", SITE.certificate_der)


def test_the_servers_own_certificate_is_no_sites() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    server = AUTHORITY.issue_server(("a",), key.public_key(), dt.timedelta(days=1), NOW)
    with pytest.raises(IdentityError, match="certificate of site a"):
        TRUST.check("a", der(server))


@pytest.mark.parametrize("days", [-2, 3])
def test_a_certificate_out_of_its_time_is_refused(days: int) -> None:
    with pytest.raises(IdentityError, match=r"expired|valid from"):
        replace(TRUST, now=NOW + dt.timedelta(days=days)).check("a", SITE.certificate_der)


def test_another_kind_of_key_is_refused() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = AUTHORITY.issue_site("a", key.public_key(), dt.timedelta(days=1), NOW)
    with pytest.raises(IdentityError, match="P-256"):
        TRUST.check("a", der(certificate))


def test_the_ca_itself_is_no_site() -> None:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "simulation")])
    assert AUTHORITY.certificate.subject == name
    with pytest.raises(IdentityError):
        TRUST.check("simulation", der(AUTHORITY.certificate))


@pytest.mark.parametrize("content", [b"", b"\x30\x03\x02\x01\x01", bytes(100)])
def test_what_is_no_certificate_is_refused(content: bytes) -> None:
    with pytest.raises(IdentityError, match="certificate of site a"):
        TRUST.check("a", content)


def test_a_renewed_certificate_has_the_same_fingerprint_of_its_key() -> None:
    known = key_fingerprint(SITE.key.public_key())
    renewed = AUTHORITY.issue_site("a", SITE.key.public_key(), dt.timedelta(hours=1), NOW)
    assert key_fingerprint(TRUST.check("a", der(renewed))) == known
    stolen = throwaway_key(AUTHORITY, "a", NOW)  # the CA's key used for a second site of the name
    assert key_fingerprint(TRUST.check("a", stolen.certificate_der)) != known


def test_a_site_signs_with_its_own_key_and_name_only() -> None:
    other = throwaway_key(AUTHORITY, "b", NOW)
    with pytest.raises(IdentityError, match="key of site a"):
        SiteKey("a", other.certificate, other.key)
    with pytest.raises(IdentityError, match="key of site a"):
        SiteKey("a", SITE.certificate, other.key)
    assert "PRIVATE" not in repr(SITE) and "key=" not in repr(SITE)


def test_a_certificate_with_two_names_is_no_sites() -> None:
    names = [x509.NameAttribute(NameOID.COMMON_NAME, "a")] * 2
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(names))
        .issuer_name(AUTHORITY.certificate.subject)
        .public_key(SITE.key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + dt.timedelta(days=1))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=True)
        .sign(AUTHORITY.key, hashes.SHA256())
    )
    with pytest.raises(IdentityError, match="certificate of site a"):
        TRUST.check("a", der(certificate))
    assert public_key(der(certificate)) == SITE.key.public_key()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a003020102", "a003020109"),  # a version that there is not
        ("06082a8648ce3d040302", "06082a8648ce3d040309"),  # an unknown signature
        ("06082a8648ce3d030107", "06082a8648ce3d030109"),  # an unknown curve
        ("0603551d13", "0603551d25"),  # an extension twice
        ("30", "31"),  # no certificate at all
    ],
)
def test_a_malformed_certificate_is_one_error(old: str, new: str) -> None:
    """The library has an exception of its own for each, and not all are ValueErrors."""
    content = SITE.certificate_der
    assert bytes.fromhex(old) in content
    with pytest.raises(IdentityError, match="certificate of site a"):
        TRUST.check("a", content.replace(bytes.fromhex(old), bytes.fromhex(new), 1))
