"""A site's identity: its keys, its certificate, and whom it trusts.

    DIR/ca.pem           the federation's CA, pinned by the invite
    DIR/site.pem, .key   certificate and key for TLS (EC P-256)
    DIR/node.pub, .key   the Flower node's key (EC P-384)
    DIR/operator.pub     Ed25519 key that signs plans
    DIR/federation.json  names and addresses; written last, so with it the directory is complete

Both private keys are made here and never leave. Renewal keeps the key and replaces site.pem in
one step, so a crash leaves the old certificate or the new one, and both are good.
"""

from __future__ import annotations

import datetime as dt
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedgraft_client.secure_member import Membership
from fedgraft_common.atomic import write_atomically
from fedgraft_common.certificates import (
    UNREADABLE,
    certificate_pem,
    check_validity,
    fingerprint,
    is_on_curve,
    is_pair,
    is_renewal_due,
    private_pem,
    public_pem,
    read_certificate,
    read_pem,
    read_private_key,
)
from fedgraft_common.errors import IdentityError
from fedgraft_common.invite import Invite, SiteName
from fedgraft_common.site_signature import SiteKey, Trust

_TIMEOUT: Final = 20.0  # seconds
_MAX_ANSWER: Final = 64 * 1024  # bytes
_AGAIN: Final = "Ask the federation's operator to revoke this site and to invite it again."


class FederationFacts(BaseModel):
    """federation.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    federation: str = Field(description="The federation's name.")
    site: SiteName = Field(description="This site's name in it.")
    groups: tuple[str, ...] = Field(description="Groups plans may name.")
    gateway: str = Field(description="host:port for Flower's calls.")
    backbone: str = Field(description="host:port of the backbone service.")


@dataclass(frozen=True, slots=True)
class Identity:
    """A checked identity directory.

    Attributes:
        directory: where it is.
        facts: names and addresses.
        expires: end of the certificate, UTC.
        node_private_key: of the Flower node.
        operator_key: verifies plans.
    """

    directory: Path
    facts: FederationFacts
    expires: dt.datetime
    node_private_key: ec.EllipticCurvePrivateKey
    operator_key: ed25519.Ed25519PublicKey

    @property
    def node_keys(self) -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]:
        """As Flower's connection takes them."""
        return self.node_private_key, self.node_private_key.public_key()

    @property
    def membership(self) -> Membership:
        """What this site needs for secure aggregation."""
        return Membership(self.site_key(), lambda: self.trust(dt.datetime.now(dt.UTC)))

    def ssl_context(self) -> ssl.SSLContext:
        """Mutual TLS 1.3: trusts the federation's CA and nothing else, shows the certificate.

        Made anew at each call: after a renewal, reconnect with a new one.
        """
        context = _trusting(cadata=read_pem(self.directory / "ca.pem").decode("ascii"))
        context.load_cert_chain(self.directory / "site.pem", self.directory / "site.key")
        return context

    def site_key(self) -> SiteKey:
        """What the site signs with towards its peers: the key of its certificate.

        Raises:
            IdentityError: missing, or not the certificate's.
        """
        key = read_private_key(self.directory / "site.key")
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise IdentityError(
                str(self.directory / "site.key"), "another kind of key", "an EC P-256 key", _AGAIN
            )
        return SiteKey(self.facts.site, read_certificate(self.directory / "site.pem"), key)

    def trust(self, now: dt.datetime) -> Trust:
        """Whose signatures count among its peers.

        Args:
            now: the time, with time zone.

        Raises:
            IdentityError: the CA's certificate is missing.
        """
        return Trust(read_certificate(self.directory / "ca.pem"), now)


