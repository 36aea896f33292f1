"""Fetching a backbone from the federation's server, once: signed, by hash, from where it stopped.

The manifest's signature is verified before anything in it is used, only files that are missing
travel, and a file is used only after its SHA-256 was found right. A connection that fails is
tried again, each time after a longer wait; progress starts the count anew.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedgraft_client.backbone_store import BlobStore
from fedgraft_client.partial_blob import PartialBlob
from fedgraft_common import plan as plans
from fedgraft_common.backbone_protocol import (
    BLOB,
    CHUNK,
    FRAME,
    MANIFEST,
    SERVICE,
    BlobRequest,
    ManifestRequest,
    TlsFiles,
)
from fedgraft_common.errors import BackboneError, TransferError
from fedgraft_common.manifest import DistributionManifest, FileEntry, verify_manifest

Progress = Callable[[int, int], None]
"""Told the bytes that are here and the bytes in all."""
_MANIFEST_SECONDS: Final = 30.0
_BLOB_SECONDS: Final = 600.0  # then the transfer goes on in another call: no server can hang a site
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 2 * CHUNK),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.http2.max_frame_size", FRAME),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.enable_http_proxy", 0),
)
_LATER: Final = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # the server has all the transfers it allows
    grpc.StatusCode.CANCELLED,  # the server is stopping
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,  # a stream that broke in the middle of a frame
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to go on without progress.

    Attributes:
        attempts: in a row without a new byte.
        first: seconds before the second attempt; each wait is twice the one before.
        longest: seconds of one wait.
        sleep: waits.
        draw: between 0 and 1; a wait is shortened by up to a half, so that sites do not come all
            at once.
    """

    attempts: int = 8
    first: float = 0.5
    longest: float = 30.0
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = random.random

    def wait(self, failures: int) -> None:
        """Waits after that many failures in a row."""
        seconds = min(self.longest, self.first * 2.0 ** (failures - 1))
        self.sleep(seconds * (1 - self.draw() / 2))


def fetch_backbone(
    address: str,
    tls: TlsFiles,
    sha256: str,
    operator_key: Ed25519PublicKey,
    store: BlobStore,
    progress: Progress = lambda here, total: None,
    *,
    name: str | None = None,
    patience: Patience | None = None,
) -> Path:
    """A directory with the backbone, from the store or from the server.

    Args:
        address: `host:port` of the backbone service.
        tls: the site's certificate and the federation's CA.
        sha256: of model.safetensors, from the plan.
        operator_key: verifies the manifest.
        store: where it is kept.
        progress: called now and then.
        name: what the plan calls it; None for any.
        patience: with a server that cannot be reached; None for the default.

    Returns:
        A directory for `dir:PATH`. Pin the hash in the store while it is in use.

    Raises:
        BackboneError: the server refuses or has no such backbone, the manifest is not the
            operator's, or a file is not what the manifest says.
        TransferError: the server cannot be reached or the disk is full; a later try goes on.
    """
    patience = patience or Patience()
    with store.lock():
        if directory := store.ready(sha256, operator_key):
            return directory
        with _channel(address, tls) as channel:
            server = _Server(address, channel, patience)
            signed = server.manifest(sha256)
            manifest = verify_manifest(signed, operator_key)
            _check_identity(manifest, sha256, name)
            missing = {e.sha256: e for e in manifest.files if not store.has(e.sha256)}
            store.make_room(manifest)
            here = manifest.size - sum(entry.size for entry in missing.values())
            for entry in missing.values():
                told = partial(_tell, progress, here, manifest.size)
                _fetch_blob(server, store, entry, told)
                here += entry.size
        return store.assemble(manifest, signed)


def local_source(config: plans.Backbone, fetch: Callable[[str, str], Path]) -> plans.Backbone:
    """What to load for a plan's backbone: `server:NAME` becomes a directory on this machine.

    The plan itself, and with it its hash, stays as it is.

    Args:
        config: the plan's.
        fetch: called with SHA-256 and name; gives a directory.
    """
    kind, _, name = config.source.partition(":")
    if kind != "server" or config.sha256 is None:
        return config
    return config.model_copy(update={"source": f"dir:{fetch(config.sha256, name)}"})


def _tell(progress: Progress, before: int, total: int, here: int) -> None:
    progress(before + here, total)


