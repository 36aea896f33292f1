"""Malformed bytes at every door to the network: clean refusals only. Long because doors are many.

A target drives one reader with any bytes. It returns, or raises an error of ours; another exception
(which could travel to a peer as a traceback), a hang or a memory blow-up is a finding.

Fast: hypothesis damages good examples. Slow (`--slow`): atheris, guided by the code's coverage,
loads this file in a process of its own, once for each target; without atheris, hypothesis again.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime as dt
import hashlib
import importlib.util
import json
import logging
import os
import re
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import httpx
import pytest
import torch
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict, UserConfig
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto, recorddict_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata as ProtoMetadata
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fedgraft_client import connection
from fedgraft_client.app import client_app
from fedgraft_client.connection import FleetConnection, Limits, RunOver
from fedgraft_client.identity import _joined, _request
from fedgraft_common.backbone_protocol import BlobRequest, ManifestRequest, read_request
from fedgraft_common.certificates import public_pem
from fedgraft_common.errors import FedgraftError, MessageError
from fedgraft_common.inflation import MessageLimits
from fedgraft_common.inline import announce, place_holder
from fedgraft_common.invite import Invite
from fedgraft_common.manifest import DistributionManifest, SignedManifest, sign
from fedgraft_common.messages import (
    Status,
    TensorSpec,
    from_record,
    read_counts,
    read_status,
    to_record,
    write_counts,
    write_reply,
)
from fedgraft_common.packing import PACKAGE, STYPE, pack, unpack
from fedgraft_common.parcel import wrap
from fedgraft_common.plan import Plan, parse_plan
from fedgraft_common.remembered import Remembered
from fedgraft_server.authority import create
from fedgraft_server.enrollment import Enrollment
from fedgraft_server.federation import usable_updates
from fedgraft_server.gateway import FLEET_PATHS, Gateway
from fedgraft_server.listener import PeerCertificateProtocol, listener
from fedgraft_server.registry import Registry, Site
from fedgraft_server.replies import Replies
from fedgraft_server.settings import FederationTable, ServerDirectory, Settings
from fedgraft_server.superlink_grid import _unpacked

RUNS: Final = 10_000  # of each target in the slow test; there are more than ten
EXAMPLES: Final = 150  # of each target in the fast one
SECONDS: Final = 25  # a case may take; a busy machine is slow
MEBIBYTES: Final = 4096  # the process may take; torch alone is one of them
GUIDED: Final = (  # atheris watches these
    "fedgraft_common",
    "fedgraft_client.connection",
    "fedgraft_client.identity",
    "fedgraft_server",
    "flwr.app.message",
    "flwr.supercore.inflatable",
)
BOOT: Final = """
import importlib.util, sys
import atheris
path, name, guided = sys.argv[1:4]
del sys.argv[1:4]
spec = importlib.util.spec_from_file_location("fuzzed", path)
module = sys.modules["fuzzed"] = importlib.util.module_from_spec(spec)
with atheris.instrument_imports(include=guided.split(",")):
    spec.loader.exec_module(module)
module.logging.disable(module.logging.CRITICAL)
atheris.Setup(sys.argv, lambda data: module.tried(module.TARGETS[name], data))
atheris.Fuzz()
"""
NODE: Final = 5
RUN: Final = 7
SCHEMA: Final = (TensorSpec("a", (3,)), TensorSpec("b", (2, 2)))
SMALL: Final = MessageLimits(bytes=1 << 20, objects=200, description=1 << 16)
NODE_KEY: Final = ec.generate_private_key(ec.SECP384R1())
OPERATOR: Final = Ed25519PrivateKey.generate()
TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # made once: it is slow to make


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        run: drives it; raises only `FedgraftError`, or nothing.
        examples: good input, to be damaged.
    """

    run: Callable[[bytes], None]
    examples: Callable[[], list[bytes]]


# --- what a site reads


