"""The gRPC service that hands out backbones, over mutual TLS, and says whether it is well.

Every stream reads its file in chunks and gRPC asks for the next one when the last one is on its
way, so memory does not grow with the number of sites or the size of a backbone. Besides
`fedgraft.Backbone` the port answers `grpc.health.v1.Health`; both want a certificate of the
federation's CA.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedgraft_common.backbone_protocol import (
    CHUNK,
    MAX_REQUEST,
    SERVICE,
    BlobRequest,
    ManifestRequest,
    read_request,
)
from fedgraft_common.certificates import is_pair, read_certificate, read_pem, read_private_key
from fedgraft_common.errors import BackboneError, FedgraftError, IdentityError, MessageError
from fedgraft_server.backbone_library import BackboneLibrary
from fedgraft_server.bandwidth import Bandwidth

LOG = logging.getLogger(__name__)

Authorise = Callable[[str], str]
"""SHA-256 of a client certificate (DER, hexadecimal) -> name of its site.

Raises a FedgraftError to refuse, for instance a revoked one."""

_THREADS_FOR_CALLS: Final = 8  # manifests and health are answered however many streams there are
_STREAMS_PER_SITE: Final = 4
_LOOK_AGAIN: Final = 1.0  # seconds between two looks at whether a site is still allowed
_GRACE: Final = 2.0  # seconds for streams when the service stops; sites resume at the byte


@dataclass(frozen=True, slots=True)
class ServerTls:
    """The server's side of mutual TLS; PEM.

    Attributes:
        ca: issued every site's certificate.
        certificate: the server's.
        key: of the certificate.
    """

    ca: bytes
    certificate: bytes
    key: bytes

    @classmethod
    def of(cls, directory: _Directory) -> ServerTls | None:
        """What a server directory holds now; None while its certificate is being replaced.

        Raises:
            IdentityError: a file is missing or damaged.
        """
        certificate, key = directory.server
        found = cls(read_pem(directory.ca[0]), read_pem(certificate), read_pem(key))
        pair = is_pair(read_certificate(certificate), read_private_key(key))
        return found if pair else None

    def configuration(self) -> Any:
        """For gRPC."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], self.ca)


class BackboneService:
    """The two calls.

    Args:
        library: what is handed out.
        authorise: who may have it.
        bandwidth: how fast.
        streams: at once, of all sites.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        library: BackboneLibrary,
        authorise: Authorise,
        bandwidth: Bandwidth | None = None,
        streams: int = 64,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.streams = streams
        self._library = library
        self._authorise = authorise
        self._bandwidth = bandwidth or Bandwidth()
        self._clock = clock
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def handlers(self) -> Any:
        """For `grpc.Server.add_generic_rpc_handlers`; requests and answers are plain bytes."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "GetManifest": grpc.unary_unary_rpc_method_handler(self.get_manifest),
                "GetBlob": grpc.unary_stream_rpc_method_handler(self.get_blob),
            },
        )

    def get_manifest(self, content: bytes, context: Any) -> bytes:
        """The signed manifest that fits a ManifestRequest."""
        site = self._site(context)
        request = _read(ManifestRequest, content, site, context)
        try:
            signed = self._library.find(request)
        except (BackboneError, OSError) as error:
            LOG.error("library: %s", error, extra={"action": "backbone-manifest"})
            _abort(context, "INTERNAL", "the server cannot read its backbones")
        if signed is None:
            _abort(context, "NOT_FOUND", "no such backbone")
        LOG.info("manifest for %s", site, extra={"action": "backbone-manifest", "site": site})
        return signed.to_bytes()

    def get_blob(self, content: bytes, context: Any) -> Iterator[bytes]:
        """A file from an offset on, in chunks."""
        site = self._site(context)
        request = _read(BlobRequest, content, site, context)
        with self._stream(site, context), contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(self._library.blob(request.sha256).open("rb", 0))
            except OSError:
                _abort(context, "NOT_FOUND", "no such file")
            size = file.seek(0, 2)
            if request.offset > size:
                _abort(context, "OUT_OF_RANGE", f"the file has {size} bytes")
            file.seek(request.offset)
            LOG.info(
                "blob %s from byte %d for %s", request.sha256[:12], request.offset, site,
                extra={"action": "backbone-blob", "site": site},
            )  # fmt: skip
            gone = threading.Event()
            if not context.add_callback(gone.set):
                return
            looked = self._clock()
            while chunk := file.read(CHUNK):
                if gone.wait(self._bandwidth.draw(site, len(chunk))):
                    self._bandwidth.give_back(site, len(chunk))
                    return
                if self._clock() - looked > _LOOK_AGAIN:
                    looked = self._clock()
                    self._site(context)
                yield chunk

    @contextlib.contextmanager
    def _stream(self, site: str, context: Any) -> Iterator[None]:
        with self._lock:
            mine = self._open.get(site, 0)
            is_full = mine >= _STREAMS_PER_SITE or sum(self._open.values()) >= self.streams
            if not is_full:
                self._open[site] = mine + 1
        if is_full:
            _abort(context, "RESOURCE_EXHAUSTED", "too many downloads at once")
        try:
            yield
        finally:
            with self._lock:
                self._open[site] -= 1
                if not self._open[site]:
                    del self._open[site]

    def _site(self, context: Any) -> str:
        """The site of the client certificate, which TLS has verified against the CA."""
        pem = context.auth_context().get("x509_pem_cert", [b""])[0]
        try:
            return self._authorise(sha256(ssl.PEM_cert_to_DER_cert(pem.decode())).hexdigest())
        except (FedgraftError, ValueError) as error:
            LOG.warning("refused: %s", error, extra={"action": "backbone-refuse"})
            _abort(context, "PERMISSION_DENIED", "this certificate may not fetch backbones")


