"""What fetching a backbone costs: against a plain file copy over a TLS socket, in the same run.

Both ways use mutual TLS on loopback, each server is a process of its own, and the receiving side
writes a file. The backbone service also hashes every byte before the file is used. Then the
server's resident memory with one site and with eight at once, one of which reads nothing; and a
client that is killed in the middle, whose successor goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Final

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedgraft_client.backbone_fetch import fetch_backbone
from fedgraft_client.backbone_store import BlobStore
from fedgraft_common.backbone_protocol import BLOB, CHUNK, SERVICE, BlobRequest, TlsFiles
from fedgraft_common.manifest import CONFIG, WEIGHTS
from fedgraft_server.backbone_library import BackboneLibrary
from fedgraft_server.backbone_service import Limits, serve
from fedgraft_simulations.benchmarks.certificates import LoopbackAuthority
from fedgraft_simulations.benchmarks.measure import Ratio, Report, Way, alternate, timed

TARGET: Final = 0.5
SITES: Final = 8
_PER_SITE: Final = 256 * CHUNK  # bytes that each of the eight reads
_CODE: Final = (
    "import sys; from fedgraft_simulations.benchmarks import backbone_transfer as b; "
    "getattr(b, sys.argv[1])(*sys.argv[2:])"
)


def measure(repetitions: int = 5, megabytes: int = 1000) -> Report:
    """Copies a file of that size in both ways, then looks at memory and resuming.

    Args:
        repetitions: pairs.
        megabytes: of weights, 10^6 bytes each.
    """
    with tempfile.TemporaryDirectory() as name:
        bench = _Bench(Path(name), megabytes * 10**6)
        with _server("serve_plain", bench.root, "0") as plain, _server(
            "serve_backbones", bench.root, "0"
        ) as service:  # fmt: skip
            idle = _resident(service.pid)
            plain_cpu, service_cpu = _Processor(plain.pid), _Processor(service.pid)
            copied, fetched = alternate(
                [
                    lambda: plain_cpu.during(lambda: bench.plain(plain.port)),
                    lambda: service_cpu.during(lambda: bench.fetch(service.port)),
                ],
                repetitions,
            )
            one = _resident(service.pid)
            eight = bench.many(service)
        kept = bench.resume_after_kill()
    size = megabytes / 1000
    plain_way, fetch_way = Way("TLS socket", copied), Way("backbone service", fetched)
    return Report(
        "backbone_transfer",
        f"{size:g} GB on loopback, mutual TLS, {repetitions} pairs",
        ratios=(Ratio("speed: service / plain copy", plain_way, fetch_way, TARGET),),
        figures={
            "plain copy over TLS, GB/s": size / plain_way.median,
            "backbone service, GB/s": size / fetch_way.median,
            "plain copy, processor seconds of both sides per GB": plain_cpu.median / size,
            "backbone service, processor seconds of both sides per GB": service_cpu.median / size,
            "server's memory before any transfer, MB": idle / 1e6,
            "server's memory after one site at a time, MB": one / 1e6,
            f"server's largest memory with {SITES} sites at once, MB": eight / 1e6,
            "share that a killed client need not fetch again": kept,
        },
        notes=(
            "The service's time includes the SHA-256 of every byte; the plain copy has none.",
            "The service uses more threads, so a busy machine flatters its speed, not its "
            "processor seconds.",
        ),
    )


class _Bench:
    """Files for one run: a backbone of random bytes, certificates, the operator's key."""

    def __init__(self, root: Path, size: int) -> None:
        self.root = root
        self.size = size
        authority = LoopbackAuthority.create(root / "tls")
        authority.server()
        self.sites = [authority.site(f"site-{number}") for number in range(SITES)]
        source = root / "random"
        source.mkdir()
        (source / CONFIG).write_bytes(b"{}")
        with (source / WEIGHTS).open("wb") as file:
            for offset in range(0, size, CHUNK):
                file.write(os.urandom(min(CHUNK, size - offset)))
        self.key = Ed25519PrivateKey.generate()
        self.sha256 = BackboneLibrary(root / "library").add(source, self.key).sha256
        shutil.rmtree(source)

    def plain(self, port: int) -> float:
        """Seconds of a copy over a TLS socket."""
        target = self.root / "copy"
        seconds = timed(lambda: _receive(port, self.sites[0], target))
        if target.stat().st_size != self.size:
            raise RuntimeError("the plain copy is not whole")
        target.unlink()
        return seconds

    def fetch(self, port: int) -> float:
        """Seconds from an empty store to a verified directory."""
        store = BlobStore(self.root / "store", 4 * self.size + CHUNK)
        seconds = timed(lambda: self._fetch(port, store))
        shutil.rmtree(store.directory)
        return seconds

    def _fetch(self, port: int, store: BlobStore) -> Path:
        key = self.key.public_key()
        return fetch_backbone(f"127.0.0.1:{port}", self.sites[0], self.sha256, key, store)

    def many(self, service: _Process) -> int:
        """The server's largest resident size in bytes while eight sites fetch, one of them idle."""
        with ThreadPoolExecutor(SITES) as pool:
            reading = [
                pool.submit(_drain, service.port, site, self.sha256, 0 if n == 0 else _PER_SITE)
                for n, site in enumerate(self.sites)
            ]
            largest = 0
            while not all(future.done() for future in reading):
                largest = max(largest, _resident(service.pid))
                time.sleep(0.05)
            for future in reading:
                future.result()
        return largest

    def resume_after_kill(self) -> float:
        """The share of the file that was there when a killed client's successor began."""
        store = BlobStore(self.root / "store", 4 * self.size + CHUNK)
        partial = store.partial(self.sha256)
        with _server("serve_backbones", self.root, str(self.size // 2)) as service:
            killed = subprocess.Popen(
                [sys.executable, "-c", _CODE, "fetch_once", str(self.root), str(service.port),
                 self.sha256, self.key.public_key().public_bytes_raw().hex()]
            )  # fmt: skip
            deadline = time.monotonic() + 60
            while not (partial.exists() and partial.stat().st_size > self.size / 3):
                if killed.poll() is not None or time.monotonic() > deadline:
                    killed.kill()
                    killed.wait()
                    raise RuntimeError("the client was not caught in the middle")
                time.sleep(0.02)
            killed.send_signal(signal.SIGKILL)
            killed.wait()
            kept = partial.stat().st_size
            first: list[int] = []
            address, key = f"127.0.0.1:{service.port}", self.key.public_key()
            fetch_backbone(
                address, self.sites[0], self.sha256, key, store,
                lambda here, total: first.append(here) if not first else None,
            )  # fmt: skip
        if first[0] < kept:
            raise RuntimeError(f"began at {first[0]} although {kept} bytes were there")
        shutil.rmtree(store.directory)
        return kept / self.size


def _drain(port: int, tls: TlsFiles, sha256: str, size: int) -> None:
    """Reads the beginning of a file and forgets it; size 0 opens the stream and reads nothing."""
    credentials = grpc.ssl_channel_credentials(
        tls.ca.read_bytes(), tls.key.read_bytes(), tls.certificate.read_bytes()
    )
    options = [("grpc.max_receive_message_length", 2 * CHUNK)]
    request = BlobRequest(sha256=sha256).model_dump_json().encode()
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        call = channel.unary_stream(f"/{SERVICE}/{BLOB}")(request)
        if not size:
            time.sleep(1)
            call.cancel()
            return
        for piece in call:
            size -= len(piece)
            if size <= 0:
                call.cancel()
                return


# --- the processes of their own


class _Process:
    """A server in a process of its own, and its port."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.pid = process.pid
        if process.stdout is None:
            raise RuntimeError("no pipe")
        self.port = int(process.stdout.readline())


@contextlib.contextmanager
def _server(function: str, root: Path, rate: str) -> Iterator[_Process]:
    """Runs one of the functions below until its standard input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", _CODE, function, str(root), rate],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield _Process(process)
        finally:
            if process.stdin is not None:
                process.stdin.close()
            process.wait(timeout=20)


def serve_backbones(root: str, rate: str) -> None:
    """The backbone service; rate in bytes a second, 0 for no limit."""
    limits = Limits(bytes_per_second=float(rate) or None)
    library = BackboneLibrary(Path(root) / "library")
    service = serve(library, "127.0.0.1:0", _tls(root, "server"), lambda pem: True, limits)
    print(service.port, flush=True)
    sys.stdin.read()
    service.stop()


def serve_plain(root: str, rate: str) -> None:
    """Sends the weights to whoever connects with a certificate, one after the other."""
    tls = _tls(root, "server")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tls.ca))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(tls.certificate, tls.key)
    blobs = (Path(root) / "library" / "blobs").iterdir()
    weights = max(blobs, key=lambda path: path.stat().st_size)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        listening.settimeout(0.1)
        while not _ended():
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            connection.settimeout(60)
            with context.wrap_socket(connection, server_side=True) as secure:
                with weights.open("rb", buffering=0) as file:
                    while piece := file.read(CHUNK):
                        secure.sendall(piece)
                with contextlib.suppress(OSError):
                    secure.unwrap().close()