def request_message() -> Message:
    """A round's request with a packed adapter, as a server sends it."""
    adapter = pack(to_record({"a": torch.zeros(3), "b": torch.ones(2, 2)}))
    plan = ConfigRecord({"plan": Plan().canonical, "round": 1, "signature": "00"})
    return _message(RecordDict({"adapter": adapter, "plan": plan}), 1, NODE, "")


def _message(content: RecordDict, source: int, target: int, reply_to: str) -> Message:
    metadata = Metadata(
        run_id=RUN, message_id="", src_node_id=source, dst_node_id=target, group_id="",
        reply_to_message_id=reply_to, created_at=1e9, ttl=1e9, message_type="train",
    )  # fmt: skip
    return make_message(metadata=metadata, content=content)


class Wire(httpx.BaseTransport):
    """A server that a hostile or broken one could be: answers by the last part of the path."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.objects: dict[str, bytes] = {}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        call = request.url.path.rpartition("/")[2]
        status, content = self.answers.get(call, (200, b""))
        if call == "pull-object" and call not in self.answers:
            name = PullObjectRequest.FromString(request.content).object_id
            found = name in self.objects
            content = PullObjectResponse(
                object_found=found,
                object_available=found,
                object_content=self.objects.get(name, b""),
            ).SerializeToString()
        return httpx.Response(status, stream=httpx.ByteStream(content))


@cache
def _line() -> FleetConnection:
    """A site's connection; no heartbeat, because that runs in a thread."""
    made = FleetConnection.__new__(FleetConnection)
    made.address, made.limits = "127.0.0.1:1", Limits(response=1 << 20, message=SMALL)
    made._client = connection._Client("http://127.0.0.1:1", NODE_KEY, None, made.limits)
    made._node, made._heart = Node(node_id=NODE), None
    return made


def line(wire: Wire) -> FleetConnection:
    """The connection over that wire."""
    made = _line()
    made._remembered, made._received, made._ours = Remembered(), None, ""
    made._client._client = httpx.Client(transport=wire, timeout=5, verify=TLS)
    return made


@cache
def site() -> Any:
    """A site's ClientApp; every plan that arrives here has a wrong signature."""
    from fedgraft_client.site import Site as RealSite

    class Refusing:
        operator_key = OPERATOR.public_key()
        config = SimpleNamespace(name="fuzzed", simulated=False)
        last_error: Exception | None = None
        answer, _contain, _accept = RealSite.answer, RealSite._contain, RealSite._accept
        evaluate, keep_final = RealSite.evaluate, RealSite.keep_final

    return client_app(lambda _: Refusing())  # type: ignore[arg-type,return-value]


_replied: list[Message] = []  # to the last case


def receive(wire: Wire) -> None:
    """What a daemon does with whatever comes: read, answer, prepare the reply."""
    _replied.clear()
    here = line(wire)
    try:
        message = here.receive()
    except RunOver:
        return
    if message is None:
        return
    context = Context(message.metadata.run_id, NODE, UserConfig(), RecordDict(), UserConfig())
    try:
        reply = site()(message, context)
    except Exception as error:  # the daemon keeps it at home and says `failed`
        assert not isinstance(error, RecursionError | MemoryError)
        reply = write_reply(message, 0, Status.FAILED)
    assert read_status(reply) in Status
    assert not reply.has_error()
    _replied.append(reply)
    here.send(here.prepare(reply))


def pulled(data: bytes) -> None:
    """The answer to PullMessages is anything; the objects are those of a good message."""
    wire = Wire()
    wire.answers["pull-messages"] = 200, data
    wire.objects = {n: o.deflate() for n, o in get_all_nested_objects(request_message()).items()}
    receive(wire)


def pulled_examples() -> list[bytes]:
    made = request_message()
    made.metadata.__dict__["_message_id"] = made.object_id
    bare = make_message(metadata=made.metadata, content=RecordDict())
    response = PullMessagesResponse(
        messages_list=[message_to_proto(bare)], message_object_trees=[get_object_tree(made)]
    )
    name, _ = place_holder("a")
    inline = PullMessagesResponse(
        messages_list=[cast(ProtoMessage, announce(request_message(), name))],
        message_object_trees=[ObjectTree(object_id=name)],
    )
    return [found.SerializeToString() for found in (response, inline, PullMessagesResponse())]


