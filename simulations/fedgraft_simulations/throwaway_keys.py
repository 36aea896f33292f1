"""Certificates for sites that exist in a simulation only, from a CA that is forgotten at once."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from filelock import FileLock

from fedgraft_common.certificates import private_pem
from fedgraft_common.files import write_atomically
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


def kept_keys(file: Path, names: Sequence[str]) -> tuple[dict[str, SiteKey], Trust]:
    """Throwaway keys that all processes of one simulation share, through a file.

    Args:
        file: made at the first call; a simulation that goes on later finds its keys there.
        names: of the sites.
    """
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            keys, trust = throwaway_keys(names, dt.datetime.now(dt.UTC))
            pems = [trust.ca.public_bytes(Encoding.PEM).decode()]
            for name in names:
                pems.append(keys[name].certificate.public_bytes(Encoding.PEM).decode())
                pems.append(private_pem(keys[name].key).decode())
            write_atomically(file, json.dumps(pems).encode(), durable=False)
        ca, *pairs = json.loads(file.read_text(encoding="utf-8"))
    keys = {}
    for name, certificate, key in zip(names, pairs[::2], pairs[1::2], strict=True):
        private = serialization.load_pem_private_key(key.encode(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)  # noqa: S101 - written above
        keys[name] = SiteKey(name, x509.load_pem_x509_certificate(certificate.encode()), private)
    authority = x509.load_pem_x509_certificate(ca.encode())
    return keys, Trust(authority, authority.not_valid_before_utc)  # as of then: it never expires


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
