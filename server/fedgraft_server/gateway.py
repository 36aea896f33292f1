"""The only way from a site to Flower's SuperLink.

The SuperLink's single port also carries Flower's Control and Runtime APIs, which ask nobody who
they are: whoever reaches it can run Python on the server. So it listens on loopback, and this
ASGI application stands in front of it. It

- knows a site by its client certificate (TLS has verified it; the registry says whose it is and
  whether it is revoked or expired, at every request);
- holds the Flower node key in the request against that site's; Flower in turn holds the node
  number in the body against the node key;
- forwards exactly nine calls, to paths of its own, with a chosen few headers;
- refuses replies in another node's name, which Flower does not check;
- limits size and rate;
- holds a question for messages open until there is one, as long as the site says (`Prefer: wait`,
  RFC 7240): the SuperLink would answer "nothing" at once, and asking it again costs it more than
  anything else in a round.

Refusals are JSON `{"error": ...}`: 403 who or what, 413 size, 429 rate, 503 SuperLink away.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import aiohttp
from cryptography import x509
from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from yarl import URL

from fedgraft_common.certificates import certificate_pem
from fedgraft_common.errors import IdentityError
from fedgraft_common.inline import SMALL, is_inline
from fedgraft_server.asgi import (
    BodyLostError,
    BodyTooLargeError,
    Headers,
    Receive,
    Scope,
    Send,
    answer,
    body_chunks,
    refuse,
    whole_body,
)
from fedgraft_server.bell import LISTEN, Bells
from fedgraft_server.fleet_port import CALLS, FleetPort, SuperLinkAwayError
from fedgraft_server.limits import TokenBucket
from fedgraft_server.registry import Registry, Site
from fedgraft_server.settings import Settings

LOG = logging.getLogger(__name__)

FLEET_CALLS: Final = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
FLEET_PATHS: Final = {f"/v1/fleet/{call}".encode(): f"/v1/fleet/{call}" for call in FLEET_CALLS}
RENEW: Final = b"/renew"
WHOAMI: Final = b"/whoami"

_PULL_MESSAGES: Final = b"/v1/fleet/pull-messages"
_PUSH_MESSAGES: Final = b"/v1/fleet/push-messages"
_PUSH_OBJECT: Final = b"/v1/fleet/push-object"
_NODE_KEY: Final = b"flwr-public-key"
_FORWARDED: Final = frozenset(
    {
        b"accept",
        b"content-type",
        b"flwr-component-name",
        b"flwr-package-name",
        b"flwr-package-version",
        b"flwr-public-key",
        b"flwr-signature",
        b"flwr-timestamp",
    }
)
_RETURNED: Final = frozenset(
    {b"content-type", b"content-length", b"flwr-version-incompatibility-message"}
)
_BUFFERED: Final = 256 * 1024  # bytes; larger bodies stream
_MAX_RENEWAL: Final = 64 * 1024  # bytes
_PREFER: Final = b"prefer"
_MOMENT: Final = 0.25  # seconds after an answer until more is looked for though no bell has rung
_MAX_WAIT: Final = 20.0  # seconds that a question is held at most; Flower's signature lasts 300

Renew = Callable[[Site, str, str], x509.Certificate]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the SuperLink last said to a site's question for messages.

    Attributes:
        rung: the bell, before it was asked.
        was_empty: whether there was none.
    """

    rung: int
    was_empty: bool


