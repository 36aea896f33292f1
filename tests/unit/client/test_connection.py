"""The site's line: what it uses of Flower 1.41. Long, for bad servers are of many kinds."""

from __future__ import annotations

import inspect
import os
import signal
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path

import flwr
import httpx
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    DeactivateNodeResponse,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedgraft_client import connection as module
from fedgraft_client.connection import Dialler, FleetConnection, Limits, RunOver
from fedgraft_common.errors import LinkError, MessageError
from fedgraft_common.inflation import MessageLimits
from fedgraft_common.inline import announce, is_inline, opened, place_holder
from fedgraft_common.messages import Status, to_record, write_reply
from fedgraft_common.packing import pack
from fedgraft_common.parcel import LARGEST, unwrap

NODE = 2**63 + 5
KEY = ec.generate_private_key(ec.SECP384R1())
Answer = tuple[int, bytes] | Callable[[bytes], tuple[int, bytes]]


class Fake:
    """A server that says what a test wants: path's last part to status and body."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.answers: dict[str, Answer] = {
            "activate-node": (200, ActivateNodeResponse(node_id=NODE).SerializeToString()),
            "deactivate-node": (200, DeactivateNodeResponse().SerializeToString()),
            "send-node-heartbeat": (
                200, SendNodeHeartbeatResponse(success=True).SerializeToString(),
            ),
            "pull-messages": (200, PullMessagesResponse().SerializeToString()),
            "confirm-message-received": (
                200, ConfirmMessageReceivedResponse().SerializeToString(),
            ),
        }  # fmt: skip
        self.calls: list[str] = []
        self.bodies: dict[str, list[bytes]] = {}
        self.headers: dict[str, str] = {}
        self.extra: dict[str, str] = {}
        self.broken: dict[str, int] = {}  # calls whose answers are lost, and how many
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                call = self.path.rpartition("/")[2]
                fake.calls.append(call)
                fake.bodies.setdefault(call, []).append(body)
                if call != "send-node-heartbeat":  # sent by a thread, at any moment
                    fake.headers = {k.lower(): v for k, v in self.headers.items()}
                answer = fake.answers[call]
                if fake.broken.get(call, 0):
                    fake.broken[call] -= 1
                    self.close_connection = True
                    return
                status, content = answer(body) if callable(answer) else answer
                self.send_response(status)
                for name, value in fake.extra.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.address = f"127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def offer(self, message: Message) -> None:
        """Has this message waiting for the site."""
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = {n: o.deflate() for n, o in get_all_nested_objects(message).items()}
        bare = make_message(metadata=message.metadata, content=RecordDict())
        response = PullMessagesResponse(
            messages_list=[message_to_proto(bare)],
            message_object_trees=[get_object_tree(message)],
        )
        self.answers["pull-messages"] = (200, response.SerializeToString())

        def pull(body: bytes) -> tuple[int, bytes]:
            name = PullObjectRequest.FromString(body).object_id
            found = PullObjectResponse(
                object_found=name in objects, object_available=name in objects,
                object_content=objects.get(name, b""),
            )  # fmt: skip
            return 200, found.SerializeToString()

        self.answers["pull-object"] = pull

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def fake() -> Iterator[Fake]:
    made = Fake()
    yield made
    made.close()


def flower_error(code: int) -> bytes:
    return f'{{"code": {code}, "detail": "it said so"}}'.encode()


def message(node: int = NODE) -> Message:
    metadata = Metadata(
        run_id=7, message_id="", src_node_id=1, dst_node_id=node, reply_to_message_id="",
        group_id="", created_at=1e9, ttl=1e9, message_type="train",
    )  # fmt: skip
    plan = ConfigRecord({"plan": "{}", "round": 1})
    return make_message(
        metadata=metadata, content=RecordDict({"adapter": ArrayRecord(), "plan": plan})
    )


# --- what is used of Flower


def test_flower_has_what_is_used_here() -> None:
    assert flwr.__version__.startswith("1.41.")
    parameters = inspect.signature(ProtobufClient.__init__).parameters
    assert list(parameters)[:2] == ["self", "base_url"]
    assert {"interceptors", "verify", "timeout", "retry_invoker"} <= set(parameters)
    assert parameters["retry_invoker"].default is None  # Flower's own would interrupt the process
    assert list(inspect.signature(ProtobufClient._send).parameters) == ["self", "context", "stream"]
    assert "rpc_method" in inspect.signature(ProtobufClient._unary_unary).parameters
    assert module._ONCE in inspect.getsource(FleetHttpClient.PullMessages)
    for call in (
        "ActivateNode", "DeactivateNode", "SendNodeHeartbeat", "PullMessages", "PushMessages",
        "PullObject", "PushObject", "ConfirmMessageReceived",
    ):  # fmt: skip
        assert list(inspect.signature(getattr(FleetHttpClient, call)).parameters) == [
            "self", "request"
        ]  # fmt: skip
    interceptor = inspect.signature(NodeAuthHttpInterceptor).parameters
    assert list(interceptor) == ["private_key", "public_key"]
    assert list(inspect.signature(HeartbeatSender).parameters) == ["heartbeat_fn"]
    assert {"max_time", "initial_backoff", "backoff_cap"} <= set(
        inspect.signature(pull_objects).parameters
    )
    assert ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED
    assert int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED) == 2004
    client = FleetHttpClient("http://127.0.0.1:1")
    assert isinstance(client._client, httpx.Client)
    client.close()


def test_nothing_that_fetches_or_ends_is_used() -> None:
    source = inspect.getsource(module)
    code = source.partition('"""\n\nfrom __future__')[2]
    for name in ("GetFab", "GetRun", "RegisterNode(", "flwr_exit", "retry_invoker", "os.kill"):
        assert name not in code


