"""Backbones over real mutual TLS: what works, what is refused. Long, for refusals are many."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from fedgraft_client import backbone_fetch
from fedgraft_client.backbone_fetch import (
    Credentials,
    Retry,
    fetch_backbone,
    open_backbone,
    plan_backbone,
)
from fedgraft_client.blob_store import BlobStore
from fedgraft_common import plan as plans
from fedgraft_common.backbone import embedded_directory, load_backbone
from fedgraft_common.backbone_protocol import (
    GET_BLOB,
    GET_MANIFEST,
    BlobRequest,
    ManifestRequest,
    read_request,
)
from fedgraft_common.errors import BackboneError, FedgraftError, MessageError, PlanError
from fedgraft_common.manifest import DistributionManifest, SignedManifest, sign
from fedgraft_server.backbone_library import BackboneLibrary
from fedgraft_server.backbone_service import (
    BackboneService,
    ServerTls,
    serve,
    serve_backbones,
)
from fedgraft_server.bandwidth import Bandwidth
from fedgraft_simulations.benchmarks.loopback_tls import LoopbackAuthority

MIB = 1 << 20
AUTHORITY = LoopbackAuthority()
SERVER = AUTHORITY.issue("server")
SITE = AUTHORITY.issue("site-a")
OPERATOR = Ed25519PrivateKey.generate()
CREDENTIALS = Credentials(AUTHORITY.pem, SITE[0], SITE[1])
TLS = ServerTls(AUTHORITY.pem, SERVER[0], SERVER[1])
QUICK = Retry(attempts=3, sleep=lambda _: None)


def authorise(fingerprint: str) -> str:
    """Knows one site; a certificate of the CA that it does not know is refused."""
    if fingerprint != SITE[2]:
        raise FedgraftError("certificate", "revoked", "one that is not revoked", "Ask.")
    return "site-a"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site may need its proxy to reach the server; loopback is not behind it."""
    monkeypatch.setenv("no_grpc_proxy", "127.0.0.1")


@pytest.fixture
def library(tmp_path: Path) -> tuple[BackboneLibrary, DistributionManifest]:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").write_bytes(os.urandom(3 * MIB + 17))
    library = BackboneLibrary(tmp_path / "library")
    return library, library.add(source, OPERATOR, "random")


@contextlib.contextmanager
def running(
    library: BackboneLibrary, address: str = "127.0.0.1:0", **options: Any
) -> Iterator[str]:
    service = BackboneService(library, options.pop("allow", authorise), streams=8, **options)
    with serve_backbones(address, TLS, service) as port:
        yield f"127.0.0.1:{port}"


def fetch(address: str, store: BlobStore, manifest: DistributionManifest, **options: Any) -> Path:
    options = {"retry": QUICK, **options}
    return fetch_backbone(
        address, options.pop("credentials", CREDENTIALS), OPERATOR.public_key(),
        options.pop("sha256", manifest.weights_sha256), store, **options,
    )  # fmt: skip


def is_empty(store: BlobStore) -> bool:
    """Nothing that could be used: no backbone, and every blob is what its name says."""
    for blob in (store.directory / "blobs").iterdir():
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    return not list((store.directory / "backbones").iterdir())


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "store", 100 * MIB)


_JSON = st.dictionaries(
    st.sampled_from(["sha256", "offset", "name", "manifest_sha256", "x"]),
    st.none() | st.integers() | st.floats() | st.text() | st.sampled_from(["0" * 64, "../x"]),
)
Library = tuple[BackboneLibrary, DistributionManifest]