@contextlib.contextmanager
def serve_backbones(
    address: str,
    tls: ServerTls,
    service: BackboneService,
    renewed: Callable[[], ServerTls | None] = lambda: None,
) -> Iterator[int]:
    """Runs the service until the context ends.

    Args:
        address: `host:port` to listen on; port 0 takes a free one.
        tls: the server's certificate and the CA.
        service: what is served.
        renewed: what new connections are to get, asked for each; None for what they got so far.

    Yields:
        The port.

    Raises:
        BackboneError: the port is taken, or the certificate cannot be used.
    """
    threads = service.streams + _THREADS_FOR_CALLS
    with ThreadPoolExecutor(threads, thread_name_prefix="backbone") as pool:
        server = grpc.server(
            pool,
            options=(
                ("grpc.max_receive_message_length", MAX_REQUEST),
                ("grpc.max_metadata_size", 8192),
                ("grpc.max_concurrent_streams", 16),
                ("grpc.so_reuseport", 0),  # a taken port is an error, not a shared one
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ),
            maximum_concurrent_rpcs=threads,
        )
        status = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        server.add_generic_rpc_handlers((service.handlers(),))
        credentials = grpc.dynamic_ssl_server_credentials(
            tls.configuration(),
            lambda: None if (now := renewed()) is None else now.configuration(),
            require_client_authentication=True,
        )
        try:
            port: int = server.add_secure_port(address, credentials)
        except RuntimeError:
            port = 0
        if port == 0:
            raise BackboneError(
                "backbone service", address, "a free port, and a certificate with its key",
                "Choose another port, or stop what listens there.",
            )  # fmt: skip
        server.start()
        for name in ("", SERVICE):
            status.set(name, health_pb2.HealthCheckResponse.SERVING)
        LOG.info("backbone service on port %d", port, extra={"action": "backbone-up"})
        try:
            yield port
        finally:
            status.enter_graceful_shutdown()
            server.stop(_GRACE).wait()


class _Site(Protocol):
    @property
    def name(self) -> str: ...


class Registry(Protocol):
    """What is asked of the server's registry of sites."""

    def site_of(self, certificate_sha256: str) -> _Site:
        """The site of a certificate; raises a FedgraftError for one that may not connect."""


class _Directory(Protocol):
    @property
    def path(self) -> Path: ...
    @property
    def ca(self) -> tuple[Path, Path]: ...
    @property
    def server(self) -> tuple[Path, Path]: ...
    def settings(self) -> Any: ...


def serve(directory: _Directory, registry: Registry) -> contextlib.AbstractContextManager[int]:
    """The service of a server directory, beside its gateway (`fedgraft server up`)."""
    settings = directory.settings()
    tls = ServerTls.of(directory)
    if tls is None:
        raise BackboneError(
            str(directory.server[1]), "a key that does not belong to the certificate", "its own",
            "Start again: the server then makes a new pair.",
        )  # fmt: skip

    def renewed() -> ServerTls | None:
        try:
            return ServerTls.of(directory)
        except IdentityError as error:
            LOG.warning("certificate not read: %s", error, extra={"action": "renew-server"})
            return None

    table = settings.backbone
    bandwidth = Bandwidth(
        getattr(table, "total_bytes_per_second", None),
        getattr(table, "site_bytes_per_second", None),
    )
    service = BackboneService(
        BackboneLibrary(directory.path / "backbones"),
        lambda fingerprint: registry.site_of(fingerprint).name,
        bandwidth,
    )
    host = settings.gateway.bind
    shown = f"[{host}]" if ":" in host else host
    return serve_backbones(f"{shown}:{table.port}", tls, service, renewed)


def _read(kind: Any, content: bytes, site: str, context: Any) -> Any:
    try:
        return read_request(kind, content)
    except MessageError as error:
        facts = {"action": "backbone-refuse", "site": site}
        LOG.warning("refused a request: %s", error, extra=facts)
        _abort(context, "INVALID_ARGUMENT", str(error))


def _abort(context: Any, code: str, details: str) -> NoReturn:
    context.abort(grpc.StatusCode[code], details)
    raise AssertionError(code)  # abort raised