def crafted(data: bytes) -> tuple[str, dict[str, bytes], ObjectTree] | None:
    """Objects with right names and any content: `#0` to `#9` stand for those that came before."""
    contents: dict[str, bytes] = {}
    trees: list[ObjectTree] = []
    for piece in data.split(b"\xff--\xff")[:10]:
        children = []
        for number, tree in enumerate(trees):
            mark = b"#%d" % number
            if mark in piece:
                piece = piece.replace(mark, tree.object_id.encode())
                children.append(tree)
        name = hashlib.sha256(piece).hexdigest()
        contents[name] = piece
        trees.append(ObjectTree(object_id=name, children=children))
    if trees[-1].ByteSize() > 1 << 20:
        return None
    return trees[-1].object_id, contents, trees[-1]


def crafted_example(made: Message) -> bytes:
    """The objects of a good message, in the form that `crafted` reads."""
    objects = {name: thing.deflate() for name, thing in get_all_nested_objects(made).items()}
    order = sorted(objects, key=lambda n: sum(m.encode() in objects[n] for m in objects))
    done: list[str] = []
    while len(done) < len(objects):
        for name in order:
            inner = [m for m in objects if m.encode() in objects[name]]
            if name not in done and set(inner) <= set(done):
                done.append(name)
    pieces = []
    for name in done:
        piece = objects[name]
        for number, inner_name in enumerate(done):
            piece = piece.replace(inner_name.encode(), b"#%d" % number)
        pieces.append(piece)
    return b"\xff--\xff".join(pieces)


def crafted_request(data: bytes) -> None:
    """A server that builds messages by hand."""
    made = crafted(data)
    if made is None:
        return
    _, objects, tree = made
    wire = Wire()
    wire.objects = objects
    announced = ProtoMessage(metadata=ProtoMetadata(run_id=RUN, message_type="train"))
    response = PullMessagesResponse(messages_list=[announced], message_object_trees=[tree])
    wire.answers["pull-messages"] = 200, response.SerializeToString()
    receive(wire)


def crafted_requests() -> list[bytes]:
    return [crafted_example(request_message())]


def refused(data: bytes) -> None:
    """A refusal, or any other answer, to everything."""
    wire = Wire()
    status = 200 + data[0] * 2 if data else 200
    for call in ("pull-messages", "push-messages", "push-object", "deactivate-node"):
        wire.answers[call] = status, data[1:]
    here = line(wire)
    with contextlib.suppress(RunOver, FedgraftError):
        here.receive()
    with contextlib.suppress(RunOver):
        here.send(here.prepare(write_reply(request_message(), 1, Status.OK)))


def refused_examples() -> list[bytes]:
    texts = (
        b'{"code": 3003, "detail": "no"}', b'{"error": "no"}', b"[" * 3000,
        PushMessagesResponse(objects_to_push=["a"], session_id="s").SerializeToString(),
        ActivateNodeResponse(node_id=3).SerializeToString(),
    )  # fmt: skip
    return [bytes([status]) + text for text in texts for status in (0, 100, 101, 150)]


def package(data: bytes) -> None:
    """A packed adapter."""
    record = ArrayRecord()
    record[PACKAGE] = Array("uint8", (len(data),), STYPE, data)
    plain = unpack(record)
    from_record(plain, SCHEMA)


def package_examples() -> list[bytes]:
    made = pack(to_record({"a": torch.zeros(3), "b": torch.ones(2, 2)}))
    return [made[PACKAGE].data]


def invite(data: bytes) -> None:
    """What an operator pastes."""
    text = data.decode("utf-8", "replace")
    Invite.decode(text)
    Invite.decode("fedgraft-invite-1." + base64.urlsafe_b64encode(data).decode())