def _fetch_blob(
    server: _Server, store: BlobStore, entry: FileEntry, progress: Callable[[int], None]
) -> None:
    """One file into the store. A resumed file that turns out wrong is fetched once more, whole."""
    while True:
        with PartialBlob(store.partial(entry.sha256), entry) as arriving:
            server.fill(arriving, entry, progress)
            if arriving.finish(store.blob(entry.sha256)):
                return
            if not arriving.resumed_at:
                raise BackboneError(
                    entry.name, "content that does not match its SHA-256",
                    f"SHA-256 {entry.sha256}, as in the signed manifest",
                    "Nothing of it is used. The server's copy was altered or is damaged; tell the "
                    "federation's operator.",
                )  # fmt: skip


class _Server:
    """The other side, with patience."""

    def __init__(self, address: str, channel: Any, patience: Patience) -> None:
        self._address = address
        self._patience = patience
        self._manifest = channel.unary_unary(f"/{SERVICE}/{MANIFEST}")
        self._blob = channel.unary_stream(f"/{SERVICE}/{BLOB}")

    def manifest(self, sha256: str) -> bytes:
        """The signed manifest, not verified."""
        request = ManifestRequest(backbone=sha256).model_dump_json().encode()
        failures = 0
        while True:
            try:
                return bytes(self._manifest(request, timeout=_MANIFEST_SECONDS))
            except grpc.RpcError as error:
                failures += 1
                self._wait_or_raise(error, f"backbone {sha256}", failures)

    def fill(
        self, arriving: PartialBlob, entry: FileEntry, progress: Callable[[int], None]
    ) -> None:
        """Appends until the file has its size."""
        failures = 0
        while arriving.offset < entry.size:
            before = arriving.offset
            request = BlobRequest(sha256=entry.sha256, offset=before).model_dump_json().encode()
            call = self._blob(request, timeout=_BLOB_SECONDS)
            failure: grpc.RpcError | None = None
            try:
                for piece in call:
                    arriving.write(piece)
                    progress(arriving.offset)
            except grpc.RpcError as error:
                failure = error
            finally:
                call.cancel()
            failures = 1 if arriving.offset > before else failures + 1
            if failure is not None:
                self._wait_or_raise(failure, entry.name, failures)
            elif arriving.offset == before:
                raise _truncated(entry, before)

    def _wait_or_raise(self, error: Any, what: str, failures: int) -> None:
        code, details = error.code(), error.details()
        if code in _LATER and failures < self._patience.attempts:
            self._patience.wait(failures)
            return
        if code in _LATER:
            raise TransferError(
                f"{what} from {self._address}", f"{code.name}: {details}",
                "a connection to the federation's backbone service, with its certificate",
                "Check name, port, firewall (outbound) and certificate, and whether the server "
                "runs. What has arrived is kept.",
            ) from None  # fmt: skip
        raise BackboneError(
            f"{what} from {self._address}", f"{code.name}: {details}",
            "a backbone that the server has and lets this site fetch",
            "Talk to the federation's operator.",
        ) from None  # fmt: skip


@contextmanager
def _channel(address: str, tls: TlsFiles) -> Iterator[Any]:
    try:
        ca, key, certificate = (p.read_bytes() for p in (tls.ca, tls.key, tls.certificate))
    except OSError as error:
        raise BackboneError(
            str(error.filename), error.strerror or str(error), "a PEM file of this site",
            "Restore the site's identity from a backup, or join the federation again.",
        ) from None  # fmt: skip
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    with grpc.secure_channel(address, credentials, _OPTIONS) as channel:
        yield channel


def _check_identity(manifest: DistributionManifest, sha256: str, name: str | None) -> None:
    found = f"{manifest.name} with model.safetensors {manifest.sha256}"
    if manifest.sha256 != sha256 or name not in (None, manifest.name):
        raise BackboneError(
            "backbone manifest", found, f"{name or 'a backbone'} with model.safetensors {sha256}",
            "Correct backbone.source or backbone.sha256 in the plan.",
        )  # fmt: skip


def _truncated(entry: FileEntry, found: int) -> BackboneError:
    return BackboneError(
        entry.name, f"{found} bytes", f"{entry.size} bytes, as in the signed manifest",
        "The server's copy is too short; tell the federation's operator.",
    )  # fmt: skip
