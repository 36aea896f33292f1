"""The backbone service: gRPC over mutual TLS, one thread and one chunk of memory for each stream.

A stream sends its next chunk when gRPC has taken the one before, so a slow site costs waiting and
no memory. Streams are limited in number, in all and for each site; whoever is over the limit is
told to come back (RESOURCE_EXHAUSTED), and threads are left over for manifests and health checks.

Who a caller is comes from the certificate that TLS verified: its common name, which the
federation's CA took from its registry. `grpc.health.v1` answers on the same port.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from pydantic import BaseModel, ValidationError

from fedgraft_common.backbone_protocol import (
    BLOB,
    CHUNK,
    FRAME,
    MANIFEST,
    MAX_REQUEST,
    SERVICE,
    BlobRequest,
    ManifestRequest,
    TlsFiles,
)
from fedgraft_common.errors import BackboneError
from fedgraft_server.backbone_library import BackboneLibrary
from fedgraft_server.pace import Pace

Allowed = Callable[[bytes], bool]
"""Whether the owner of a certificate (PEM; issued by our CA) may still fetch."""

_log: Final = logging.getLogger("fedgraft.backbone")
_RequestT = TypeVar("_RequestT", bound=BaseModel)
_SPARE_THREADS: Final = 8
_SMALLEST: Final = 16 * 1024
_CHECK_EVERY: Final = 64  # chunks between two looks at whether a site has been revoked
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_REQUEST),
    ("grpc.max_send_message_length", 2 * CHUNK),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.http2.max_frame_size", FRAME),
    ("grpc.keepalive_time_ms", 30_000),  # a site whose network went away gives its thread back
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),  # or a second server would share the port without an error
)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the service gives.

    Attributes:
        bytes_per_second: to one site; None for no limit.
        streams: at once, in all.
        streams_per_site: at once, to one site.
    """

    bytes_per_second: float | None = None
    streams: int = 32
    streams_per_site: int = 2


class BackboneService:
    """Answers requests; see the module's docstring.

    Args:
        library: what there is to hand out.
        allowed: decides about a certificate, at the start of a call and now and then during one.
        limits: see `Limits`.
    """

    def __init__(self, library: BackboneLibrary, allowed: Allowed, limits: Limits) -> None:
        self._library = library
        self._allowed = allowed
        self._limits = limits
        self._streams: Counter[str] = Counter()
        self._paces: dict[str, Pace] = {}
        self._lock = threading.Lock()

    def manifest(self, request: bytes, context: Any) -> bytes:
        """The Manifest method."""
        site, _ = self._caller(context)
        asked = _read(ManifestRequest, request, context)
        signed = self._library.signed_manifest(asked.backbone)
        if signed is None:
            _refuse(context, site, grpc.StatusCode.NOT_FOUND, f"no backbone {asked.backbone}")
        return signed

    def blob(self, request: bytes, context: Any) -> Iterator[bytes]:
        """The Blob method."""
        site, certificate = self._caller(context)
        asked = _read(BlobRequest, request, context)
        path = self._library.blob(asked.sha256)
        if path is None:
            _refuse(context, site, grpc.StatusCode.NOT_FOUND, f"no file {asked.sha256}")
        pace = self._admit(site, context)
        ended = threading.Event()
        context.add_callback(ended.set)
        try:
            yield from self._send(path, asked.offset, site, certificate, context, pace, ended)
        finally:
            with self._lock:
                self._streams[site] -= 1

    def _send(
        self,
        path: Path,
        offset: int,
        site: str,
        certificate: bytes,
        context: Any,
        pace: Pace | None,
        ended: threading.Event,
    ) -> Iterator[bytes]:
        rate = self._limits.bytes_per_second
        chunk = CHUNK if rate is None else int(min(CHUNK, max(_SMALLEST, rate / 4)))
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if offset > size:
                what = f"offset {offset} in {size} bytes"
                _refuse(context, site, grpc.StatusCode.OUT_OF_RANGE, what)
            _log.info("site=%s action=send blob=%s offset=%d", site, path.name, offset)
            file.seek(offset)
            number = 0
            while piece := file.read(chunk):
                if pace is not None and ended.wait(pace.wait_for(len(piece))):
                    return
                yield piece
                number += 1
                if number % _CHECK_EVERY == 0 and not self._allowed(certificate):
                    _refuse(context, site, grpc.StatusCode.PERMISSION_DENIED, "revoked")
        _log.info("site=%s action=sent blob=%s", site, path.name)

    def _caller(self, context: Any) -> tuple[str, bytes]:
        """Name and certificate (PEM)."""
        facts = context.auth_context()
        certificate = next(iter(facts.get("x509_pem_cert", ())), b"")
        site = next(iter(facts.get("x509_common_name", ())), b"").decode("utf-8", "replace")
        if not certificate or not site or not self._allowed(certificate):
            why = "this certificate may not fetch backbones (revoked, expired or unknown)"
            _refuse(context, site, grpc.StatusCode.PERMISSION_DENIED, why)
        return site, certificate

    def _admit(self, site: str, context: Any) -> Pace | None:
        """Counts one more stream of a site; gives the pace it shares with the site's others."""
        limits = self._limits
        with self._lock:
            own, total = self._streams[site], self._streams.total()
            is_full = own >= limits.streams_per_site or total >= limits.streams
            if not is_full:
                self._streams[site] += 1
        if is_full:
            _refuse(context, site, grpc.StatusCode.RESOURCE_EXHAUSTED, "too many transfers at once")
        if limits.bytes_per_second is None:
            return None
        with self._lock:
            return self._paces.setdefault(site, Pace(limits.bytes_per_second))