# --- one message there and back


def test_a_message_is_fetched_confirmed_and_answered(fake: Fake) -> None:
    fake.offer(message())
    announced: list[ProtoMessage] = []
    pushed: list[PushObjectRequest] = []

    def push_message(body: bytes) -> tuple[int, bytes]:
        request = PushMessagesRequest.FromString(body)
        announced.extend(request.messages_list)
        assert list(request.clientapp_runtime_list) == []  # how long it took stays at the site
        wanted: list[str] = []

        def walk(tree: ObjectTree) -> None:
            for child in tree.children:
                walk(child)
            wanted.append(tree.object_id)

        walk(request.message_object_trees[0])
        response = PushMessagesResponse(objects_to_push=wanted, session_id="s")
        return 200, response.SerializeToString()

    def push_object(body: bytes) -> tuple[int, bytes]:
        request = PushObjectRequest.FromString(body)
        assert (request.session_id, request.run_id, request.node.node_id) == ("s", 7, NODE)
        pushed.append(request)
        return 200, PushObjectResponse(stored=True).SerializeToString()

    fake.answers |= {"push-messages": push_message, "push-object": push_object}
    with FleetConnection(fake.address, KEY, tls=None) as line:
        assert line.node_id == NODE
        received = line.receive()
        assert received is not None
        assert received.content == message().content
        assert received.metadata.message_id == received.object_id
        reply = write_reply(received, 1, Status.OK)
        line.send(line.prepare(reply))
    [place_holder] = pushed
    assert len(place_holder.object_content) < 200  # the reply is in its announcement
    found = opened(announced[0], MessageLimits())
    assert found.content == reply.content
    assert found.metadata.message_id == place_holder.object_id
    assert found.metadata.reply_to_message_id == received.metadata.message_id
    assert fake.calls.count("pull-object") == 3  # the ends of four objects
    calls = [call for call in fake.calls if call != "send-node-heartbeat"]
    assert calls[:2] == ["activate-node", "pull-messages"]
    assert calls.index("confirm-message-received") > calls.index("pull-object")
    assert calls[-1] == "deactivate-node"
    assert fake.headers["accept-encoding"] == "identity"
    assert {"flwr-package-version", "flwr-component-name"} <= set(fake.headers)


def test_no_message_is_none(fake: Fake) -> None:
    with FleetConnection(fake.address, KEY, tls=None) as line:
        assert line.receive() is None


# --- a server that is broken, or not honest