def fetch_once(root: str, port: str, sha256: str, operator_key: str) -> None:
    """A client that is going to be killed; the operator's public key in hexadecimal."""
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(operator_key))
    store = BlobStore(Path(root) / "store", 2**50)
    fetch_backbone(f"127.0.0.1:{port}", _tls(root, "site-0"), sha256, key, store)


def _receive(port: int, tls: TlsFiles, target: Path) -> None:
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.load_cert_chain(tls.certificate, tls.key)
    buffer = memoryview(bytearray(CHUNK))
    with (
        socket.create_connection(("127.0.0.1", port), timeout=60) as connection,
        context.wrap_socket(connection, server_hostname="127.0.0.1") as secure,
        target.open("wb", buffering=0) as file,
    ):
        while count := secure.recv_into(buffer):
            file.write(buffer[:count])


def _tls(root: str, name: str) -> TlsFiles:
    directory = Path(root) / "tls"
    return TlsFiles(directory / "ca.pem", directory / f"{name}.pem", directory / f"{name}.key")


def _ended() -> bool:
    """Whether whoever started this process closed its standard input."""
    ready, _, _ = select.select([sys.stdin], [], [], 0)
    return bool(ready)


class _Processor:
    """Processor seconds of this process and of another one, while something runs."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seconds: list[float] = []

    @property
    def median(self) -> float:
        """Of all runs."""
        return median(self._seconds)

    def during(self, action: Callable[[], float]) -> float:
        """Runs it and passes its result on."""
        before = self._used()
        result = action()
        self._seconds.append(self._used() - before)
        return result

    def _used(self) -> float:
        stat = Path(f"/proc/{self._pid}/stat")
        if not stat.is_file():
            return time.process_time()
        fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])  # utime and stime, proc(5)
        return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _resident(pid: int) -> int:
    """Resident size of a process in bytes (VmRSS; Linux only, else 0)."""
    status = Path(f"/proc/{pid}/status")
    if not status.is_file():
        return 0
    lines = status.read_text(encoding="ascii").splitlines()
    kibibytes = next((line.split()[1] for line in lines if line.startswith("VmRSS:")), "0")
    return int(kibibytes) * 1024