def invite_examples() -> list[bytes]:
    made = Invite(
        name="north", host="h", port=1, ca_sha256="0" * 64, secret="0" * 43,
        expires=dt.datetime(2030, 1, 1, tzinfo=dt.UTC),
    )  # fmt: skip
    return [made.encode().encode(), made.model_dump_json().encode()]


def manifest(data: bytes) -> None:
    """A signed manifest from the wire, and one that the operator's key signed whatever it says."""
    with contextlib.suppress(FedgraftError):
        SignedManifest.from_bytes(data).verify(OPERATOR.public_key())
    signature = OPERATOR.sign(b"fedgraft backbone manifest 1\n" + data)
    SignedManifest(data, signature).verify(OPERATOR.public_key())


def manifest_examples() -> list[bytes]:
    made = DistributionManifest.model_validate(
        {
            "name": "b",
            "files": [
                {"name": name, "size": 1, "sha256": "0" * 64}
                for name in ("config.json", "model.safetensors")
            ],
        }
    )
    return [made.canonical, sign(made, OPERATOR).to_bytes()]


def plan(data: bytes) -> None:
    """A plan in JSON."""
    try:
        document = json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return
    _ = parse_plan(document, origin="fuzz").hash


def plan_examples() -> list[bytes]:
    return [Plan().canonical.encode(), b'{"privacy": {"epsilon": 1e999}}']


def joined(data: bytes) -> None:
    """A server's answer to a site that joins."""
    key, authority = _identity()
    try:
        content = json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return
    if isinstance(content, dict):
        _joined(content, key, authority.certificate)


@cache
def _identity() -> tuple[ec.EllipticCurvePrivateKey, Any]:
    _, _, authority = _server()
    return ec.generate_private_key(ec.SECP256R1()), authority


def joined_examples() -> list[bytes]:
    from fedgraft_common.certificates import certificate_pem

    key, authority = _identity()
    issued = authority.issue_site(
        "north", key.public_key(), dt.timedelta(days=1), dt.datetime.now(dt.UTC)
    )
    answer = {
        "certificate": certificate_pem(issued).decode(),
        "operator_key": public_pem(OPERATOR.public_key()),
        "federation": "f", "name": "north", "groups": [], "gateway": "h:1", "backbone": "h:2",
    }  # fmt: skip
    return [json.dumps(answer).encode()]


# --- what the server reads


def crafted_reply(data: bytes) -> None:
    """A site that builds replies by hand, read by the server's loop."""
    made = crafted(data)
    if made is None:
        return
    name, objects, tree = made
    bare = _message(RecordDict(), NODE, 1, "r1")
    bare.metadata.__dict__["_message_id"] = name
    announced = PullAppMessagesResponse(
        messages_list=[message_to_proto(bare)], message_object_trees=[tree]
    )

    def pull(request: Any) -> PullObjectResponse:
        content = objects[request.object_id]
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    grid = HttpGrid(token="t")  # noqa: S106
    grid.set_run(Run.create_empty(RUN))
    grid._client = SimpleNamespace(  # type: ignore[assignment]
        PullMessages=lambda _: announced, PullObject=pull, ConfirmMessageReceived=lambda _: None
    )
    [reply] = Replies(grid, SMALL).collect(["r1"])
    _used(reply)


def announced_reply(data: bytes) -> None:
    """The same in an announcement, of which the SuperLink has read the content already."""
    bare = _message(RecordDict(), NODE, 1, "r1")
    bare.metadata.__dict__["_message_id"] = name = place_holder("r1")[0]
    announced = message_to_proto(bare)
    try:
        announced.content.MergeFromString(data)
        recorddict_from_proto(announced.content)
    except Exception:
        return
    response = PullAppMessagesResponse(
        messages_list=[announced], message_object_trees=[ObjectTree(object_id=name)]
    )
    grid = HttpGrid(token="t")  # noqa: S106
    grid.set_run(Run.create_empty(RUN))
    missing = PullObjectResponse(object_found=True, object_available=False)
    grid._client = SimpleNamespace(  # type: ignore[assignment]
        PullMessages=lambda _: response, PullObject=lambda _: missing
    )
    for reply in Replies(grid, SMALL).collect(["r1"]):
        _used(reply)