def test_a_fetched_backbone_loads_and_is_fetched_once(tmp_path: Path, store: BlobStore) -> None:
    library = BackboneLibrary(tmp_path / "library")
    manifest = library.add(embedded_directory("glyphs"), OPERATOR)
    config = plans.Backbone(
        source="server:glyphs", sha256=manifest.weights_sha256, manifest_sha256=manifest.hash
    )
    seen: list[tuple[int, int]] = []
    site = (CREDENTIALS, OPERATOR.public_key(), store)
    with running(library) as address:
        with plan_backbone(config, address, *site, lambda *at: seen.append(at)) as directory:
            assert directory is not None and store.is_pinned(manifest.hash)
            loaded = load_backbone(config, directory)
        assert not store.is_pinned(manifest.hash)
    assert loaded.sha256 == manifest.weights_sha256
    assert loaded.manifest == load_backbone(plans.Backbone()).manifest
    assert seen[-1] == (manifest.size, manifest.size) and seen == sorted(seen)
    # The server is gone: nothing is asked of it for what is here.
    with plan_backbone(config, address, *site, retry=QUICK) as again:
        assert again == directory
    with plan_backbone(plans.Backbone(), address, *site) as elsewhere:
        assert elsewhere is None
    (directory / "extra.json").write_text("{}")
    with pytest.raises(BackboneError, match=r"extra.json.*the manifest does not list"):
        load_backbone(config, directory)


def test_a_server_backbone_needs_a_hash_and_a_fetch() -> None:
    with pytest.raises(PlanError, match="needs sha256"):
        plans.Plan().replace({"backbone.source": "server:glyphs"})
    with pytest.raises(BackboneError, match="Fetch it from the federation's server first"):
        load_backbone(plans.Backbone(source="server:glyphs", sha256="0" * 64))


def test_only_what_is_missing_travels(library: Library, store: BlobStore, tmp_path: Path) -> None:
    shelf, first = library
    source = tmp_path / "source"
    (source / "config.json").write_text('{"changed": true}')
    second = shelf.add(source, OPERATOR, "same-weights")
    seen: list[int] = []
    with running(shelf) as address:
        fetch(address, store, first, manifest_sha256=first.hash)
        fetch(
            address, store, second, manifest_sha256=second.hash,
            progress=lambda done, _: seen.append(done),
        )  # fmt: skip
    weights = next(f.size for f in second.files if f.name == "model.safetensors")
    assert seen[0] == weights and seen[-1] == second.size


@pytest.mark.parametrize("left", [1, MIB, 3 * MIB + 16, 3 * MIB + 17])
def test_a_download_goes_on_at_the_byte(library: Library, store: BlobStore, left: int) -> None:
    shelf, manifest = library
    weights = shelf.blob(manifest.weights_sha256).read_bytes()
    store.partial(manifest.weights_sha256).write_bytes(weights[:left])
    seen: list[int] = []
    with running(shelf) as address:
        path = fetch(address, store, manifest, progress=lambda done, _: seen.append(done))
    assert 2 + left in seen  # config.json, and what was here
    assert (path / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("junk", [b"x" * MIB, b"x" * (4 * MIB)])
def test_a_damaged_partial_file_is_fetched_anew(
    library: Library, store: BlobStore, junk: bytes
) -> None:
    shelf, manifest = library
    store.partial(manifest.weights_sha256).write_bytes(junk)
    with running(shelf) as address:
        path = fetch(address, store, manifest)
    assert (path / "model.safetensors").read_bytes() == shelf.blob(
        manifest.weights_sha256
    ).read_bytes()


def test_a_damaged_blob_at_the_site_is_replaced(library: Library, store: BlobStore) -> None:
    shelf, manifest = library
    with running(shelf) as address:
        blob = fetch(address, store, manifest) / "model.safetensors"
        blob.chmod(0o600)
        blob.write_bytes(b"x" * blob.stat().st_size)
        assert hashlib.sha256(
            (fetch(address, store, manifest) / "model.safetensors").read_bytes()
        ).hexdigest() == manifest.weights_sha256  # fmt: skip


def _cut(content: bytes) -> bytes:
    return content[:-1]


def _flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def _lengthen(content: bytes) -> bytes:
    return content + b"x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_flip, r"model.safetensors: found 'sha256 .*signed by the operator"),
        (_cut, r"found '3145744 bytes'; allowed: 3145745 bytes"),
        (_lengthen, r"found 'more than 3145745 bytes'"),
    ],
)
def test_an_altered_blob_is_refused(
    library: Library, store: BlobStore, change: Callable[[bytes], bytes], message: str
) -> None:
    shelf, manifest = library
    blob = shelf.blob(manifest.weights_sha256)
    right = blob.read_bytes()
    blob.write_bytes(change(right))
    with running(shelf) as address:
        with pytest.raises(BackboneError, match=message):
            fetch(address, store, manifest)
        assert is_empty(store) and not store.partial(manifest.weights_sha256).exists()
        blob.write_bytes(right)
        assert fetch(address, store, manifest).is_dir()


