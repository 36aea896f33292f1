"""A site fetches a backbone over real mutual TLS, or it is told why not; nothing half is used."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedgraft_client import backbone_fetch
from fedgraft_client.backbone_fetch import Patience, fetch_backbone, local_source
from fedgraft_client.backbone_store import BlobStore
from fedgraft_client.partial_blob import PartialBlob
from fedgraft_common.backbone import embedded_directory, load_backbone
from fedgraft_common.backbone_protocol import BLOB, MANIFEST, SERVICE, TlsFiles
from fedgraft_common.errors import BackboneError, TransferError
from fedgraft_common.manifest import file_sha256, sign_manifest, verify_manifest
from fedgraft_common.plan import Plan
from fedgraft_server import backbone_service
from fedgraft_server.backbone_library import BackboneLibrary
from fedgraft_server.backbone_service import Limits, RunningService, serve
from fedgraft_simulations.benchmarks.certificates import LoopbackAuthority

HURRY = Patience(attempts=3, first=0.01, longest=0.05)


@dataclass
class Federation:
    """A server with one backbone, and what a site needs to fetch it."""

    root: Path
    authority: LoopbackAuthority
    key: Ed25519PrivateKey
    library: BackboneLibrary
    tls: TlsFiles
    site: TlsFiles
    sha256: str
    allowed: Callable[[bytes], bool] = lambda pem: True
    service: RunningService | None = None
    port: int = 0

    def start(self, limits: Limits | None = None) -> None:
        address = f"127.0.0.1:{self.port}"
        self.service = serve(self.library, address, self.tls, lambda pem: self.allowed(pem), limits)
        self.port = self.service.port

    def stop(self) -> None:
        if self.service is not None:
            self.service.stop()
        self.service = None

    @property
    def store(self) -> BlobStore:
        return BlobStore(self.root / "store", 2**30)

    def blob(self, name: str = "model.safetensors") -> Path:
        signed = json.loads(
            json.loads(self.library.signed_manifest(self.sha256) or b"")["manifest"]
        )
        digest = next(f["sha256"] for f in signed["files"] if f["name"] == name)
        return self.library.directory / "blobs" / str(digest)

    def fetch(self, **changes: Any) -> Path:
        options: dict[str, Any] = {
            "address": f"127.0.0.1:{self.port}", "tls": self.site, "sha256": self.sha256,
            "operator_key": self.key.public_key(), "store": self.store, "patience": HURRY,
        }  # fmt: skip
        return fetch_backbone(**(options | changes))

    def nothing_is_used(self) -> bool:
        return not list(self.store.directory.glob("backbones/*"))


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    authority = LoopbackAuthority.create(tmp_path / "tls")
    key = Ed25519PrivateKey.generate()
    library = BackboneLibrary(tmp_path / "library")
    manifest = library.add(embedded_directory("glyphs"), key)
    tls, site = authority.server(), authority.site("ward-3")
    made = Federation(tmp_path, authority, key, library, tls, site, manifest.sha256)
    made.start()
    yield made
    made.stop()


def altered(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


# --- what should work


def test_a_fetched_backbone_is_the_one_that_was_added(federation: Federation) -> None:
    told: list[tuple[int, int]] = []
    directory = federation.fetch(progress=lambda here, total: told.append((here, total)))
    original = embedded_directory("glyphs")
    for name in ("config.json", "manifest.json", "model.safetensors"):
        assert (directory / name).read_bytes() == (original / name).read_bytes()
    assert told == sorted(told) and told[-1][0] == told[-1][1] > 1_586_472
    plan = Plan().replace(
        {"backbone.source": "server:glyphs", "backbone.sha256": federation.sha256}
    )
    before = plan.hash
    config = local_source(
        plan.backbone, lambda sha256, name: federation.fetch(sha256=sha256, name=name)
    )
    assert load_backbone(config).sha256 == federation.sha256
    assert plan.hash == before and plan.backbone.source == "server:glyphs"
    embedded = Plan().backbone
    assert local_source(embedded, lambda *_: pytest.fail("nothing to fetch")) is embedded


def test_a_backbone_is_fetched_once(federation: Federation) -> None:
    first = federation.fetch()
    federation.stop()
    assert federation.fetch() == first


def test_only_missing_files_travel(federation: Federation, tmp_path: Path) -> None:
    federation.fetch()
    copy = tmp_path / "copy"
    shutil.copytree(embedded_directory("glyphs"), copy)
    (copy / "README.md").write_text("added")
    federation.library.add(copy, federation.key)
    manifest = federation.store.directory / "manifests" / f"{federation.sha256}.json"
    manifest.unlink()
    told: list[int] = []
    directory = federation.fetch(progress=lambda here, total: told.append(here))
    assert (directory / "README.md").read_text() == "added"
    assert len(told) == 1


def test_a_transfer_goes_on_at_the_byte_where_it_stopped(federation: Federation) -> None:
    whole = federation.blob().read_bytes()
    arriving = federation.store.partial(federation.sha256)
    arriving.parent.mkdir(parents=True)
    arriving.write_bytes(whole[:1_500_001])
    # the server lacks what the site has: only an offset can succeed
    altered(federation.blob(), b"\0" * 1_500_001 + whole[1_500_001:])
    directory = federation.fetch()
    assert (directory / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("content", [b"\0" * 1000, b"\0" * 1_586_472, b"\0" * 1_586_473])
def test_a_damaged_beginning_is_fetched_again(federation: Federation, content: bytes) -> None:
    arriving = federation.store.partial(federation.sha256)
    arriving.parent.mkdir(parents=True)
    arriving.write_bytes(content)
    directory = federation.fetch()
    assert file_sha256(directory / "model.safetensors") == federation.sha256


def test_a_damaged_store_heals(federation: Federation) -> None:
    directory = federation.fetch()
    weights = directory / "model.safetensors"
    weights.chmod(0o600)
    with weights.open("r+b") as file:
        file.write(b"damage")
    assert file_sha256(federation.fetch() / "model.safetensors") == federation.sha256


def test_a_killed_client_leaves_nothing_that_is_used(federation: Federation) -> None:
    federation.stop()
    federation.start(Limits(bytes_per_second=1_000_000))
    code = (
        "import sys; from fedgraft_simulations.benchmarks import backbone_transfer as b; "
        "b.fetch_once(*sys.argv[1:])"
    )
    shutil.copy(federation.site.certificate, federation.root / "tls" / "site-0.pem")
    shutil.copy(federation.site.key, federation.root / "tls" / "site-0.key")
    public = federation.key.public_key().public_bytes_raw().hex()
    arguments = [str(federation.root), str(federation.port), federation.sha256, public]
    arriving = federation.store.partial(federation.sha256)
    with subprocess.Popen([sys.executable, "-c", code, *arguments]) as process:
        deadline = time.monotonic() + 60
        while not (arriving.exists() and arriving.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    kept = arriving.stat().st_size
    assert 0 < kept < 1_586_472
    assert federation.nothing_is_used()
    told: list[int] = []
    federation.fetch(progress=lambda here, total: told.append(here))
    assert told[1] > kept  # told[0] is the configuration


def test_a_server_that_dies_midway_is_asked_again(federation: Federation) -> None:
    federation.stop()
    federation.start(Limits(bytes_per_second=2_000_000))
    restarted = threading.Event()
    seen: list[int] = []

    def watch(here: int, total: int) -> None:
        seen.append(here)
        if here > 600_000 and not restarted.is_set():
            restarted.set()
            federation.stop()
            threading.Timer(0.3, federation.start).start()

    patience = Patience(attempts=20, first=0.05, longest=0.2)
    directory = federation.fetch(progress=watch, patience=patience)
    assert restarted.is_set()
    assert seen == sorted(seen)  # nothing was fetched twice
    assert file_sha256(directory / "model.safetensors") == federation.sha256


def test_many_sites_at_once(federation: Federation) -> None:
    sites = [federation.authority.site(f"site-{n}") for n in range(8)]

    def fetch(number: int) -> Path:
        store = BlobStore(federation.root / f"store-{number}", 2**30)
        return federation.fetch(tls=sites[number], store=store)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(fetch, range(8)))
    assert all(file_sha256(d / "model.safetensors") == federation.sha256 for d in found)


def test_two_processes_that_share_a_store_do_not_disturb_each_other(
    federation: Federation,
) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = {future.result() for future in [pool.submit(federation.fetch) for _ in range(4)]}
    assert len(found) == 1


def test_bandwidth_is_limited_for_each_site(federation: Federation) -> None:
    federation.stop()
    federation.start(Limits(bytes_per_second=3_000_000))
    started = time.monotonic()
    federation.fetch()
    seconds = time.monotonic() - started
    assert seconds > 0.5 * 1_586_472 / 3_000_000 - 0.01


def test_a_renewed_server_certificate_needs_no_restart(federation: Federation) -> None:
    before = server_certificate(federation)
    federation.authority.server()  # overwrites the files
    assert server_certificate(federation) != before
    federation.fetch()


def server_certificate(federation: Federation) -> str:
    context = ssl.create_default_context(cafile=str(federation.site.ca))
    context.load_cert_chain(federation.site.certificate, federation.site.key)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", federation.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        return str(secure.getpeercert(binary_form=True))


# --- what the server refuses


def channel(federation: Federation, site: TlsFiles) -> Any:
    credentials = grpc.ssl_channel_credentials(
        site.ca.read_bytes(), site.key.read_bytes(), site.certificate.read_bytes()
    )
    return grpc.secure_channel(f"127.0.0.1:{federation.port}", credentials)


def code_of(call: Callable[[], object]) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code()


def test_strangers_are_refused(federation: Federation) -> None:
    other = LoopbackAuthority.create(federation.root / "other")
    stranger = replace(other.site("ward-3"), ca=federation.site.ca)
    with pytest.raises(TransferError, match="allowed: a connection to the federation's backbone"):
        federation.fetch(tls=stranger)
    expired = federation.authority.site("late", dt.timedelta(days=-1))
    with pytest.raises(TransferError):
        federation.fetch(tls=expired)
    address = f"127.0.0.1:{federation.port}"
    ca = federation.site.ca.read_bytes()
    for strange in (
        grpc.insecure_channel(address),
        grpc.secure_channel(address, grpc.ssl_channel_credentials(ca)),
    ):
        with strange:
            call = strange.unary_unary(f"/{SERVICE}/{MANIFEST}")
            assert code_of(partial(call, b"{}", timeout=10)) in (
                grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED,
            )  # fmt: skip
    assert federation.nothing_is_used()


def test_a_site_that_poses_as_the_server_is_refused(federation: Federation) -> None:
    federation.stop()
    federation.tls = federation.site
    federation.start()
    with pytest.raises(TransferError):
        federation.fetch()


def test_a_server_of_another_ca_is_refused(federation: Federation) -> None:
    other = LoopbackAuthority.create(federation.root / "other")
    federation.stop()
    federation.tls = replace(other.server(), ca=federation.tls.ca)
    federation.start()
    with pytest.raises(TransferError):
        federation.fetch()


def test_a_revoked_site_is_refused(federation: Federation) -> None:
    revoked = federation.site.certificate.read_bytes()
    federation.allowed = lambda pem: pem != revoked
    with pytest.raises(BackboneError, match=r"PERMISSION_DENIED.*revoked, expired or unknown"):
        federation.fetch()
    federation.fetch(tls=federation.authority.site("another"))


def test_a_site_that_is_revoked_meanwhile_gets_no_more(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone_service, "_CHECK_EVERY", 1)
    federation.stop()
    federation.start(Limits(bytes_per_second=1_000_000))
    with channel(federation, federation.site) as open_channel:
        asked = json.dumps({"sha256": federation.sha256}).encode()
        call = open_channel.unary_stream(f"/{SERVICE}/{BLOB}")(asked, timeout=10)
        received = len(next(call))
        federation.allowed = lambda pem: False
        with pytest.raises(grpc.RpcError, match="revoked"):
            for piece in call:
                received += len(piece)
    assert received < 1_586_472


@pytest.mark.parametrize(
    "request_bytes",
    [b"", b"{}", b"[]", b"\xff", b'{"backbone": "../x"}', b'{"sha256": "../../ca.key"}',
     b'{"sha256": "%s", "offset": -1}' % (b"0" * 64),
     b'{"sha256": "%s", "offset": 0.5}' % (b"0" * 64),
     b'{"sha256": "%s", "more": 1}' % (b"0" * 64)],
)  # fmt: skip
def test_malformed_requests_are_refused(federation: Federation, request_bytes: bytes) -> None:
    with channel(federation, federation.site) as open_channel:
        blob = open_channel.unary_stream(f"/{SERVICE}/{BLOB}")
        manifest = open_channel.unary_unary(f"/{SERVICE}/{MANIFEST}")
        wrong = grpc.StatusCode.INVALID_ARGUMENT
        assert code_of(lambda: list(blob(request_bytes, timeout=10))) is wrong
        assert code_of(lambda: manifest(request_bytes, timeout=10)) is wrong


def test_an_oversized_request_is_refused(federation: Federation) -> None:
    with channel(federation, federation.site) as open_channel:
        manifest = open_channel.unary_unary(f"/{SERVICE}/{MANIFEST}")
        code = code_of(lambda: manifest(b" " * 5000, timeout=10))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_what_is_not_there_is_said(federation: Federation) -> None:
    with pytest.raises(BackboneError, match=f"NOT_FOUND: no backbone {'0' * 64}"):
        federation.fetch(sha256="0" * 64)
    federation.blob().unlink()
    with pytest.raises(BackboneError, match="NOT_FOUND: no file"):
        federation.fetch()
    with channel(federation, federation.site) as open_channel:
        blob = open_channel.unary_stream(f"/{SERVICE}/{BLOB}")
        digest = federation.blob("config.json").name
        asked = json.dumps({"sha256": digest, "offset": 10_000}).encode()
        assert code_of(lambda: list(blob(asked, timeout=10))) is grpc.StatusCode.OUT_OF_RANGE


def test_a_site_gets_only_its_share_of_streams(federation: Federation) -> None:
    federation.stop()
    federation.start(Limits(bytes_per_second=100_000, streams_per_site=1))
    asked = json.dumps({"sha256": federation.sha256}).encode()
    with channel(federation, federation.site) as open_channel:
        blob = open_channel.unary_stream(f"/{SERVICE}/{BLOB}")
        first = blob(asked)
        next(first)
        code = code_of(lambda: list(blob(asked, timeout=10)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        other = federation.authority.site("another")
        with channel(federation, other) as second_channel:
            second = second_channel.unary_stream(f"/{SERVICE}/{BLOB}")(asked)
            assert next(second)
            second.cancel()
        first.cancel()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:  # the place is free again soon after
            third = blob(asked)
            try:
                assert next(third)
                break
            except grpc.RpcError:
                time.sleep(0.05)
        else:
            pytest.fail("the stream's place was not given back")
        third.cancel()


def test_a_port_in_use_is_said(federation: Federation) -> None:
    with pytest.raises(BackboneError, match="an address that cannot be listened on"):
        serve(federation.library, f"127.0.0.1:{federation.port}", federation.tls, lambda pem: True)
    missing = replace(federation.tls, key=federation.root / "absent.key")
    with pytest.raises(BackboneError, match=r"absent\.key: found 'No such file"):
        serve(federation.library, "127.0.0.1:0", missing, lambda pem: True)


def test_health_is_told_on_the_same_port(federation: Federation) -> None:
    with channel(federation, federation.site) as open_channel:
        check = health_pb2_grpc.HealthStub(open_channel).Check
        for name in ("", SERVICE):
            answer = check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


# --- what the site refuses


def test_an_altered_file_is_never_used(federation: Federation) -> None:
    content = bytearray(federation.blob().read_bytes())
    content[1000] ^= 1
    altered(federation.blob(), bytes(content))
    with pytest.raises(BackboneError, match=r"model\.safetensors: found 'content that does not"):
        federation.fetch()
    assert federation.nothing_is_used()
    assert not federation.store.partial(federation.sha256).exists()


def test_a_truncated_file_is_never_used(federation: Federation) -> None:
    altered(federation.blob(), federation.blob().read_bytes()[:-1])
    with pytest.raises(BackboneError, match=r"found '1586471 bytes'.*copy is too short"):
        federation.fetch()
    assert federation.nothing_is_used()


def test_a_file_that_is_too_long_is_never_used(federation: Federation) -> None:
    altered(federation.blob(), federation.blob().read_bytes() + b"x")
    with pytest.raises(BackboneError, match="found 'more than 1586472 bytes'"):
        federation.fetch()
    assert federation.nothing_is_used()


def test_a_manifest_of_somebody_else_is_refused(federation: Federation) -> None:
    other = Ed25519PrivateKey.generate().public_key()
    with pytest.raises(BackboneError, match="a signature that does not fit"):
        federation.fetch(operator_key=other)
    assert federation.nothing_is_used()


def test_a_manifest_for_another_backbone_is_refused(federation: Federation) -> None:
    manifests = federation.library.directory / "manifests"
    asked = "0" * 64
    shutil.copy(manifests / f"{federation.sha256}.json", manifests / f"{asked}.json")
    with pytest.raises(BackboneError, match=f"allowed: a backbone with model.safetensors {asked}"):
        federation.fetch(sha256=asked)
    with pytest.raises(BackboneError, match=r"found 'glyphs with .*allowed: other with"):
        federation.fetch(name="other")


def test_a_path_in_a_signed_manifest_is_refused(federation: Federation) -> None:
    path = federation.library.directory / "manifests" / f"{federation.sha256}.json"
    manifest = verify_manifest(path.read_bytes(), federation.key.public_key())
    bad = manifest.files[0].model_copy(update={"name": "../../evil.json"})
    hostile = manifest.model_copy(update={"files": (bad, *manifest.files[1:])})
    path.write_bytes(sign_manifest(hostile, federation.key))
    with pytest.raises(BackboneError, match=r"files\.0\.name: found '\.\./\.\./evil\.json'"):
        federation.fetch()
    assert not list(federation.root.rglob("evil.json"))


def test_a_full_disk_is_said_and_the_transfer_goes_on_later(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = PartialBlob._append

    def full(self: PartialBlob, piece: memoryview) -> int:
        if self.offset:
            raise OSError(28, "No space left on device")
        return append(self, piece)

    monkeypatch.setattr(PartialBlob, "_append", full)
    with pytest.raises(TransferError, match=r"No space left on device.*goes on where it stopped"):
        federation.fetch()
    assert federation.nothing_is_used()
    kept = federation.store.partial(federation.sha256).stat().st_size
    assert 0 < kept < 1_586_472
    monkeypatch.undo()
    federation.fetch()
    with pytest.raises(TransferError, match="found '3 bytes free on the disk'"):
        store = BlobStore(federation.root / "other-store", 2**30, free_bytes=lambda path: 3)
        federation.fetch(store=store)


def test_a_server_that_is_away_is_asked_a_few_times(federation: Federation) -> None:
    federation.stop()
    waits: list[float] = []
    patience = Patience(attempts=5, first=1, longest=3, sleep=waits.append, draw=lambda: 0.0)
    with pytest.raises(TransferError, match=r"UNAVAILABLE.*What has arrived is kept"):
        federation.fetch(patience=patience)
    assert waits == [1, 2, 3, 3]


def test_a_site_without_its_key_is_told(federation: Federation) -> None:
    missing = replace(federation.site, key=federation.root / "absent.key")
    with pytest.raises(BackboneError, match=r"absent\.key: found 'No such file"):
        federation.fetch(tls=missing)


def test_a_call_does_not_last_for_ever(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation.stop()
    federation.start(Limits(bytes_per_second=2_000_000))
    monkeypatch.setattr(backbone_fetch, "_BLOB_SECONDS", 0.4)
    federation.fetch()  # in several calls
