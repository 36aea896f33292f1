"""What joining accepts, without a network; over TLS it is in integration/test_identity.py."""

from __future__ import annotations

import base64
import datetime as dt
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedgraft_common.certificates import certificate_pem, public_pem
from fedgraft_common.errors import IdentityError
from fedgraft_server.authority import create
from fedgraft_server.enrollment import Enrollment
from fedgraft_server.registry import Registry
from fedgraft_server.settings import FederationTable, ServerDirectory, Settings

NOW = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
KEY = ec.generate_private_key(ec.SECP256R1())
NODE_KEY = public_pem(ec.generate_private_key(ec.SECP384R1()).public_key())


def request(name: str, key: ec.EllipticCurvePrivateKey = KEY) -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    wish = x509.BasicConstraints(ca=True, path_length=None)
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    signed = builder.add_extension(wish, critical=True).sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry.sqlite", lambda: NOW) as opened:
        yield opened


@pytest.fixture
def enrollment(registry: Registry, tmp_path: Path) -> Enrollment:
    settings = Settings(federation=FederationTable(name="test", host="localhost"))
    authority = create(ServerDirectory(tmp_path / "server"), settings, NOW)
    return Enrollment(registry, settings, authority, "operator", lambda: NOW)


def unheard_of(pem: str, known: str) -> str:
    """The same PEM with an object identifier (hexadecimal) that stands for nothing."""
    begin, *lines, end = pem.strip().splitlines()
    der = base64.b64decode("".join(lines))
    assert bytes.fromhex(known) in der
    other = der.replace(bytes.fromhex(known), bytes.fromhex(known)[:-1] + b"\x7f")
    return "\n".join([begin, base64.b64encode(other).decode(), end, ""])


def body(registry: Registry, **changes: str) -> bytes:
    secret = registry.invite("north", (), dt.timedelta(hours=1))
    content = {"secret": secret, "request": request("admin"), "node_key": NODE_KEY}
    return json.dumps(content | changes).encode()


def test_name_and_rights_are_the_servers_not_the_requests(
    registry: Registry, enrollment: Enrollment
) -> None:
    answer = enrollment.join(body(registry))
    assert answer["name"] == "north"
    certificate = x509.load_pem_x509_certificate(str(answer["certificate"]).encode())
    assert certificate.subject.rfc4514_string() == "CN=north"
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert certificate.not_valid_after_utc == NOW + dt.timedelta(days=90)


def test_a_node_key_is_kept_as_flower_compares_it(
    registry: Registry, enrollment: Enrollment
) -> None:
    enrollment.join(body(registry, node_key=NODE_KEY.replace("\n", "\r\n") + "\n\n"))
    assert registry.node_keys() == {"north": NODE_KEY}


@pytest.mark.parametrize(
    "node_key",
    ["", "é", public_pem(KEY.public_key()), NODE_KEY[:-40], unheard_of(NODE_KEY, "2b81040022")],
    ids=["none", "text", "p256", "damaged", "unheard-of"],
)
def test_other_node_keys_do_not_use_up_the_invite(
    registry: Registry, enrollment: Enrollment, node_key: str
) -> None:
    good = body(registry)
    bad = json.dumps(json.loads(good) | {"node_key": node_key}).encode()
    with pytest.raises(IdentityError, match="a public EC P-384 key in PEM"):
        enrollment.join(bad)
    assert enrollment.join(good)["name"] == "north"


@pytest.mark.parametrize(
    "known",
    ["2a8648ce3d030107", "2a8648ce3d0201", "2a8648ce3d040302"],
    ids=["curve", "key", "signature"],
)
def test_requests_with_algorithms_that_nobody_knows(
    registry: Registry, enrollment: Enrollment, known: str
) -> None:
    bad = json.loads(body(registry)) | {"request": unheard_of(request("north"), known)}
    with pytest.raises(IdentityError, match="signed with its own EC P-256 key"):
        enrollment.join(json.dumps(bad).encode())


def test_renewal_keeps_the_key(registry: Registry, enrollment: Enrollment) -> None:
    certificate = str(enrollment.join(body(registry))["certificate"])
    (site,) = registry.sites()
    renewed = enrollment.renew(site, certificate, request("north"))
    assert certificate_pem(renewed).decode() != certificate
    other = request("north", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(IdentityError, match="To change the key, join again"):
        enrollment.renew(site, certificate, other)
