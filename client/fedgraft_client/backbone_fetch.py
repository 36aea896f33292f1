"""Fetching a backbone from the federation's server, once per site.

    manifest -> signature -> what is missing -> bytes from where they stopped -> SHA-256 -> store

Nothing that arrived is used before the operator's signature (manifest) or the hash (files) was
checked. Whatever the server, the network or the disk does, the store holds whole files only.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedgraft_client.blob_store import BlobStore
from fedgraft_common.backbone_protocol import (
    GET_BLOB,
    GET_MANIFEST,
    MAX_CHUNK,
    BlobRequest,
    ManifestRequest,
)
from fedgraft_common.errors import BackboneError
from fedgraft_common.manifest import (
    MAX_DOCUMENT,
    ManifestFile,
    SignedManifest,
)
from fedgraft_common.plan import Backbone

Progress = Callable[[int, int], None]
"""Called with the bytes that are here and the bytes of all files."""

_BLOCK: Final = 1 << 20
_MANIFEST_SECONDS: Final = 30.0
_STREAM_SECONDS: Final = 600.0  # then the next call goes on at the byte: no stream hangs for ever
_TELL: Final = "Nothing of it was kept; tell the federation's operator."
_PASSING: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    }
)
_REFUSALS: Final = {
    "NOT_FOUND": (
        "a backbone that the server hands out",
        "Check the hash in the plan; the operator adds one with `fedgraft server backbone add`.",
    ),
    "PERMISSION_DENIED": (
        "the certificate of a site that is not revoked", "Talk to the federation's operator.",
    ),
    "UNIMPLEMENTED": ("the backbone service of Fedgraft", "Check the address."),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a site shows the server, and whom it believes; PEM."""

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)

    @classmethod
    def from_files(cls, ca: Path, certificate: Path, key: Path) -> Credentials:
        """Reads three PEM files."""
        return cls(ca.read_bytes(), certificate.read_bytes(), key.read_bytes())


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how soon to try again; attempts count from the last byte that arrived.

    Attributes:
        attempts: before giving up.
        first: seconds before the second attempt; doubled each time.
        longest: seconds, at most.
        sleep: waits.
        jitter: a factor for each wait, so that sites do not come back all at once.
    """

    attempts: int = 8
    first: float = 0.5
    longest: float = 30.0
    sleep: Callable[[float], None] = time.sleep
    jitter: Callable[[], float] = lambda: random.uniform(0.5, 1.0)  # noqa: S311 - not for secrets

    def wait(self, attempt: int) -> None:
        """Waits after attempt number `attempt`, from 1."""
        self.sleep(min(self.first * 2 ** (attempt - 1), self.longest) * self.jitter())


def fetch_backbone(
    address: str,
    credentials: Credentials,
    operator: Ed25519PublicKey,
    sha256: str,
    store: BlobStore,
    progress: Progress | None = None,
    *,
    manifest_sha256: str | None = None,
    retry: Retry | None = None,
) -> Path:
    """A backbone by its hash: from the store, else from the server.

    Args:
        address: `host:port` of the backbone service.
        credentials: the site's.
        operator: the key that the site pinned when it joined.
        sha256: of model.safetensors (`backbone.sha256`).
        store: where it is kept.
        progress: told about every chunk.
        manifest_sha256: of the manifest (`backbone.manifest_sha256`), if the plan names it.
        retry: when the server cannot be reached or is busy.

    Returns:
        A directory that `load_backbone` takes. It may be evicted later unless it is pinned;
        `open_backbone` does both.

    Raises:
        BackboneError: anything that arrived is not what was signed, there is no room, the server
            does not have it, refuses this site or cannot be reached.
    """
    held = store.find(operator, sha256, manifest_sha256)
    if held is not None:
        return held
    with store.exclusive():
        held = store.find(operator, sha256, manifest_sha256)  # another process was faster
        if held is not None:
            return held
        with _channel(address, credentials) as channel:
            download = _Download(channel, address, store, progress, retry or Retry())
            return download.backbone(operator, sha256, manifest_sha256)


@contextlib.contextmanager
def open_backbone(
    address: str,
    credentials: Credentials,
    operator: Ed25519PublicKey,
    sha256: str,
    store: BlobStore,
    progress: Progress | None = None,
    *,
    manifest_sha256: str | None = None,
    retry: Retry | None = None,
) -> Iterator[Path]:
    """`fetch_backbone`, pinned: for as long as the context lasts it is not evicted."""
    with contextlib.ExitStack() as stack:
        while True:
            path = fetch_backbone(
                address, credentials, operator, sha256, store, progress,
                manifest_sha256=manifest_sha256, retry=retry,
            )  # fmt: skip
            pin = stack.enter_context(contextlib.ExitStack())
            pin.enter_context(store.pin(path.name))
            if path.is_dir():
                break
            pin.close()  # evicted between the fetch and the pin
        yield path


@contextlib.contextmanager
def plan_backbone(
    config: Backbone,
    address: str,
    credentials: Credentials,
    operator: Ed25519PublicKey,
    store: BlobStore,
    progress: Progress | None = None,
    *,
    retry: Retry | None = None,
) -> Iterator[Path | None]:
    """Where a plan's backbone lies: what `load_backbone` and `adapted_backbone` want to know.

    Yields:
        The fetched and pinned directory for `server:NAME`; None for other sources, which are
        found without a server. The plan itself stays as it was signed.
    """
    if not config.source.startswith("server:") or config.sha256 is None:
        yield None
        return
    with open_backbone(
        address, credentials, operator, config.sha256, store, progress,
        manifest_sha256=config.manifest_sha256, retry=retry,
    ) as directory:  # fmt: skip
        yield directory


@contextlib.contextmanager
def _channel(address: str, credentials: Credentials) -> Iterator[Any]:
    tls = grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.certificate)
    options = (
        ("grpc.max_receive_message_length", max(MAX_CHUNK, MAX_DOCUMENT) + 1024),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 15_000),
        ("grpc.max_reconnect_backoff_ms", 10_000),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.enable_retries", 0),
    )
    channel = grpc.secure_channel(address, tls, options=options)
    try:
        yield channel
    finally:
        channel.close()


class _Download:
    """One backbone from one server."""

    def __init__(
        self,
        channel: Any,
        address: str,
        store: BlobStore,
        progress: Progress | None,
        retry: Retry,
    ) -> None:
        self._manifest = channel.unary_unary(GET_MANIFEST)
        self._blob = channel.unary_stream(GET_BLOB)
        self._address = address
        self._store = store
        self._progress = progress
        self._retry = retry
        self._done = self._total = 0

    def backbone(
        self, operator: Ed25519PublicKey, sha256: str, manifest_sha256: str | None
    ) -> Path:
        """All of it; see `fetch_backbone`."""
        where = f"{self._address}: manifest"
        signed = self._signed_manifest(sha256, manifest_sha256, where)
        manifest = signed.verify(operator, where)
        for name, found, wanted in (
            ("sha256", manifest.weights_sha256, sha256),
            ("manifest_sha256", manifest.hash, manifest_sha256),
        ):
            if wanted not in (None, found):
                raise BackboneError(
                    where, f"{name} {found}", f"{name} {wanted}, which was asked for", _TELL
                )
        missing = self._store.missing(manifest)
        self._store.make_room(manifest, missing)
        self._total = sum({file.sha256: file.size for file in manifest.files}.values())
        self._done = self._total - sum(file.size for file in missing)
        for file in missing:
            self._fetch(file)
        return self._store.assemble(manifest, signed)

    def _signed_manifest(
        self, sha256: str, manifest_sha256: str | None, where: str
    ) -> SignedManifest:
        request = ManifestRequest(sha256=sha256, manifest_sha256=manifest_sha256).to_bytes()
        attempt = 0
        while True:
            try:
                content: bytes = self._manifest(request, timeout=_MANIFEST_SECONDS)
            except grpc.RpcError as error:
                attempt += 1
                self._wait_or_raise(error, attempt)
            else:
                return SignedManifest.from_bytes(content, where)

    def _fetch(self, file: ManifestFile) -> None:
        """One blob into the store, its hash checked first."""
        before = self._done
        digest, was_resumed = self._receive(file)
        if digest != file.sha256 and was_resumed:
            # The earlier part may be what is wrong, after a power cut for instance: from zero.
            self._store.partial(file.sha256).unlink()
            self._done = before
            digest, _ = self._receive(file)
        if digest != file.sha256:
            self._store.partial(file.sha256).unlink()
            raise BackboneError(
                f"{self._address}: {file.name}", f"sha256 {digest}",
                f"sha256 {file.sha256}, signed by the operator", _TELL,
            )  # fmt: skip
        self._store.accept(file.sha256)

    def _receive(self, file: ManifestFile) -> tuple[str, bool]:
        """Completes the partial file.

        Returns:
            The SHA-256 of all of it, and whether some of it was from an earlier download.
        """
        with self._store.open_partial(file.sha256) as output:
            hasher = hashlib.sha256()
            length = 0
            while block := output.read(_BLOCK):
                hasher.update(block)
                length += len(block)
            if length > file.size:
                output.truncate(0)
                hasher, length = hashlib.sha256(), 0
            was_resumed = length > 0
            self._advance(length)
            attempt = 0
            while length < file.size:
                call = self._blob(
                    BlobRequest(sha256=file.sha256, offset=length).to_bytes(),
                    timeout=_STREAM_SECONDS,
                )
                try:
                    for chunk in call:
                        if length + len(chunk) > file.size:
                            raise self._wrong_size(file, f"more than {file.size} bytes")
                        _write(output, chunk)
                        hasher.update(chunk)
                        length += len(chunk)
                        self._advance(len(chunk))
                        attempt = 0 if chunk else attempt
                    if length < file.size:
                        raise self._wrong_size(file, f"{length} bytes")
                except grpc.RpcError as error:
                    attempt += 1
                    self._wait_or_raise(error, attempt)
                finally:
                    call.cancel()
            return hasher.hexdigest(), was_resumed

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _wrong_size(self, file: ManifestFile, found: str) -> BackboneError:
        self._store.partial(file.sha256).unlink(missing_ok=True)
        return BackboneError(
            f"{self._address}: {file.name}", found,
            f"{file.size} bytes, signed by the operator", _TELL,
        )  # fmt: skip

    def _wait_or_raise(self, error: Any, attempt: int) -> None:
        code = error.code()
        if code in _PASSING and attempt < self._retry.attempts:
            self._retry.wait(attempt)
            return
        details = "".join(c for c in str(error.details() or "") if c.isprintable())[:200]
        allowed, action = _REFUSALS.get(
            code.name,
            ("an answer", "Check address, network and certificate, then start again: the download "
             "goes on where it stopped."),
        )  # fmt: skip
        raise BackboneError(
            f"backbone service {self._address}", f"{code.name}: {details}", allowed, action
        ) from None


def _write(output: BinaryIO, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:  # an unbuffered file may take a part only
        rest = rest[output.write(rest) :]