def _replaced(shelf: BackboneLibrary, manifest: DistributionManifest, **changes: Any) -> None:
    document = {**manifest.model_dump(mode="json"), **changes}
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    signature = OPERATOR.sign(b"fedgraft backbone manifest 1\n" + canonical)
    _serve_document(shelf, SignedManifest(canonical, signature).to_bytes())


def _serve_document(shelf: BackboneLibrary, content: bytes) -> None:
    """A hostile server: it hands out what its own checks would not let pass."""

    def find(request: ManifestRequest) -> SignedManifest:
        return SignedManifest.from_bytes(content)

    shelf.find = find  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "name",
    ["../model.json", "/etc/x.json", "a/b.json", "..", "a\\b.json", "model.pt", "x.py", ".x.json",
     "config.JSON", "CONFIG.json", "a\n.json", "distribution.json", "adapter_config.json", ""],
)  # fmt: skip
def test_a_manifest_with_such_a_file_is_refused(
    library: Library, store: BlobStore, tmp_path: Path, name: str
) -> None:
    shelf, manifest = library
    files = [f.model_dump() for f in manifest.files]
    _replaced(shelf, manifest, files=[*files, {**files[0], "name": name}])
    before = sorted(tmp_path.rglob("*"))
    with (
        running(shelf) as address,
        pytest.raises(BackboneError, match=r"manifest: files|two files"),
    ):
        fetch(address, store, manifest)
    assert is_empty(store)
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before] == [store.directory / "lock"]


def test_another_signature_or_backbone_is_refused(library: Library, store: BlobStore) -> None:
    shelf, manifest = library
    with running(shelf) as address:
        stranger = sign(manifest, Ed25519PrivateKey.generate())
        _serve_document(shelf, stranger.to_bytes())
        with pytest.raises(BackboneError, match="one that the operator's key did not make"):
            fetch(address, store, manifest)
        _serve_document(shelf, sign(manifest, OPERATOR).to_bytes())
        with pytest.raises(BackboneError, match=r"found 'sha256 [0-9a-f]{64}'.*was asked for"):
            fetch(address, store, manifest, sha256="0" * 64)
        with pytest.raises(BackboneError, match=r"manifest_sha256 .*was asked for"):
            fetch(address, store, manifest, manifest_sha256="0" * 64)
    assert is_empty(store)


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the service's log says."""
    return [r.getMessage() for r in caplog.records if vars(r).get("action") == "backbone-refuse"]