def join(
    invite: str, directory: Path, now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC)
) -> Identity:
    """Makes keys, sends the public ones with the invite's secret, stores the certificate.

    Args:
        invite: what `fedgraft server invite` printed.
        directory: new or empty; private to the site.
        now: the clock, with time zone.

    Raises:
        IdentityError: the invite or the directory cannot be used, the server is not the one the
            invite is from, or it refuses. Nothing is left in the directory then.
    """
    parsed = Invite.decode(invite)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise IdentityError(
            str(directory), "something that exists already", "a new or empty directory",
            "Choose another: an identity is never overwritten.",
        )  # fmt: skip
    if now() > parsed.expires:
        raise IdentityError(
            "invite", f"one that expired on {parsed.expires:%Y-%m-%d %H:%M} UTC",
            f"one that is valid now ({now():%Y-%m-%d %H:%M} UTC)",
            "Check this machine's clock; if it is right, ask for a new invite.",
        )  # fmt: skip
    ca = _pinned_ca(parsed)
    site_key = ec.generate_private_key(ec.SECP256R1())
    node_key = ec.generate_private_key(ec.SECP384R1())
    content = _call(
        parsed.address, "POST", "/join", _trusting(cadata=certificate_pem(ca).decode()),
        {
            "secret": parsed.secret,
            "request": _request(parsed.name, site_key),
            "node_key": public_pem(node_key.public_key()),
        },
    )  # fmt: skip
    certificate, operator_key, facts = _joined(content, site_key, ca)
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    for name, written in (
        ("site.key", private_pem(site_key)),
        ("node.key", private_pem(node_key)),
        ("node.pub", public_pem(node_key.public_key()).encode()),
        ("ca.pem", certificate_pem(ca)),
        ("site.pem", certificate_pem(certificate)),
        ("operator.pub", operator_key.encode()),
        ("federation.json", facts.model_dump_json(indent=2).encode() + b"\n"),
    ):
        write_atomically(directory / name, written)
    return load_identity(directory, now)


def load_identity(
    directory: Path, now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC)
) -> Identity:
    """Reads and checks what `join` wrote.

    Raises:
        IdentityError: a file is missing or damaged, the certificate is expired, not valid yet,
            not of this CA or not of this key.
    """
    facts = _read_facts(directory / "federation.json")
    ca = read_certificate(directory / "ca.pem")
    certificate = read_certificate(directory / "site.pem")
    key = read_private_key(directory / "site.key")
    _check_issuer(certificate, ca, directory / "site.pem")
    if not is_pair(certificate, key):
        raise IdentityError(
            str(directory / "site.key"), "a key that does not belong to site.pem",
            "the key the certificate was made for",
            f"Restore both from the same backup. {_AGAIN}",
        )  # fmt: skip
    check_validity(certificate, str(directory / "site.pem"), now())
    node_key = read_private_key(directory / "node.key")
    if not isinstance(node_key, ec.EllipticCurvePrivateKey) or not is_on_curve(
        node_key, ec.SECP384R1
    ):
        raise IdentityError(
            str(directory / "node.key"), "another kind of key", "an EC P-384 key",
            f"Restore it from a backup. {_AGAIN}",
        )  # fmt: skip
    return Identity(
        directory, facts, certificate.not_valid_after_utc, node_key,
        _operator_key(directory / "operator.pub"),
    )  # fmt: skip


def whoami(identity: Identity) -> dict[str, Any]:
    """What the gateway says about this site, over mutual TLS.

    Returns:
        Among others `site`, its name there, and `time`, the server's clock in seconds since 1970.

    Raises:
        IdentityError: the gateway cannot be reached, or does not let this site in.
    """
    return _call(identity.facts.gateway, "GET", "/whoami", identity.ssl_context())


def renew_if_due(
    identity: Identity, now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC)
) -> Identity | None:
    """Gets a new certificate when less than a third of the present one's time is left.

    Args:
        identity: a loaded one.
        now: the clock, with time zone.

    Returns:
        The renewed identity (make a new `ssl_context` from it); None if renewal was not due.

    Raises:
        IdentityError: the gateway cannot be reached or refuses, or the certificate has expired.
    """
    path = identity.directory / "site.pem"
    present = read_certificate(path)
    check_validity(present, str(path), now())
    if not is_renewal_due(present, now()):
        return None
    key = read_private_key(identity.directory / "site.key")
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(str(path), "another kind of key", "an EC P-256 key", _AGAIN)
    content = _call(
        identity.facts.gateway, "POST", "/renew", identity.ssl_context(),
        _request(identity.facts.site, key),
    )  # fmt: skip
    try:
        renewed = x509.load_pem_x509_certificate(str(content.get("certificate")).encode())
    except UNREADABLE:
        raise _strange_answer("no certificate") from None
    _check_issuer(renewed, read_certificate(identity.directory / "ca.pem"), path)
    if not is_pair(renewed, key):
        raise _strange_answer("a certificate for another key")
    check_validity(renewed, "renewed certificate", now())
    write_atomically(path, certificate_pem(renewed))
    return load_identity(identity.directory, now)