def announced_replies() -> list[bytes]:
    return [
        cast(ProtoMessage, announce(message, "r")).content.SerializeToString()
        for message in reply_messages()
    ]


def _used(reply: Message) -> None:
    assert reply.metadata.src_node_id == NODE
    if reply.has_error():
        return
    _unpacked(reply)
    with contextlib.suppress(MessageError):
        read_counts(reply.content.metric_records.get("counts"))
    usable_updates(_one_site(), SCHEMA, 1, [reply])


@cache
def _one_site() -> Plan:
    return Plan().replace({"aggregation.sites": 1, "aggregation.minimum_sites": 1})


def crafted_replies() -> list[bytes]:
    made = reply_messages()
    return [crafted_example(message) for message in made] + [wrap(made[1]) or b""]


def reply_messages() -> list[Message]:
    asked = _message(RecordDict(), 1, NODE, "")
    asked.metadata.__dict__["_message_id"] = "r1"
    adapter = to_record({"a": torch.zeros(3), "b": torch.ones(2, 2)})
    contents = [
        write_reply(asked, 1, Status.OK, record).content for record in (adapter, pack(adapter))
    ]
    contents.append(write_counts(asked, 1, Status.BUDGET).content)
    return [_message(content, NODE, 1, "r1") for content in contents]


@cache
def _server() -> tuple[ServerDirectory, Settings, Any]:
    keep = tempfile.TemporaryDirectory(prefix="fedgraft-fuzz-")
    _kept.append(keep)
    chosen = Settings(federation=FederationTable(name="fuzz", host="localhost"))
    directory = ServerDirectory(Path(keep.name) / "server")
    return directory, chosen, create(directory, chosen, dt.datetime.now(dt.UTC))


_kept: list[Any] = []


class KnownSite:
    """A registry in which every certificate is one site's."""

    def site_of(self, _: str) -> Site:
        now = dt.datetime.now(dt.UTC)
        key = public_pem(NODE_KEY.public_key())
        return Site("north", (), key, NODE, now, None, now + dt.timedelta(days=9), "", "")

    def add_certificate(self, *_: object) -> None: ...


class Upstream:
    """Stands in for the HTTP client of the SuperLink."""

    def __init__(self) -> None:
        self.passed: list[tuple[str, bytes]] = []

    @contextlib.asynccontextmanager
    async def post(self, url: Any, data: Any, **_: object) -> AsyncIterator[Any]:
        body = data if isinstance(data, bytes) else b"".join([chunk async for chunk in data])
        self.passed.append((url.path, body))

        async def chunks() -> AsyncIterator[bytes]:
            yield b"ok"

        content = SimpleNamespace(iter_any=chunks)
        yield SimpleNamespace(
            raw_headers=[(b"content-length", b"2")], status=200, content=content, content_length=2
        )


@cache
def _gateway() -> tuple[Gateway, Upstream]:
    _, chosen, authority = _server()
    enrollment = Enrollment(KnownSite(), chosen, authority, "")  # type: ignore[arg-type]
    upstream = Upstream()
    gateway = Gateway(
        KnownSite(), chosen, upstream, "https://127.0.0.1:1", enrollment.renew,  # type: ignore[arg-type]
        clock=lambda: float(next(_ticks)),
    )  # fmt: skip
    return gateway, upstream


_ticks = iter(range(1 << 60))


@cache
def _certificate() -> str:
    from fedgraft_common.certificates import certificate_pem

    key, authority = _identity()
    made = authority.issue_site(
        "north", key.public_key(), dt.timedelta(days=1), dt.datetime.now(dt.UTC)
    )
    return certificate_pem(made).decode()