def test_a_stranger_gets_nothing(
    library: Library, store: BlobStore, caplog: pytest.LogCaptureFixture
) -> None:
    shelf, manifest = library
    revoked = AUTHORITY.issue("site-b")
    foreign = LoopbackAuthority().issue("site-a")
    expired = AUTHORITY.issue("site-a", days=-1)
    with running(shelf) as address:
        with pytest.raises(BackboneError, match=r"PERMISSION_DENIED.*Talk to the federation's op"):
            fetch(address, store, manifest, credentials=Credentials(AUTHORITY.pem, *revoked[:2]))
        for other in (foreign, expired):
            with pytest.raises(BackboneError, match=r"found 'UNAVAILABLE: .*allowed: an answer"):
                fetch(address, store, manifest, credentials=Credentials(AUTHORITY.pem, *other[:2]))
        with pytest.raises(BackboneError, match="UNAVAILABLE"):  # not the site's CA
            stranger = Credentials(LoopbackAuthority().pem, SITE[0], SITE[1])
            fetch(address, store, manifest, credentials=stranger)
        for channel in (
            grpc.insecure_channel(address),
            grpc.secure_channel(address, grpc.ssl_channel_credentials(AUTHORITY.pem)),
        ):
            with channel, pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(GET_MANIFEST)(b"{}", timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert is_empty(store)
    assert len(refusals(caplog)) == 1  # the others did not get through the handshake


def test_malformed_requests_are_refused(library: Library, caplog: pytest.LogCaptureFixture) -> None:
    shelf, manifest = library
    with running(shelf) as address, backbone_fetch._channel(address, CREDENTIALS) as channel:

        def code(method: str, content: bytes) -> str:
            with pytest.raises(grpc.RpcError) as caught:
                list(channel.unary_stream(method)(content, timeout=5))
            return str(caught.value.code().name)

        for content in (b"", b"[]", b"\xff", b'{"sha256": "../../x"}', b'{"path": "/etc/passwd"}'):
            assert code(GET_BLOB, content) == "INVALID_ARGUMENT"
            assert code(GET_MANIFEST, content) == "INVALID_ARGUMENT"
            assert len(refusals(caplog)) == 2 and "found 'a wrong" in refusals(caplog)[0]
            caplog.clear()
        assert code(GET_MANIFEST, b"{}") == "NOT_FOUND"
        assert code(GET_MANIFEST, ManifestRequest(sha256="0" * 64).to_bytes()) == "NOT_FOUND"
        assert code(GET_BLOB, BlobRequest(sha256="0" * 64).to_bytes()) == "NOT_FOUND"
        beyond = BlobRequest(sha256=manifest.weights_sha256, offset=3 * MIB + 18)
        assert code(GET_BLOB, beyond.to_bytes()) == "OUT_OF_RANGE"
        assert code(GET_BLOB, b" " * 5000) == "RESOURCE_EXHAUSTED"
        assert code("/fedgraft.Backbone/Delete", b"{}") == "UNIMPLEMENTED"


def test_health_is_served_beside_it(library: Library) -> None:
    with running(library[0]) as address, backbone_fetch._channel(address, CREDENTIALS) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for name in ("", "fedgraft.Backbone"):
            answer = check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_revoked_site_is_cut_off_midway(library: Library, store: BlobStore) -> None:
    shelf, manifest = library
    times = iter(range(1000))
    asked: list[str] = []

    def allow(fingerprint: str) -> str:
        asked.append(fingerprint)
        if len(asked) > 4:  # manifest, config.json, weights and one look midway pass
            raise FedgraftError("certificate", "revoked", "one that is not revoked", "Ask.")
        return "site-a"

    with (
        running(shelf, allow=allow, clock=lambda: 2.0 * next(times)) as address,
        pytest.raises(BackboneError, match="PERMISSION_DENIED"),
    ):
        fetch(address, store, manifest)
    assert is_empty(store)


@contextlib.contextmanager
def cutting(address: str, after: int) -> Iterator[str]:
    """A proxy whose every connection breaks after so many bytes from the server."""
    host, _, port = address.partition(":")
    open_ones: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket, limit: float) -> None:
        with contextlib.suppress(OSError):
            while limit > 0 and (data := source.recv(65536)):
                sink.sendall(data)
                limit -= len(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                open_ones.append(near)  # closed even if nobody answers behind it
                far = socket.create_connection((host, int(port)))
                open_ones.append(far)
                for way in ((near, far, math.inf), (far, near, float(after))):
                    threads.append(threading.Thread(target=pump, args=way))
                    threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = [threading.Thread(target=accept)]
        threads[0].start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    threads[0].join(10)
    for end in open_ones:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(10)
    for end in open_ones:
        end.close()


def test_a_connection_that_breaks_is_made_again(library: Library, store: BlobStore) -> None:
    shelf, manifest = library
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        time.sleep(seconds)

    retry = Retry(attempts=3, first=0.05, sleep=wait)
    with running(shelf) as address, cutting(address, 3 * MIB // 2) as cut:
        path = fetch(cut, store, manifest, retry=retry)
    assert len(waits) >= 2  # three connections at least
    assert (path / "model.safetensors").read_bytes() == shelf.blob(
        manifest.weights_sha256
    ).read_bytes()


def test_a_server_that_dies_midway_for_good_leaves_nothing_usable(
    library: Library, store: BlobStore
) -> None:
    shelf, manifest = library
    with contextlib.ExitStack() as life:
        address = life.enter_context(running(shelf))
        cut = life.enter_context(cutting(address, 3 * MIB // 2))
        retry = Retry(attempts=2, first=0.01, sleep=lambda _: life.close())
        with pytest.raises(BackboneError, match=r"goes on where it stopped"):
            fetch(cut, store, manifest, retry=retry)
    assert is_empty(store)
    assert store.partial(manifest.weights_sha256).stat().st_size >= MIB


def test_nobody_there_is_said_after_some_attempts(library: Library, store: BlobStore) -> None:
    waits: list[float] = []
    retry = Retry(attempts=4, first=1.0, longest=3.0, sleep=waits.append, jitter=lambda: 1.0)
    with pytest.raises(BackboneError, match=r"backbone service 127\.0\.0\.1:1: found 'UNAVAILABLE"):
        fetch("127.0.0.1:1", store, library[1], retry=retry)
    assert waits == [1.0, 2.0, 3.0]


def test_a_full_disk_is_said_and_the_download_goes_on(
    library: Library, store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, manifest = library
    real = backbone_fetch._write

    def full(output: Any, chunk: bytes) -> None:
        if output.tell() > MIB:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(output, chunk)

    with running(shelf) as address:
        with monkeypatch.context() as patch, pytest.raises(BackboneError, match="Free some space"):
            patch.setattr(backbone_fetch, "_write", full)
            fetch(address, store, manifest)
        assert is_empty(store)
        assert store.partial(manifest.weights_sha256).stat().st_size >= MIB
        assert fetch(address, store, manifest).is_dir()


def test_bandwidth_is_limited_and_health_answers_meanwhile(
    library: Library, store: BlobStore
) -> None:
    shelf, manifest = library
    with running(shelf, bandwidth=Bandwidth(per_site=4.0 * MIB)) as address:
        started = time.perf_counter()
        fetch(address, store, manifest)
        assert time.perf_counter() - started >= 0.45  # 3 MiB at 4 MiB/s, less a quarter of burst


def test_one_site_cannot_take_every_stream(library: Library) -> None:
    shelf, manifest = library
    request = BlobRequest(sha256=manifest.weights_sha256).to_bytes()
    with (
        running(shelf, bandwidth=Bandwidth(per_site=MIB / 100)) as address,
        backbone_fetch._channel(address, CREDENTIALS) as channel,
    ):
        calls = [channel.unary_stream(GET_BLOB)(request, timeout=20) for _ in range(6)]
        ended = threading.Semaphore(0)
        for call in calls:
            call.add_callback(ended.release)
        assert ended.acquire(timeout=10) and ended.acquire(timeout=10)
        codes = [call.code() for call in calls if not call.is_active()]
        assert codes == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 2
        for call in calls:
            call.cancel()


def test_eight_sites_at_once(library: Library, tmp_path: Path) -> None:
    shelf, manifest = library
    found: list[Path] = []
    names: dict[str, str] = {}
    with running(shelf, allow=lambda fingerprint: names[fingerprint]) as address:

        def site(number: int) -> None:
            store = BlobStore(tmp_path / f"store-{number}", 100 * MIB)
            mine = AUTHORITY.issue(f"site-{number}")
            names[mine[2]] = f"site-{number}"
            credentials = Credentials(AUTHORITY.pem, mine[0], mine[1])
            found.append(fetch(address, store, manifest, credentials=credentials))

        threads = [threading.Thread(target=site, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(found) == 8


_CLIENT = """
import sys
from pathlib import Path
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from fedgraft_client.backbone_fetch import Credentials, fetch_backbone
from fedgraft_client.blob_store import BlobStore
address, directory, sha256 = sys.argv[1:]
root = Path(directory)
fetch_backbone(
    address, Credentials.from_files(root / "ca.pem", root / "site.pem", root / "site.key"),
    load_pem_public_key((root / "operator.pub").read_bytes()), sha256,
    BlobStore(root / "store", 1 << 30), lambda done, total: print(done, flush=True),
)
"""


def test_a_killed_client_goes_on_where_it_stopped(library: Library, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    shelf, manifest = library
    public = OPERATOR.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "operator.pub").write_bytes(public)
    for name, content in (("ca.pem", AUTHORITY.pem), ("site.pem", SITE[0]), ("site.key", SITE[1])):
        (tmp_path / name).write_bytes(content)
    store = BlobStore(tmp_path / "store", 1 << 30)
    with running(shelf, bandwidth=Bandwidth(per_site=2.0 * MIB)) as address:
        command = [sys.executable, "-c", _CLIENT, address, str(tmp_path), manifest.weights_sha256]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            while int(client.stdout.readline()) < MIB:
                pass
            client.send_signal(signal.SIGKILL)
            client.wait(10)
        assert is_empty(store)
        left = store.partial(manifest.weights_sha256).stat().st_size
        assert left >= MIB // 2
    seen: list[int] = []
    with running(shelf) as address:
        path = fetch(address, store, manifest, progress=lambda done, _: seen.append(done))
    assert left + 2 in seen
    assert hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest() == (
        manifest.weights_sha256
    )


def test_a_taken_port_is_said(library: Library) -> None:
    with (
        running(library[0]) as address,
        pytest.raises(BackboneError, match="a free port"),
        running(library[0], address),
    ):
        pass


def test_a_backbone_in_use_is_not_evicted(library: Library, tmp_path: Path) -> None:
    shelf, first = library
    (tmp_path / "source" / "model.safetensors").write_bytes(os.urandom(2 * MIB))
    second = shelf.add(tmp_path / "source", OPERATOR, "second")
    store = BlobStore(tmp_path / "store", 4 * MIB)
    with running(shelf) as address:
        site = (address, CREDENTIALS, OPERATOR.public_key())
        with open_backbone(*site, first.weights_sha256, store) as held:
            with pytest.raises(BackboneError, match="Raise the limit of the backbone store"):
                fetch(address, store, second)
            assert (held / "model.safetensors").is_file()
        fetch(address, store, second)
        assert not held.exists() and not store.blob(first.weights_sha256).exists()
        assert store.size() == second.size


def test_a_server_directory_is_served(library: Library, tmp_path: Path, store: BlobStore) -> None:
    shelf, manifest = library
    shelf.directory.rename(tmp_path / "backbones")
    for name, content in (("ca.pem", AUTHORITY.pem), ("s.pem", SERVER[0]), ("s.key", SERVER[1])):
        (tmp_path / name).write_bytes(content)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = SimpleNamespace(
        gateway=SimpleNamespace(bind="127.0.0.1"), backbone=SimpleNamespace(port=port)
    )
    directory: Any = SimpleNamespace(
        path=tmp_path,
        ca=(tmp_path / "ca.pem", tmp_path / "ca.key"),
        server=(tmp_path / "s.pem", tmp_path / "s.key"),
        settings=lambda: settings,
    )
    registry: Any = SimpleNamespace(site_of=lambda found: SimpleNamespace(name=authorise(found)))
    with serve(directory, registry) as bound:
        assert bound == port
        assert fetch(f"127.0.0.1:{port}", store, manifest).is_dir()
        assert shown_to_sites(port, tmp_path) == SERVER[0]
        renewed = AUTHORITY.issue("server")
        (tmp_path / "s.key").write_bytes(renewed[1])  # as the server renews: first the key
        assert shown_to_sites(port, tmp_path) == SERVER[0]
        (tmp_path / "s.pem").write_bytes(renewed[0])
        assert shown_to_sites(port, tmp_path) == renewed[0]
        (tmp_path / "s.pem").write_bytes(b"damaged")
        assert shown_to_sites(port, tmp_path) == renewed[0]


def shown_to_sites(port: int, directory: Path) -> bytes:
    """The certificate that a new connection gets; PEM."""
    (directory / "site.pem").write_bytes(SITE[0])
    (directory / "site.key").write_bytes(SITE[1])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(directory / "ca.pem")
    context.load_cert_chain(directory / "site.pem", directory / "site.key")
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        context.wrap_socket(plain) as connection,
    ):
        der = connection.getpeercert(binary_form=True)
    assert der is not None
    return ssl.DER_cert_to_PEM_cert(der).encode()


@given(st.binary(max_size=300) | st.builds(lambda d: json.dumps(d).encode(), _JSON))
def test_any_request_is_read_or_refused(content: bytes) -> None:
    kinds: tuple[Any, ...] = (ManifestRequest, BlobRequest)
    for kind in kinds:
        with contextlib.suppress(MessageError):
            request = read_request(kind, content)
            assert kind.model_validate_json(request.to_bytes()) == request
