"""HTTPS listeners: uvicorn, with mutual TLS and the peer's certificate in the ASGI scope.

Two ports instead of one with optional certificates. On the gateway's port TLS itself demands a
certificate, so that nobody without one reaches an HTTP parser, holds a connection there or comes
near the code that speaks to the SuperLink; a mistake in a path rule cannot change that. The
joining port serves two small routes and knows nothing of the SuperLink.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
from asyncio import Transport
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fedgraft_common.errors import ServerError
from fedgraft_server.limits import TokenBucket

LOG = logging.getLogger(__name__)

MAX_HEAD: Final = 64 * 1024
"""Bytes of a request line and headers."""
HEAD_TIMEOUT: Final = 15.0
"""Seconds from the connection to the end of its first request's headers."""
CLOSE_TIMEOUT: Final = 1.0
"""Seconds a client has to read the last answer on a connection."""
_LOGGED_HANDSHAKES = TokenBucket(rate=1.0, burst=20.0)  # strangers must not fill the disk
_LOGGED_REQUESTS = TokenBucket(rate=1.0, burst=20.0)


class LoggedHandshake(ssl.SSLObject):
    """Logs why a handshake failed; asyncio drops the connection without a word."""

    def do_handshake(self) -> None:
        """See ssl.SSLObject."""
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            if _LOGGED_HANDSHAKES.take():
                reason = getattr(error, "verify_message", None) or error.reason or str(error)
                LOG.warning("connection refused: %s", reason, extra={"action": "refuse-handshake"})
            raise


class PeerCertificateProtocol(HttpToolsProtocol):
    """uvicorn's, plus ASGI's TLS extension (`client_cert_chain`) and limits on request heads."""

    _tls: dict[object, object]
    _head_bytes = 0
    _in_head = True

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        connection = transport.get_extra_info("ssl_object")
        der = connection.getpeercert(binary_form=True) if connection else None
        chain = (ssl.DER_cert_to_PEM_cert(der),) if der else ()
        self._tls = {"client_cert_chain": chain}
        self._deadline = self.loop.call_later(HEAD_TIMEOUT, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._deadline.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """See httptools."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        self.scope["extensions"] = {"tls": self._tls}

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._in_head = False
        self._deadline.cancel()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """See uvicorn."""
        super().on_response_complete()
        if self.transport.is_closing():  # TLS would read on for 30 s, waiting for a farewell
            self.loop.call_later(CLOSE_TIMEOUT, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """See uvicorn."""
        if _LOGGED_REQUESTS.take():
            LOG.warning("refused a request: %s", msg, extra={"action": "refuse-http"})
        super().send_400_response(msg)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response("Request head too large.")


class Listener(uvicorn.Server):
    """A uvicorn server that leaves signals to its owner."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: several listeners share a process."""
        yield

    def reload_certificate(self) -> None:
        """New connections get the certificate that is on disk now."""
        context = self.config.ssl
        assert context is not None  # noqa: S101 - every listener of ours has TLS
        context.load_cert_chain(self.config.ssl_certfile or "", self.config.ssl_keyfile)


def listener(
    app: Any,
    certificate: tuple[Path, Path],
    client_ca: Path | None,
    max_connections: int,
) -> Listener:
    """An HTTPS server, TLS 1.3 only.

    Args:
        app: ASGI.
        certificate: files of the server's certificate and key.
        client_ca: demand a client certificate of this CA; None demands none.
        max_connections: beyond them, 503.
    """
    config = uvicorn.Config(
        app,
        http=PeerCertificateProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.ERROR,  # what strangers do wrong is logged here, and not without limit
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        limit_concurrency=max_connections,
        timeout_keep_alive=75,  # longer than between two heartbeats of a site
        timeout_graceful_shutdown=10,
        ssl_certfile=certificate[0],
        ssl_keyfile=certificate[1],
        ssl_ca_certs=client_ca,
        ssl_cert_reqs=ssl.CERT_NONE if client_ca is None else ssl.CERT_REQUIRED,
    )
    config.load()
    assert config.ssl is not None  # noqa: S101 - loaded with a certificate
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    config.ssl.sslobject_class = LoggedHandshake
    return Listener(config)


def bind(host: str, port: int) -> socket.socket:
    """A listening address, taken now, so that a port in use is one clear error at the start.

    Raises:
        ServerError: in use, or not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ServerError(
            "port", port, f"a free port on {host}",
            f"The system says: {error.strerror}. Stop what uses it, or change federation.toml.",
        ) from None  # fmt: skip
    return bound