class Transport(asyncio.Transport):
    """What a listener writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closed = False
        connection = SimpleNamespace(
            getpeercert=lambda binary_form: ssl.PEM_cert_to_DER_cert(_certificate())
        )
        self._facts = {"ssl_object": connection, "peername": ("127.0.0.1", 2)}

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._facts.get(name, default)

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def set_protocol(self, protocol: Any) -> None: ...


def over_http(app: Any, data: bytes) -> bytes:
    """Feeds a listener with bytes, in two halves, and returns what it wrote."""

    async def feed() -> bytes:
        protocol = PeerCertificateProtocol(_listening(app), uvicorn.server.ServerState(), {})
        transport = Transport()
        protocol.connection_made(transport)
        for half in (data[: len(data) // 2], data[len(data) // 2 :]):
            if not transport.closed:
                protocol.data_received(half)
            await _settled()
        protocol.connection_lost(None)
        await _settled()
        return bytes(transport.written)

    return asyncio.run(feed())


async def _settled() -> None:
    """Lets the application's tasks run until they wait for more bytes."""
    for _ in range(12):
        await asyncio.sleep(0)


@cache
def _listening(app: Any) -> uvicorn.Config:
    directory = _server()[0]
    return listener(app, directory.server, directory.ca[0], 100).config


ALLOWED: Final = frozenset({200, 400, 403, 404, 413, 429})


def answered(written: bytes) -> None:
    """Every status that was written is one of a refusal, or of a call that passed."""
    rest = written
    while rest:
        head, found, rest = rest.partition(b"\r\n\r\n")
        assert found, written
        first = head.split(b"\r\n")[0].split(b" ")
        assert first[0] == b"HTTP/1.1", written
        status = int(first[1])
        assert status in ALLOWED, written
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        length = int(fields.get(b"content-length", b"0"))
        if b"transfer-encoding" in fields or length > len(rest):
            break
        body, rest = rest[:length], rest[length:]
        assert b"Traceback" not in body
        if status != 200 and body.startswith(b"{"):
            assert set(json.loads(body)) == {"error"}


def gateway_http(data: bytes) -> None:
    """A site's connection to the gateway, from the first byte after TLS."""
    gateway, upstream = _gateway()
    upstream.passed.clear()
    answered(over_http(gateway, data))
    for path, body in upstream.passed:
        assert path in FLEET_PATHS.values()
        if path.endswith("push-messages"):
            request = PushMessagesRequest.FromString(body)
            sources = {m.metadata.src_node_id for m in request.messages_list}
            assert sources <= {request.node.node_id}


def gateway_examples() -> list[bytes]:
    key = base64.b64encode(public_pem(NODE_KEY.public_key()).encode())
    made = message_to_proto(_message(RecordDict(), NODE, 1, "r1"))
    made.metadata.message_id = "m"
    push = PushMessagesRequest(
        node=Node(node_id=NODE), messages_list=[made],
        message_object_trees=[ObjectTree(object_id="m")],
    ).SerializeToString()  # fmt: skip
    signing = _request("north", _identity()[0]).encode()

    def call(path: bytes, body: bytes, method: bytes = b"POST") -> bytes:
        length = b"content-length: %d" % len(body)
        fields = b"\r\n".join([b"host: x", b"flwr-public-key: " + key, length])
        return method + b" " + path + b" HTTP/1.1\r\n" + fields + b"\r\n\r\n" + body

    chunked = call(b"/v1/fleet/push-object", b"").replace(
        b"content-length: 0", b"transfer-encoding: chunked"
    )
    return [
        call(b"/v1/fleet/push-messages", push),
        call(b"/v1/fleet/pull-messages", b"") * 2,
        call(b"/renew", signing),
        call(b"/whoami", b"", b"GET"),
        chunked + b"5\r\nhello\r\n0\r\n\r\n",
    ]


def joining(data: bytes) -> None:
    """A stranger at the joining port, from the first byte after TLS."""
    answered(over_http(_enrollment(), data))
    with contextlib.suppress(FedgraftError):
        _enrollment().join(data)


