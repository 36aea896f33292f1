"""What a site believes of the answer to its joining; over TLS: integration/test_identity.py."""

from __future__ import annotations

import datetime as dt
import ssl
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedgraft_client.identity import _joined
from fedgraft_common.certificates import certificate_pem, public_pem
from fedgraft_common.errors import IdentityError
from fedgraft_server.authority import create
from fedgraft_server.settings import FederationTable, ServerDirectory, Settings

NOW = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
KEY = ec.generate_private_key(ec.SECP256R1())
OPERATOR = public_pem(Ed25519PrivateKey.generate().public_key())
UNHEARD_OF = "-----BEGIN PUBLIC KEY-----\nMA0wBwYDK2V/BQADAgAA\n-----END PUBLIC KEY-----\n"


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """A good answer, and the CA behind it."""
    settings = Settings(federation=FederationTable(name="test", host="localhost"))
    directory = ServerDirectory(tmp_path_factory.mktemp("server") / "server")
    authority = create(directory, settings, NOW)
    issued = authority.issue_site("north", KEY.public_key(), dt.timedelta(days=1), NOW)
    content = {
        "certificate": certificate_pem(issued).decode(), "operator_key": OPERATOR,
        "federation": "test", "name": "north", "groups": ["all"], "gateway": "h:1",
        "backbone": "h:2",
    }  # fmt: skip
    return content, authority.certificate


def test_a_good_answer(answer: tuple[dict[str, Any], Any]) -> None:
    content, ca = answer
    certificate, operator_key, facts = _joined(content, KEY, ca)
    assert (operator_key, facts.site) == (OPERATOR, "north")
    assert certificate_pem(certificate).decode() == content["certificate"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"certificate": None}, "an incomplete answer"),
        ({"certificate": "\ud800"}, "an incomplete answer"),
        ({"operator_key": "-"}, "an incomplete answer"),
        ({"operator_key": UNHEARD_OF}, "an incomplete answer"),  # an algorithm nobody knows
        ({"operator_key": public_pem(KEY.public_key())}, "no Ed25519 key"),
        ({"name": "../north"}, "an incomplete answer"),
        ({"groups": 3}, "an incomplete answer"),
    ],
)
def test_any_other_is_refused_before_anything_is_written(
    answer: tuple[dict[str, Any], Any], change: dict[str, Any], text: str
) -> None:
    content, ca = answer
    with pytest.raises(IdentityError, match=text):
        _joined(content | change, KEY, ca)


def test_a_certificate_of_a_version_that_does_not_exist(answer: tuple[dict[str, Any], Any]) -> None:
    content, ca = answer
    der = ssl.PEM_cert_to_DER_cert(content["certificate"])
    assert der.count(b"\xa0\x03\x02\x01\x02") == 1
    odd = ssl.DER_cert_to_PEM_cert(der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x03"))
    with pytest.raises(IdentityError, match="an incomplete answer"):
        _joined(content | {"certificate": odd}, KEY, ca)


def test_a_certificate_for_another_key(answer: tuple[dict[str, Any], Any]) -> None:
    content, ca = answer
    with pytest.raises(IdentityError, match="a certificate for another key"):
        _joined(content, ec.generate_private_key(ec.SECP256R1()), ca)