def _pinned_ca(invite: Invite) -> x509.Certificate:
    """The CA certificate, from a connection nobody vouches for: the invite's hash decides."""
    unverified = _trusting(cadata=None)
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    content = _call(invite.address, "GET", "/ca", unverified)
    try:
        ca = x509.load_pem_x509_certificate(str(content.get("ca")).encode())
    except UNREADABLE:
        raise _strange_answer("no CA certificate") from None
    if fingerprint(ca) != invite.ca_sha256:
        raise IdentityError(
            f"CA certificate of {invite.address}", f"SHA-256 {fingerprint(ca)}",
            f"SHA-256 {invite.ca_sha256}, as in the invite",
            "Do not go on: this is another server, or somebody is in between. "
            "Tell the federation's operator.",
        )  # fmt: skip
    return ca


def _trusting(cadata: str | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if cadata is not None:
        context.load_verify_locations(cadata=cadata)
    return context


def _call(
    address: str, method: str, path: str, context: ssl.SSLContext, content: object = None
) -> dict[str, Any]:
    """One exchange with the server; text is sent as it is, anything else as JSON."""
    body = content if isinstance(content, str) else json.dumps(content)
    try:
        with (
            httpx.Client(verify=context, timeout=_TIMEOUT, trust_env=False) as client,
            client.stream(method, f"https://{address}{path}", content=body.encode()) as response,
        ):
            received = b""
            for chunk in response.iter_raw():
                received += chunk
                if len(received) > _MAX_ANSWER:
                    raise _strange_answer("too long an answer")
            status = response.status_code
    except httpx.HTTPError as error:
        raise IdentityError(
            address, str(error) or type(error).__name__,
            "a connection to the federation's server, with its certificate",
            "Check name, port and firewall (outbound), and whether the server runs.",
        ) from None  # fmt: skip
    try:
        answer = json.loads(received)
    except (ValueError, RecursionError):  # brackets without end
        answer = None
    if not isinstance(answer, dict):
        raise _strange_answer(f"HTTP status {status} without JSON")
    if status != httpx.codes.OK:
        raise IdentityError(
            f"answer of {address}", str(answer.get("error", status)), "consent",
            "Talk to the federation's operator.",
        )  # fmt: skip
    return answer


def _joined(
    content: dict[str, Any], key: ec.EllipticCurvePrivateKey, ca: x509.Certificate
) -> tuple[x509.Certificate, str, FederationFacts]:
    """Checks all of the answer before anything is written."""
    try:
        certificate = x509.load_pem_x509_certificate(str(content["certificate"]).encode())
        operator_key = str(content["operator_key"])
        signs_plans = serialization.load_pem_public_key(operator_key.encode())
        facts = FederationFacts.model_validate(
            {
                "federation": content["federation"],
                "site": content["name"],
                "groups": content["groups"],
                "gateway": content["gateway"],
                "backbone": content["backbone"],
            }
        )
    except (KeyError, *UNREADABLE):
        raise _strange_answer("an incomplete answer") from None
    if not isinstance(signs_plans, ed25519.Ed25519PublicKey):
        raise _strange_answer("an operator's key that is no Ed25519 key")
    _check_issuer(certificate, ca, Path("site.pem"))
    if not is_pair(certificate, key):
        raise _strange_answer("a certificate for another key")
    return certificate, operator_key, facts


def _request(name: str, key: ec.EllipticCurvePrivateKey) -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    signed = request.sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode("ascii")


def _read_facts(path: Path) -> FederationFacts:
    content = read_pem(path)
    try:
        return FederationFacts.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise IdentityError(
            f"{path}: {'.'.join(str(part) for part in first['loc'])}", first["input"],
            first["msg"], f"Restore it from a backup. {_AGAIN}",
        ) from None  # fmt: skip


def _check_issuer(certificate: x509.Certificate, ca: x509.Certificate, path: Path) -> None:
    try:
        certificate.verify_directly_issued_by(ca)
    except UNREADABLE:
        raise IdentityError(
            str(path), "a certificate that ca.pem did not issue", "one of this federation's CA",
            f"Restore the directory from a backup. {_AGAIN}",
        ) from None  # fmt: skip


def _operator_key(path: Path) -> ed25519.Ed25519PublicKey:
    try:
        key = serialization.load_pem_public_key(read_pem(path))
    except UNREADABLE:
        key = None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise IdentityError(
            str(path), "another kind of key", "the operator's Ed25519 key",
            f"Restore it from a backup. {_AGAIN}",
        )  # fmt: skip
    return key


def _strange_answer(found: str) -> IdentityError:
    return IdentityError(
        "the server's answer", found, "the answer of a fedgraft server",
        "Check the address, and that both sides have the same version of fedgraft.",
    )  # fmt: skip