def test_a_server_that_does_not_know_us_any_more_cannot_end_the_process(fake: Fake) -> None:
    """Flower's own connection sends SIGINT on a 401, and ends the process at the start."""
    interrupted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    try:
        with FleetConnection(fake.address, KEY, tls=None) as line:
            fake.answers = dict.fromkeys(fake.answers, (401, b"{}"))
            assert line._heartbeat() is False
            with pytest.raises(LinkError, match="HTTP 401'; allowed: a server that lets"):
                line.receive()
            assert line._heart is not None
            assert line._heart.is_running
        with pytest.raises(LinkError, match="HTTP 401"):
            FleetConnection(fake.address, KEY, tls=None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not interrupted
    assert os.getpid()


@pytest.mark.parametrize("code", [400, 403, 404, 412, 426, 429, 500, 502])
def test_every_refusal_is_one_error(fake: Fake, code: int) -> None:
    fake.answers["activate-node"] = (code, flower_error(2004))
    with pytest.raises(LinkError, match=rf"HTTP {code}, it said so \(code 2004\)"):
        FleetConnection(fake.address, KEY, tls=None)


def test_nobody_there_is_one_error(fake: Fake) -> None:
    fake.close()
    with pytest.raises(LinkError, match=r"ConnectError.*check the network, the firewall"):
        FleetConnection(fake.address, KEY, tls=None)
    fake.__init__()  # type: ignore[misc] # so that the fixture has something to close


def test_a_redirect_is_not_followed(fake: Fake) -> None:
    other = Fake()
    try:
        fake.extra = {"location": f"http://{other.address}/v1/fleet/activate-node"}
        fake.answers["activate-node"] = (307, b"")
        with pytest.raises(LinkError, match="HTTP 307"):
            FleetConnection(fake.address, KEY, tls=None)
        assert not other.calls
    finally:
        other.close()


def test_garbage_is_one_error(fake: Fake) -> None:
    with FleetConnection(fake.address, KEY, tls=None) as line:
        fake.answers["pull-messages"] = (200, b"\xff\xff\xff")
        with pytest.raises(LinkError, match="unreadable answer"):
            line.receive()


def test_more_than_the_limit_is_not_read(fake: Fake) -> None:
    limits = Limits(response=1000)
    with FleetConnection(fake.address, KEY, None, limits) as line:
        fake.answers["pull-messages"] = (200, b"\0" * 100_000)
        with pytest.raises(MessageError, match="found 'more bytes'; allowed: at most 1000"):
            line.receive()


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (
            Limits(message=MessageLimits(bytes=50)),
            "message: found 'more bytes'; allowed: at most 50",
        ),
        (
            Limits(message=MessageLimits(objects=2)),
            "message: found '4 objects'; allowed: at most 2",
        ),
    ],
)
def test_a_message_beyond_the_limits_is_refused(fake: Fake, limits: Limits, text: str) -> None:
    fake.offer(message())
    with (
        FleetConnection(fake.address, KEY, None, limits) as line,
        pytest.raises(MessageError, match=text),
    ):
        line.receive()
    assert "confirm-message-received" not in fake.calls


def test_an_altered_object_is_refused(fake: Fake) -> None:
    fake.offer(message())
    found = PullObjectResponse(object_found=True, object_available=True, object_content=b"x")
    fake.answers["pull-object"] = (200, found.SerializeToString())
    with (
        FleetConnection(fake.address, KEY, tls=None) as line,
        pytest.raises(MessageError, match="does not match its SHA-256"),
    ):
        line.receive()


def test_a_message_for_somebody_else_is_refused(fake: Fake) -> None:
    fake.offer(message(node=NODE + 1))
    with (
        FleetConnection(fake.address, KEY, tls=None) as line,
        pytest.raises(MessageError, match="another run or site"),
    ):
        line.receive()


def test_a_missing_object_is_refused(fake: Fake) -> None:
    fake.offer(message())
    fake.answers["pull-object"] = (200, PullObjectResponse().SerializeToString())
    with (
        FleetConnection(fake.address, KEY, tls=None) as line,
        pytest.raises(MessageError, match="the server does not have it"),
    ):
        line.receive()


def test_the_end_of_a_run_is_an_event(fake: Fake) -> None:
    code = ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED
    fake.answers["push-messages"] = (403, flower_error(code))
    with FleetConnection(fake.address, KEY, tls=None) as line:
        reply = line.prepare(write_reply(message(), 1, Status.OK))
        with pytest.raises(RunOver):
            line.send(reply)
        fake.answers["push-messages"] = (403, b"forbidden")
        with pytest.raises(LinkError, match="HTTP 403"):
            line.send(reply)


@pytest.mark.parametrize("call", ["pull-object", "confirm-message-received", "activate-node"])
def test_a_lost_answer_is_asked_for_again(fake: Fake, call: str) -> None:
    fake.offer(message())
    fake.broken[call] = 2
    with FleetConnection(fake.address, KEY, tls=None) as line:
        assert line.receive() is not None
    assert fake.broken[call] == 0
    fake.broken[call] = 100
    with (
        pytest.raises(LinkError, match="disconnected without sending a response"),
        FleetConnection(fake.address, KEY, tls=None) as line,
    ):
        line.receive()
        line.receive()  # a message is confirmed before the next one is asked for