class Gateway:
    """The ASGI application.

    Args:
        registry: who may connect.
        settings: limits.
        upstream: HTTP client, see `upstream_session`.
        url: the SuperLink's.
        renew: makes a new certificate for (site, the certificate it shows, its request; PEM).
        clock: seconds, monotonic.
        bells: between the gateway and the runs; without them no question is held.
        port: the SuperLink's quicker port; without it every call goes over HTTP.
    """

    def __init__(
        self,
        registry: Registry,
        settings: Settings,
        upstream: aiohttp.ClientSession,
        url: str,
        renew: Renew,
        clock: Callable[[], float] = time.monotonic,
        bells: Bells | None = None,
        port: FleetPort | None = None,
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._limits = settings.gateway
        self._upstream = upstream
        self._urls = {path: URL(url + text, encoded=True) for path, text in FLEET_PATHS.items()}
        self._renew = renew
        self._clock = clock
        self._buckets: dict[str, TokenBucket] = {}
        self._logged: dict[str, TokenBucket] = {}
        self._is_upstream_away = False
        self._bells = bells
        self._port = port
        self._asked: dict[str, _Asked] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return
        path = scope["raw_path"]
        chain = scope.get("extensions", {}).get("tls", {}).get("client_cert_chain", ())
        try:
            if not chain:
                raise IdentityError(
                    "certificate", "none", "a client certificate of this federation",
                    "Join this federation.",
                )  # fmt: skip
            site = self._registry.site_of(_fingerprint(chain[0]))
        except IdentityError as error:
            self._log("-", "refuse-certificate", str(error), path)
            await refuse(send, 403, str(error), last=True)
            return
        if not self._bucket(site.name).take():
            self._log(site.name, "limit-rate", "too many requests", path)
            reason = f"more than {self._limits.requests_per_second:g} requests a second"
            await refuse(send, 429, reason, [(b"retry-after", b"1")])
            return
        method, is_plain = scope["method"], not scope["query_string"]
        try:
            if method == "POST" and is_plain and path in FLEET_PATHS:
                await self._forward(site, path, scope["headers"], receive, send)
            elif method == "POST" and is_plain and path == RENEW:
                await self._renew_certificate(site, chain[0], receive, send)
            elif method == "GET" and is_plain and path == WHOAMI:
                await answer(send, 200, self._facts(site))
            else:
                self._log(site.name, "refuse-path", "not a call that sites may make", path)
                await refuse(send, 403, "not a call that sites may make")
        except BodyTooLargeError:
            self._log(site.name, "limit-size", "request too large", path)
            limit = self._limits.max_request_bytes
            await refuse(send, 413, f"a request of more than {limit} bytes", last=True)
        except BodyLostError:
            LOG.debug("request broken off", extra={"action": "lost", "site": site.name})

    async def _forward(
        self, site: Site, path: bytes, headers: Headers, receive: Receive, send: Send
    ) -> None:
        names = [name for name, _ in headers]
        kept = [(name, value) for name, value in headers if name in _FORWARDED]
        if len({name for name, _ in kept}) < len(kept) or names.count(b"content-length") > 1:
            self._log(site.name, "refuse-headers", "a header came twice", path)
            await refuse(send, 403, "a header came twice")
            return
        if dict(kept).get(_NODE_KEY) != _header_of(site.node_key):
            self._log(site.name, "refuse-node-key", "not this site's node key", path)
            await refuse(send, 403, "the node key is not the one this site joined with")
            return
        limit = self._limits.max_request_bytes
        declared = dict(headers).get(b"content-length")
        length = int(declared) if declared is not None and declared.isdigit() else None
        if length is not None and length > limit:
            raise BodyTooLargeError
        body: bytes | _Streamed
        may_complete = path == _PUSH_OBJECT  # perhaps the last one of a reply
        if path == _PUSH_MESSAGES or (length is not None and length <= _BUFFERED):
            body = await whole_body(receive, limit)
            if path == _PUSH_MESSAGES:
                pushed = _spoken_for_itself(body)
                if pushed is None:
                    self._log(site.name, "refuse-message", "malformed, or another's name", path)
                    await refuse(send, 400, "a malformed message, or one in another node's name")
                    return
                may_complete = is_inline(pushed.messages_list[0])
                if pushed.messages_list[0].ByteSize() > SMALL:  # the SuperLink would take it apart
                    self._log(site.name, "limit-size", "announcement too large", path)
                    await refuse(send, 413, f"an announcement of more than {SMALL} bytes")
                    return
        else:
            body = _Streamed(receive, limit)
            if length is not None:
                kept.append((b"content-length", str(length).encode()))
        wait = _wait_of(headers) if path == _PULL_MESSAGES and self._bells is not None else 0.0
        if wait and isinstance(body, bytes):
            await self._hold(site, kept, body, wait, receive, send)
            return
        await self._pass_on(site, path, kept, body, send)
        if may_complete and self._bells is not None:
            self._bells.answered.ring()

    async def _hold(
        self, site: Site, headers: Headers, body: bytes, wait: float, receive: Receive, send: Send
    ) -> None:
        """Asks the SuperLink for a message when there may be one, and at the end in any case."""
        assert self._bells is not None  # noqa: S101 - the caller has looked
        bell, end = self._bells.asked, self._clock() + wait
        gone = asyncio.ensure_future(receive())  # the request is here: only a farewell can come
        try:
            while True:
                last = self._asked.get(site.name)
                if last is not None:
                    until = end if last.was_empty else min(end, self._clock() + _MOMENT)
                    while last.rung == bell.rung() and self._clock() < until:
                        await asyncio.wait((gone,), timeout=LISTEN)
                        if gone.done():  # a message that is handed out now would be lost
                            return
                rung, is_last = bell.rung(), self._clock() >= end
                was_empty = await self._pass_on(
                    site, _PULL_MESSAGES, headers, body, send, keep_empty=not is_last
                )
                self._asked[site.name] = _Asked(rung, was_empty)
                if is_last or not was_empty:
                    return
        finally:
            gone.cancel()

    async def _pass_on(
        self,
        site: Site,
        path: bytes,
        headers: Headers,
        body: bytes | _Streamed,
        send: Send,
        keep_empty: bool = False,
    ) -> bool:
        """Forwards a call and its answer; with `keep_empty`, not one without content.

        Returns:
            Whether the answer had no content and is no error.
        """
        if self._port is not None and path in CALLS and isinstance(body, bytes):
            return await self._pass_to(
                self._port, site, path, dict(headers), body, send, keep_empty
            )
        has_begun = False
        try:
            async with self._upstream.post(
                self._urls[path],
                data=body,
                headers={name.decode("ascii"): value.decode("latin-1") for name, value in headers},
                allow_redirects=False,
            ) as response:
                self._note_upstream(is_away=False)
                returned = [
                    (name.lower(), value)
                    for name, value in response.raw_headers
                    if name.lower() in _RETURNED
                ]
                status = response.status
                is_empty = status == 200 and response.content_length == 0
                if is_empty and keep_empty:
                    return True
                await send({"type": "http.response.start", "status": status, "headers": returned})
                has_begun = True
                async for chunk in response.content.iter_any():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body"})
        except (aiohttp.ClientError, TimeoutError) as error:
            if isinstance(body, _Streamed) and body.error is not None:
                raise body.error from None
            self._note_upstream(is_away=True, why=type(error).__name__)
            if has_begun:  # uvicorn closes the connection; the site sees a broken answer
                raise
            await refuse(send, 503, "the SuperLink does not answer; try again", last=True)
            return False
        _note(site, path, status)
        return is_empty

    async def _pass_to(
        self, port: FleetPort, site: Site, path: bytes, headers: dict[bytes, bytes], body: bytes,
        send: Send, keep_empty: bool,
    ) -> bool:  # fmt: skip
        """The same over the SuperLink's quicker port."""
        try:
            found = await port.call(path, headers, body)
        except SuperLinkAwayError as error:
            self._note_upstream(is_away=True, why=str(error))
            await refuse(send, 503, "the SuperLink does not answer; try again", last=True)
            return False
        self._note_upstream(is_away=False)
        is_empty = found.status == 200 and not found.content
        if is_empty and keep_empty:
            return True
        length = (b"content-length", str(len(found.content)).encode())
        returned = [(b"content-type", found.kind), length]
        await send({"type": "http.response.start", "status": found.status, "headers": returned})
        await send({"type": "http.response.body", "body": found.content})
        _note(site, path, found.status)
        return is_empty

    async def _renew_certificate(
        self, site: Site, certificate: str, receive: Receive, send: Send
    ) -> None:
        request = await whole_body(receive, _MAX_RENEWAL)
        try:
            issued = self._renew(site, certificate, request.decode("ascii", "replace"))
        except IdentityError as error:
            self._log(site.name, "refuse-renewal", str(error), RENEW)
            await refuse(send, 403, str(error))
            return
        LOG.info("certificate renewed", extra={"action": "renew", "site": site.name})
        await answer(send, 200, {"certificate": certificate_pem(issued).decode()})

    def _note_upstream(self, is_away: bool, why: str = "") -> None:
        """Logs a change, not every request."""
        if is_away and not self._is_upstream_away:
            LOG.warning("the SuperLink does not answer: %s", why, extra={"action": "away"})
        elif self._is_upstream_away and not is_away:
            LOG.warning("the SuperLink answers again", extra={"action": "back"})
        self._is_upstream_away = is_away

    def _facts(self, site: Site) -> dict[str, object]:
        return {
            "federation": self._settings.federation.name,
            "site": site.name,
            "groups": site.groups,
            "expires": site.expires.isoformat(),
            "backbone": self._settings.backbone_address,
            "node_id": site.node_id,
            "time": time.time(),
        }

    def _bucket(self, name: str) -> TokenBucket:
        if name not in self._buckets:
            limits = self._limits
            self._buckets[name] = TokenBucket(limits.requests_per_second, limits.burst, self._clock)
        return self._buckets[name]

    def _log(self, site: str, action: str, reason: str, path: bytes) -> None:
        """A refusal, as often as one a second for each site: none may fill the disk."""
        bucket = self._logged.setdefault(site, TokenBucket(1.0, 20.0, self._clock))
        if bucket.take():
            shown = path[:200].decode("ascii", "backslashreplace")
            LOG.warning("refused %s: %s", shown, reason, extra={"action": action, "site": site})


def upstream_session(context: ssl.SSLContext) -> aiohttp.ClientSession:
    """The one pooled client of the SuperLink; close it.

    Args:
        context: trusts the SuperLink's certificate.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            ssl=context,
            limit=200,
            keepalive_timeout=4.0,  # before the SuperLink's own 5 s: no reuse as it closes
        ),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=60.0),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
    )


class _Streamed:
    """A body on its way through; remembers why it broke off, which the HTTP client wraps."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._chunks = body_chunks(receive, limit)
        self.error: BodyLostError | BodyTooLargeError | None = None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._chunks:
                yield chunk
        except (BodyLostError, BodyTooLargeError) as error:
            self.error = error
            raise


def _note(site: Site, path: bytes, status: int) -> None:
    facts = {"action": "forward", "site": site.name, "path": path.decode(), "status": status}
    LOG.debug("forwarded", extra=facts)


def _wait_of(headers: Headers) -> float:
    """Seconds that a site wants its question to be held; 0 if it does not say."""
    wish = dict(headers).get(_PREFER, b"").removeprefix(b"wait=")
    return min(float(wish), _MAX_WAIT) if wish.isdigit() else 0.0


@lru_cache(maxsize=4096)
def _fingerprint(pem: str) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


@lru_cache(maxsize=4096)
def _header_of(node_key: str) -> bytes:
    """How Flower's NodeAuthHttpInterceptor writes a node key."""
    return base64.b64encode(node_key.encode())


def _spoken_for_itself(body: bytes) -> PushMessagesRequest | None:
    """The reply, if it comes from the node that sends it and names only what is its own.

    Flower ties the sender's number to its key, but takes on trust the source named in a message,
    and the objects: one that the run is about to push would be the reply's from then on.
    """
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return None
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        return None
    metadata, root = request.messages_list[0].metadata, request.message_object_trees[0].object_id
    speaks = metadata.src_node_id == request.node.node_id
    names_its_own = root == metadata.message_id != metadata.reply_to_message_id
    return request if speaks and names_its_own else None