@dataclass(frozen=True, slots=True)
class RunningService:
    """A started service.

    Attributes:
        port: it listens on.
    """

    port: int
    _server: Any
    _health: Any

    def stop(self, grace: float = 0.0) -> None:
        """Tells health checks, takes no more calls and gives those in progress `grace` seconds."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()


def serve(
    library: BackboneLibrary,
    address: str,
    tls: TlsFiles,
    allowed: Allowed,
    limits: Limits | None = None,
) -> RunningService:
    """Starts the service in threads of its own.

    Args:
        library: what there is to hand out.
        address: `host:port`; port 0 takes a free one.
        tls: the server's certificate is read again when its file changes.
        allowed: decides about a site's certificate; called from several threads.
        limits: None for `Limits()`.

    Raises:
        BackboneError: the address cannot be used, or a certificate cannot be read.
    """
    limits = limits or Limits()
    service = BackboneService(library, allowed, limits)
    # Streams hold their threads; the spare ones are for calls that return at once.
    workers = ThreadPoolExecutor(limits.streams + _SPARE_THREADS, "backbone")
    server = grpc.server(workers, options=_OPTIONS)
    methods = {
        MANIFEST: grpc.unary_unary_rpc_method_handler(service.manifest),
        BLOB: grpc.unary_stream_rpc_method_handler(service.blob),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    checks = health.HealthServicer(experimental_non_blocking=True)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for name in ("", SERVICE):
        checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        port = server.add_secure_port(address, _credentials(tls))
    except RuntimeError:
        raise BackboneError(
            address, "an address that cannot be listened on", "a free port of this machine",
            "Stop what listens there, or choose another port.",
        ) from None  # fmt: skip
    server.start()
    return RunningService(port, server, checks)


def _credentials(tls: TlsFiles) -> Any:
    """Server credentials that follow the files: a renewed certificate needs no restart."""
    seen = _stamp(tls)
    lock = threading.Lock()

    def changed() -> Any:
        nonlocal seen
        with lock:
            try:
                stamp = _stamp(tls)
                if stamp == seen:
                    return None
                fresh = _configuration(tls)
            except BackboneError:  # half a renewal: the next handshake looks again
                return None
            seen = stamp
            return fresh

    return grpc.dynamic_ssl_server_credentials(
        _configuration(tls), changed, require_client_authentication=True
    )


def _configuration(tls: TlsFiles) -> Any:
    pair = (_pem(tls.key), _pem(tls.certificate))
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=_pem(tls.ca))


def _stamp(tls: TlsFiles) -> tuple[int, ...]:
    try:
        return tuple(p.stat().st_mtime_ns for p in (tls.ca, tls.certificate, tls.key))
    except OSError as error:
        raise _unreadable(Path(str(error.filename)), error) from None


def _pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> BackboneError:
    return BackboneError(
        str(path), error.strerror or str(error), "a PEM file the server may read",
        "Restore the server directory from a backup.",
    )  # fmt: skip


def _read(kind: type[_RequestT], request: bytes, context: Any) -> _RequestT:
    try:
        return kind.model_validate_json(request)
    except ValidationError:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a request of this version of fedgraft")
        raise


def _refuse(context: Any, site: str, code: Any, why: str) -> NoReturn:
    """Ends the call."""
    _log.warning("site=%s action=refused reason=%s", site, why)
    context.abort(code, why)
    raise AssertionError("gRPC's abort raises")