def test_a_message_whose_answer_was_lost_is_not_asked_for_again(fake: Fake) -> None:
    """The server has handed it out; a site that connects anew is asked once more."""
    fake.offer(message())
    fake.broken["pull-messages"] = 1
    with FleetConnection(fake.address, KEY, tls=None) as line:
        with pytest.raises(LinkError, match="disconnected without sending a response"):
            line.receive()
        assert fake.calls.count("pull-messages") == 1


def test_what_is_known_by_its_hash_does_not_come_twice(fake: Fake) -> None:
    with FleetConnection(fake.address, KEY, tls=None) as line:
        for kind in ("train", "query.unmask"):
            sent = message()
            sent.metadata.message_type = kind
            fake.offer(sent)
            received = line.receive()
            assert received is not None
            assert (received.content, received.metadata.message_type) == (sent.content, kind)
    assert fake.calls.count("pull-object") == 3 + 1
    assert fake.calls.count("confirm-message-received") == 2


def offer_announced(fake: Fake, sent: Message) -> str:
    """Its place holder's name."""
    name, _ = place_holder("a")
    announced = announce(sent, name)
    assert announced is not None
    response = PullMessagesResponse(
        messages_list=[announced], message_object_trees=[ObjectTree(object_id=name)]
    )
    fake.answers["pull-messages"] = (200, response.SerializeToString())
    return name


def test_a_request_may_come_in_its_announcement(fake: Fake) -> None:
    sent = message()
    name = offer_announced(fake, sent)
    with FleetConnection(fake.address, KEY, tls=None) as line:
        received = line.receive()
        assert received is not None
        assert received.content == sent.content
        assert received.metadata.message_id == name
        reply = line.prepare(write_reply(received, 1, Status.OK))
        assert is_inline(reply.message)
        line.receive()
    assert not {"pull-object", "confirm-message-received"} & set(fake.calls)  # nothing to delete


@pytest.mark.parametrize("limits", [MessageLimits(bytes=100), MessageLimits(objects=1)])
def test_an_announcement_beyond_the_limits_is_refused(fake: Fake, limits: MessageLimits) -> None:
    sent = message()
    sent.content["adapter"] = to_record({"a": torch.zeros(2), "b": torch.ones(3)})
    offer_announced(fake, sent)
    with (
        FleetConnection(fake.address, KEY, None, Limits(message=limits)) as line,
        pytest.raises(MessageError),
    ):
        line.receive()


def test_a_request_of_another_form_comes_as_well(fake: Fake) -> None:
    sent = message()
    sent.content["adapter"] = to_record({"a": torch.zeros(2), "b": torch.ones(3)})
    fake.offer(sent)
    with FleetConnection(fake.address, KEY, tls=None) as line:
        received = line.receive()
        assert received is not None
        reply = line.prepare(write_reply(received, 1, Status.OK))
    assert received.content == sent.content
    assert fake.calls.count("pull-object") == 8  # each once
    assert len(reply.contents) == 4  # whoever sent it may know nothing of parcels


