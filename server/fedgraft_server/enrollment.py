"""Joining: a site's one-time secret and its public keys in, its certificate out.

This port asks for no client certificate, because who joins has none yet. It serves the CA
certificate (the invite says which one to expect) and one call.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
from collections.abc import Callable
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedgraft_common.certificates import UNREADABLE, certificate_pem, is_on_curve, public_pem
from fedgraft_common.errors import IdentityError
from fedgraft_server.asgi import (
    BodyLostError,
    BodyTooLargeError,
    Receive,
    Scope,
    Send,
    answer,
    refuse,
    whole_body,
)
from fedgraft_server.authority import Authority, requested_key
from fedgraft_server.limits import TokenBucket
from fedgraft_server.registry import Registry, Site, utc_now
from fedgraft_server.settings import Settings

LOG = logging.getLogger(__name__)

_MAX_REQUEST: Final = 64 * 1024  # bytes


class Enrollment:
    """The ASGI application, and what renews certificates.

    Args:
        registry: invites and sites.
        settings: addresses and the lifetime of certificates.
        authority: signs.
        operator_key: public, PEM; sites verify plans with it.
        now: the clock, with time zone.
        on_join: called when a site joined.
    """

    def __init__(
        self,
        registry: Registry,
        settings: Settings,
        authority: Authority,
        operator_key: str,
        now: Callable[[], dt.datetime] = utc_now,
        on_join: Callable[[], None] = lambda: None,
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._authority = authority
        self._operator_key = operator_key
        self._now = now
        self._on_join = on_join
        self._logged = TokenBucket(1.0, 20.0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return
        asked = (scope["method"], scope["raw_path"], scope["query_string"])
        if asked == ("GET", b"/ca", b""):
            pem = certificate_pem(self._authority.certificate).decode()
            await answer(send, 200, {"ca": pem}, last=True)
        elif asked == ("POST", b"/join", b""):
            try:
                content = self.join(await whole_body(receive, _MAX_REQUEST))
            except IdentityError as error:
                if self._logged.take():
                    LOG.warning("joining refused: %s", error, extra={"action": "refuse-join"})
                await refuse(send, 403, str(error), last=True)
            except BodyTooLargeError:
                await refuse(send, 413, "too large", last=True)
            except BodyLostError:
                return
            else:
                await answer(send, 200, content, last=True)
        else:
            if self._logged.take():
                LOG.warning("refused a path on the joining port", extra={"action": "refuse-path"})
            await refuse(send, 404, "no such call", last=True)

    def join(self, body: bytes) -> dict[str, object]:
        """One call of /join.

        Raises:
            IdentityError: the request, its keys or its secret cannot be used.
        """
        secret, request, node_key = _parse(body)
        key = requested_key(request)
        node_key = _node_key(node_key)

        def issue(name: str) -> x509.Certificate:
            return self._issue(name, key)

        site, certificate = self._registry.join(secret, node_key, issue)
        LOG.info("joined", extra={"action": "join", "site": site.name})
        self._on_join()
        return {
            "federation": self._settings.federation.name,
            "name": site.name,
            "groups": site.groups,
            "certificate": certificate_pem(certificate).decode(),
            "operator_key": self._operator_key,
            "gateway": self._settings.gateway_address,
            "backbone": self._settings.backbone_address,
        }

    def renew(self, site: Site, presented: str, request: str) -> x509.Certificate:
        """A new certificate for the key of the present one.

        Args:
            site: who asks, as its certificate says.
            presented: the certificate it shows, PEM.
            request: certificate request, PEM.

        Raises:
            IdentityError: the request is for another key.
        """
        key = requested_key(request)
        if public_pem(key) != public_pem(
            x509.load_pem_x509_certificate(presented.encode()).public_key()
        ):
            raise IdentityError(
                "certificate request", "another key than the present certificate's",
                "a request with the key in site.key", "To change the key, join again.",
            )  # fmt: skip
        certificate = self._issue(site.name, key)
        self._registry.add_certificate(site, certificate)
        return certificate

    def _issue(self, name: str, key: ec.EllipticCurvePublicKey) -> x509.Certificate:
        lifetime = dt.timedelta(days=self._settings.certificates.site_days)
        return self._authority.issue_site(name, key, lifetime, self._now())


def _parse(body: bytes) -> tuple[str, str, str]:
    try:
        content = json.loads(body)
        secret, request, node_key = (content[k] for k in ("secret", "request", "node_key"))
    except (ValueError, KeyError, TypeError, RecursionError):
        secret = request = node_key = None
    if not (isinstance(secret, str) and isinstance(request, str) and isinstance(node_key, str)):
        raise IdentityError(
            "join request", "something else", "JSON with secret, request and node_key",
            "Join with the fedgraft of the same version as the server's.",
        )  # fmt: skip
    return secret, request, node_key


def _node_key(pem: str) -> str:
    """As Flower will compare it, whatever the white space it came with."""
    try:
        key = serialization.load_pem_public_key(pem.encode("ascii"))
    except UNREADABLE:
        key = None
    if key is None or not is_on_curve(key, ec.SECP384R1):
        raise IdentityError(
            "node key", "something else", "a public EC P-384 key in PEM",
            "Join with the fedgraft of the same version as the server's.",
        )  # fmt: skip
    return public_pem(key)
