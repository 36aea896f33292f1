"""Certificates for sites that exist in a simulation only, from a CA that is forgotten at once."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedgraft_common.site_signature import SiteKey, Trust
from fedgraft_server.authority import Authority

_LIFETIME = dt.timedelta(days=1)


def throwaway_keys(names: Iterable[str], now: dt.datetime) -> tuple[dict[str, SiteKey], Trust]:
    """A key and certificate for each site, and the trust in their CA.

    Args:
        names: of the sites.
        now: the certificates are valid for a day from here, with time zone.
    """
    authority = throwaway_authority(now)
    keys = {name: throwaway_key(authority, name, now) for name in names}
    return keys, Trust(authority.certificate, now)


def throwaway_authority(now: dt.datetime) -> Authority:
    """A CA that no server has."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "simulation")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + _LIFETIME)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def throwaway_key(authority: Authority, name: str, now: dt.datetime) -> SiteKey:
    """A site's key, with the kind of certificate a real server issues."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = authority.issue_site(name, key.public_key(), _LIFETIME, now)
    return SiteKey(name, certificate, key)