def test_a_larger_reply_is_one_object_and_a_large_one_moves_in_pieces(fake: Fake) -> None:
    half = pack(to_record({"a": torch.zeros(LARGEST // 8)}))
    whole = pack(to_record({"a": torch.zeros(LARGEST // 4)}))
    fake.offer(message())
    with FleetConnection(fake.address, KEY, tls=None) as line:
        request = line.receive()
        assert request is not None
        small, large = (
            line.prepare(write_reply(request, 1, Status.OK, found)) for found in (half, whole)
        )
    assert not is_inline(small.message)
    assert list(small.contents) == [small.tree.object_id] == [small.message.metadata.message_id]
    found = unwrap(small.tree.object_id, small.contents[small.tree.object_id], MessageLimits())
    assert found.content["adapter"] == half
    assert len(large.contents) == 6
    assert large.tree.object_id == large.message.metadata.message_id


def test_the_server_is_told_how_long_it_may_hold_a_question(fake: Fake) -> None:
    with FleetConnection(fake.address, KEY, tls=None) as line:
        assert line.receive(2.5) is None
        assert fake.headers["prefer"] == "wait=2"
        assert line.receive() is None
        assert "prefer" not in fake.headers


def test_a_reply_is_offered_again_when_an_object_was_not_taken(fake: Fake) -> None:
    """Flower takes an object once; if that answer is lost, only a new offer says what it has."""
    missing: list[str] = []

    def offered(body: bytes) -> tuple[int, bytes]:
        if not missing:
            tree = PushMessagesRequest.FromString(body).message_object_trees[0]
            missing.append(tree.object_id)
        response = PushMessagesResponse(objects_to_push=missing, session_id="s")
        return 200, response.SerializeToString()

    def taken(body: bytes) -> tuple[int, bytes]:
        name = PushObjectRequest.FromString(body).object_id
        stored = fake.bodies["push-object"].count(body) == 1
        if not stored:
            missing[:] = ["nothing"]
        assert name
        return 200, PushObjectResponse(stored=stored).SerializeToString()

    fake.answers |= {"push-messages": offered, "push-object": taken}
    fake.broken["push-object"] = 1
    with FleetConnection(fake.address, KEY, tls=None) as line:
        line.send(line.prepare(write_reply(message(), 1, Status.OK)))
        assert fake.calls.count("push-messages") == 2
        fake.answers["push-object"] = (200, PushObjectResponse(stored=False).SerializeToString())
        missing.clear()
        with pytest.raises(LinkError, match="would not store"):
            line.send(line.prepare(write_reply(message(), 2, Status.OK)))


def test_a_site_that_was_killed_says_goodbye_first(fake: Fake, tmp_path: Path) -> None:
    memory = tmp_path / "node"
    dial = Dialler(fake.address, KEY, None, memory=memory)
    dial().close()
    assert memory.read_text(encoding="ascii") == str(NODE)
    fake.calls.clear()
    accepted = fake.answers["activate-node"]

    def occupied(body: bytes) -> tuple[int, bytes]:
        fake.answers["activate-node"] = accepted
        return 412, flower_error(2004)

    fake.answers["activate-node"] = occupied
    Dialler(fake.address, KEY, None, memory=memory)().close()
    calls = [call for call in fake.calls if call != "send-node-heartbeat"]
    assert calls == ["activate-node", "deactivate-node", "activate-node", "deactivate-node"]
    memory.write_text("nonsense", encoding="ascii")
    Dialler(fake.address, KEY, None, memory=memory)().close()


def test_plain_http_is_for_loopback_only() -> None:
    with pytest.raises(LinkError, match="allowed: mutual TLS, or a loopback address in a test"):
        FleetConnection("192.0.2.1:443", KEY, tls=None)


def test_tls_is_used_as_it_is_given(fake: Fake) -> None:
    with pytest.raises(LinkError, match=r"ConnectError.*SSL"):
        FleetConnection(fake.address, KEY, ssl.create_default_context())


# --- mutual TLS


class Authority:
    """A certificate authority in memory, whose certificates last an hour."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign("authority", self.key, authority=True)
        self.file = directory / "ca.pem"
        self.file.write_bytes(self.certificate.public_bytes(Encoding.PEM))

    def issue(self, name: str) -> Path:
        """A key and its certificate in one file."""
        key = ec.generate_private_key(ec.SECP256R1())
        path = self.directory / f"{name}.pem"
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.write_bytes(private + self._sign(name, key).public_bytes(Encoding.PEM))
        return path

    def _sign(
        self, name: str, key: ec.EllipticCurvePrivateKey, authority: bool = False
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = subject if authority else self.certificate.subject
        loopback = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
        return (
            x509.CertificateBuilder(issuer, subject, key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(loopback, critical=False)
            .sign(self.key, hashes.SHA256())
        )

    def server(self) -> ssl.SSLContext:
        """Shows its certificate and asks for one of this authority."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self.file))
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self.issue("server"))
        return context

    def site(self, certificate: Path | None) -> ssl.SSLContext:
        """Trusts this authority only."""
        context = ssl.create_default_context(cafile=str(self.file))
        if certificate is not None:
            context.load_cert_chain(certificate)
        return context


def test_mutual_tls(tmp_path: Path) -> None:
    ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
    fake = Fake(ours.server())
    try:
        with FleetConnection(fake.address, KEY, ours.site(ours.issue("ward-3"))) as line:
            assert line.receive() is None
        assert "pull-messages" in fake.calls
        fake.calls.clear()
        for context in (
            ours.site(None),  # no certificate
            ours.site(other.issue("ward-3")),  # of another authority
            other.site(ours.issue("ward-4")),  # trusts another authority
            ssl.create_default_context(),
        ):
            with pytest.raises(LinkError, match="check the network, the firewall and the certif"):
                FleetConnection(fake.address, KEY, context)
        with pytest.raises(LinkError):
            FleetConnection(fake.address, KEY, tls=None)
        assert not fake.calls
    finally:
        fake.close()