@cache
def _enrollment() -> Enrollment:
    directory, chosen, authority = _server()
    registry = Registry(directory.registry)
    _kept.append(contextlib.closing(registry))
    return Enrollment(registry, chosen, authority, "")


def joining_examples() -> list[bytes]:
    body = json.dumps(
        {
            "secret": "0" * 43,
            "request": _request("north", _identity()[0]),
            "node_key": public_pem(NODE_KEY.public_key()),
        }
    ).encode()
    head = b"POST /join HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    return [head + body, b"GET /ca HTTP/1.1\r\nhost: x\r\n\r\n", body]


def backbone_request(data: bytes) -> None:
    """The two requests of the backbone service."""
    with contextlib.suppress(FedgraftError):
        read_request(ManifestRequest, data)
    read_request(BlobRequest, data)


def backbone_examples() -> list[bytes]:
    return [
        ManifestRequest(name="b", sha256="0" * 64).to_bytes(),
        BlobRequest(sha256="0" * 64, offset=3).to_bytes(),
    ]


TARGETS: Final = {
    "pulled": Target(pulled, pulled_examples),
    "crafted_request": Target(crafted_request, crafted_requests),
    "refused": Target(refused, refused_examples),
    "package": Target(package, package_examples),
    "invite": Target(invite, invite_examples),
    "manifest": Target(manifest, manifest_examples),
    "plan": Target(plan, plan_examples),
    "joined": Target(joined, joined_examples),
    "crafted_reply": Target(crafted_reply, crafted_replies),
    "announced_reply": Target(announced_reply, announced_replies),
    "gateway_http": Target(gateway_http, gateway_examples),
    "joining": Target(joining, joining_examples),
    "backbone_request": Target(backbone_request, backbone_examples),
}


def tried(target: Target, data: bytes) -> None:
    """One case; an error of ours is a refusal."""
    with contextlib.suppress(FedgraftError):
        target.run(data)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals are logged, once a case; that an unexpected error was logged is a failure."""
    monkeypatch.setattr(logging.getLogger("fedgraft_server"), "disabled", True)


# --- fast

QUICK: Final = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, examples: list[bytes]) -> bytes:
    """A good example with some of its bytes replaced, removed or doubled."""
    data = draw(st.sampled_from(examples))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        gone = draw(st.integers(0, 8))
        data = data[:at] + draw(st.binary(max_size=8)) + data[at + gone :]
    return data


@pytest.mark.parametrize("name", TARGETS)
def test_good_examples_are_good(name: str) -> None:
    """So that the damage begins beyond the first check."""
    first = TARGETS[name].examples()[0]
    if name in ("manifest", "plan", "package", "joined", "crafted_reply"):
        TARGETS[name].run(first)
    elif name == "gateway_http":
        gateway_http(first)
        assert _gateway()[1].passed
    elif name in ("pulled", "crafted_request"):
        tried(TARGETS[name], first)
        assert [read_status(reply) for reply in _replied] == [Status.PLAN]  # not signed


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_bytes_are_refused(name: str) -> None:
    target = TARGETS[name]

    @QUICK
    @given(damaged(target.examples()) | st.binary(max_size=300))
    def case(data: bytes) -> None:
        tried(target, data)

    case()


# --- slow


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TARGETS)
def test_ten_thousand_cases(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    if importlib.util.find_spec("atheris") is None:
        settings(QUICK, max_examples=RUNS)(
            given(damaged(target.examples()))(lambda data: tried(target, data))
        )()
        return
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, example in enumerate(target.examples()):
        (corpus / f"example-{number}").write_bytes(example)
    command = [
        sys.executable, "-c", BOOT, __file__, name, ",".join(GUIDED), f"-runs={RUNS}",
        "-max_len=8192", f"-timeout={SECONDS}", f"-rss_limit_mb={MEBIBYTES}", "-seed=1",
        f"-artifact_prefix={tmp_path}/", str(corpus),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs is not None and int(runs[1]) >= RUNS, done.stderr[-2000:]
