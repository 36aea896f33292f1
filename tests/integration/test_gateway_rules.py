"""The gateway's rules over real TLS, with a stand-in for the SuperLink. Long: rules are many."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.recorddict_pb2 import RecordDict
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedgraft_client.identity import Identity
from fedgraft_common.inline import SMALL
from fedgraft_server.bell import Bells
from fedgraft_server.gateway import _FORWARDED, FLEET_CALLS

if TYPE_CHECKING:
    from conftest import Federation  # type: ignore[import-not-found]
else:
    Federation = Any

PULL = "/v1/fleet/pull-messages"
ALL_FLOWER_PATHS = sorted(path for _, path in PROTOBUF_REQUEST_TYPES)


def node_key(identity: Identity) -> str:
    return base64.b64encode((identity.directory / "node.pub").read_bytes()).decode()


class Connection(contextlib.AbstractContextManager["Connection"]):
    """HTTP that sends a path as it is written."""

    def __init__(self, federation: Federation, identity: Identity) -> None:
        self.identity = identity
        self.http = http.client.HTTPSConnection(
            "localhost", federation.settings.gateway.port,
            context=identity.ssl_context(), timeout=10,
        )  # fmt: skip

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def ask(
        self, path: str, body: Any = b"", method: str = "POST", **headers: str
    ) -> tuple[int, bytes]:
        self.http.putrequest(method, path, skip_accept_encoding=True)
        sent = {"flwr-public-key": node_key(self.identity), "content-length": str(len(body))}
        for name, value in (sent | {n.replace("_", "-"): v for n, v in headers.items()}).items():
            self.http.putheader(name, value)
        self.http.endheaders(body)
        response = self.http.getresponse()
        return response.status, response.read()


@pytest.fixture
def north(federation: Federation) -> Identity:
    return federation.join("north")  # type: ignore[no-any-return]


def test_nine_calls_pass_as_they_are(federation: Federation, north: Identity) -> None:
    assert len(FLEET_CALLS) == 9
    calls = [call for call in FLEET_CALLS if call != "push-messages"]
    with Connection(federation, north) as connection:
        for call in calls:
            status, body = connection.ask(f"/v1/fleet/{call}", call.encode(), authorization="x")
            assert (status, body) == (200, b"answer")
    seen = federation.upstream.seen
    assert [request["path"].decode() for request in seen] == [f"/v1/fleet/{c}" for c in calls]
    assert [request["body"].decode() for request in seen] == calls
    for request in seen:
        names = {name for name, _ in request["headers"]}
        assert names == {b"host", b"flwr-public-key", b"content-length"}


def test_the_header_names_are_flowers() -> None:
    ours = {name.decode() for name in _FORWARDED} - {"accept", "content-type"}
    metadata = RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata()
    flowers = {FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER}
    assert ours == flowers | {name for name, _ in metadata}
    assert {f"/v1/fleet/{call}" for call in FLEET_CALLS} < set(ALL_FLOWER_PATHS)


def test_every_other_path_of_the_superlink_stays_shut(
    federation: Federation, north: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    shut = [p for p in ALL_FLOWER_PATHS if p.removeprefix("/v1/fleet/") not in FLEET_CALLS]
    shut += ["/health", "/docs", "/openapi.json", "/", "/join", "/ca"]
    assert len(shut) > 60
    with Connection(federation, north) as connection:
        for path in shut:
            for method in ("POST", "GET"):
                status, body = connection.ask(path, method=method)
                assert status in (403, 429), path
                time.sleep(0.01)
                if status == 403:
                    assert json.loads(body) == {"error": "not a call that sites may make"}
    assert federation.upstream.seen == []
    refusals = [r for r in caplog.records if getattr(r, "action", "") == "refuse-path"]
    assert refusals and all(vars(record)["site"] == "north" for record in refusals)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "//v1/fleet/pull-messages"),
        ("POST", "/v1//fleet/pull-messages"),
        ("POST", "/v1/fleet/pull-messages/"),
        ("POST", "/v1/fleet/./pull-messages"),
        ("POST", "/v1/fleet/../control/start-run"),
        ("POST", "/v1/fleet/pull-messages/../../control/start-run"),
        ("POST", "/v1/fleet/%2e%2e/control/start-run"),
        ("POST", "/v1/fleet%2fpull-messages"),
        ("POST", "/v1/fleet/pull%2Dmessages"),
        ("POST", "/v1/fleet/pull-messages%00"),
        ("POST", "/v1/FLEET/pull-messages"),
        ("POST", "/V1/fleet/pull-messages"),
        ("POST", "/v1/fleet/pull-messages?x=1"),
        ("POST", "/v1/fleet/pull-messages;x"),
        ("POST", "/v1/fleet/register-node"),
        ("POST", "/v1/fleet/unregister-node"),
        ("POST", "/v1/fleet/get-fab"),
        ("GET", PULL),
        ("PUT", PULL),
        ("post", PULL),
        ("POST", "/whoami"),
        ("GET", "/renew"),
        ("GET", "/whoami?x=1"),
        ("OPTIONS", "*"),
        ("CONNECT", "127.0.0.1:22"),
    ],
)
def test_path_tricks(federation: Federation, north: Identity, method: str, path: str) -> None:
    with Connection(federation, north) as connection:
        status, _ = connection.ask(path, method=method)
        assert status in (400, 403)
        assert federation.upstream.seen == []


def test_absolute_targets_go_where_the_gateway_says(
    federation: Federation, north: Identity
) -> None:
    with Connection(federation, north) as connection:
        assert connection.ask(f"http://127.0.0.1:1{PULL}")[0] == 200
        assert connection.ask("http://127.0.0.1:1/v1/control/start-run")[0] == 403
        assert [request["path"].decode() for request in federation.upstream.seen] == [PULL]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=300))
def test_garbage_instead_of_http_reaches_nobody(garbage: bytes) -> None:
    """The parser alone, without TLS around it: what it accepts must be one of ours to pass."""
    import asyncio
    from unittest.mock import MagicMock

    import uvicorn

    from fedgraft_server.listener import PeerCertificateProtocol

    reached: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)

    async def feed() -> None:
        config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None)
        config.load()
        protocol = PeerCertificateProtocol(config, uvicorn.server.ServerState(), {})
        transport = MagicMock()
        transport.get_extra_info.return_value = None
        protocol.connection_made(transport)
        protocol.data_received(garbage)
        protocol.connection_lost(None)

    asyncio.run(feed())
    assert reached == []


# --- who


def test_a_node_key_with_another_sites_certificate(
    federation: Federation, north: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    south = federation.join("south")
    with Connection(federation, north) as connection:
        status, body = connection.ask(PULL, flwr_public_key=node_key(south))
        assert (status, b"not the one this site joined with" in body) == (403, True)
        assert connection.ask(PULL, flwr_public_key="")[0] == 403
        assert connection.ask(PULL, flwr_public_key=node_key(north) + "=")[0] == 403
    assert federation.upstream.seen == []
    assert [vars(r)["action"] for r in caplog.records if hasattr(r, "site")] == [
        "refuse-node-key"
    ] * 3


def test_a_header_that_comes_twice(federation: Federation, north: Identity) -> None:
    south = federation.join("south")
    with Connection(federation, north) as connection:
        connection.http.putrequest("POST", PULL)
        for identity in (south, north):
            connection.http.putheader("flwr-public-key", node_key(identity))
        connection.http.putheader("content-length", "0")
        connection.http.endheaders()
        response = connection.http.getresponse()
        assert (response.status, b"came twice" in response.read()) == (403, True)
    assert federation.upstream.seen == []


def logged(caplog: pytest.LogCaptureFixture, action: str) -> list[str]:
    """What the gateway wrote about refusals of a kind."""
    return [r.getMessage() for r in caplog.records if getattr(r, "action", "") == action]


def test_revocation_works_on_an_open_connection(
    federation: Federation, north: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    with Connection(federation, north) as connection:
        assert connection.ask(PULL)[0] == 200
        with federation.registry as registry:
            registry.revoke("north")
        status, body = connection.ask(PULL)
        assert (status, b"revoked on" in body) == (403, True)
        assert len(federation.upstream.seen) == 1
    [line] = logged(caplog, "refuse-certificate")
    assert "site north, revoked on" in line


def test_a_certificate_of_the_ca_that_is_not_in_the_registry(
    federation: Federation, north: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy of the CA's key is not enough."""
    from fedgraft_common.certificates import certificate_pem, read_private_key
    from fedgraft_server.authority import Authority

    key = read_private_key(north.directory / "site.key").public_key()
    forged = Authority.load(federation.directory).issue_site(
        "north", key, dt.timedelta(days=1), federation.clock()  # type: ignore[arg-type]
    )  # fmt: skip
    (north.directory / "site.pem").write_bytes(certificate_pem(forged))
    with Connection(federation, north) as connection:
        status, body = connection.ask(PULL)
        assert (status, b"registry does not know" in body) == (403, True)
    [line] = logged(caplog, "refuse-certificate")
    assert "registry does not know" in line


def handshake(federation: Federation, context: ssl.SSLContext) -> bytes:
    """What the gateway answers; nothing if it refuses."""
    port = federation.settings.gateway.port
    with (
        contextlib.suppress(ssl.SSLError, ConnectionError),
        socket.create_connection(("localhost", port), 10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(b"GET /whoami HTTP/1.1\r\nhost: x\r\n\r\n")
        return connection.recv(1000)
    return b""


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        found = [
            record.getMessage()
            for record in caplog.records
            if getattr(record, "action", "") == "refuse-handshake"
        ]
        if found:
            return found
        time.sleep(0.01)
    return []


def test_with_its_certificate(federation: Federation, north: Identity) -> None:
    assert handshake(federation, north.ssl_context()).startswith(b"HTTP/1.1 200")


def test_without_a_certificate(federation: Federation, caplog: pytest.LogCaptureFixture) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(federation.directory.ca[0])
    assert handshake(federation, context) == b""
    assert refusals(caplog) == ["connection refused: PEER_DID_NOT_RETURN_A_CERTIFICATE"]


def test_with_an_expired_certificate(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    federation.clock.ahead = dt.timedelta(days=-91)
    expired = federation.join("late")
    assert handshake(federation, expired.ssl_context()) == b""
    assert refusals(caplog) == ["connection refused: certificate has expired"]


def test_with_a_certificate_of_another_federation(
    federation: Federation, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from fedgraft_common.certificates import certificate_pem, private_pem
    from fedgraft_server.authority import create
    from fedgraft_server.settings import ServerDirectory

    other = create(ServerDirectory(tmp_path / "other"), federation.settings, federation.clock())
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    stranger = other.issue_site("north", key.public_key(), dt.timedelta(days=1), federation.clock())
    (tmp_path / "c").write_bytes(certificate_pem(stranger))
    (tmp_path / "k").write_bytes(private_pem(key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(federation.directory.ca[0])
    context.load_cert_chain(tmp_path / "c", tmp_path / "k")
    assert handshake(federation, context) == b""
    assert refusals(caplog) == ["connection refused: unable to get local issuer certificate"]


def test_with_the_servers_certificate_as_a_client(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(federation.directory.ca[0])
    context.load_cert_chain(*federation.directory.server)
    assert handshake(federation, context) == b""
    assert refusals(caplog) == ["connection refused: unsuitable certificate purpose"]


def test_old_tls_and_plain_text(
    federation: Federation, north: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    context = north.ssl_context()
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert handshake(federation, context) == b""
    assert refusals(caplog) == ["connection refused: UNSUPPORTED_PROTOCOL"]
    caplog.clear()
    port = federation.settings.gateway.port
    with socket.create_connection(("localhost", port), 10) as plain:
        plain.sendall(f"POST {PULL} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        received = b""
        with contextlib.suppress(ConnectionError):
            received = plain.recv(1000)
        assert b"HTTP" not in received
    assert refusals(caplog) == ["connection refused: HTTP_REQUEST"]


# --- how much


def test_a_declared_size_above_the_limit_is_refused_unread(
    federation: Federation, north: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    with Connection(federation, north) as connection:
        connection.http.putrequest("POST", PULL)
        connection.http.putheader("flwr-public-key", node_key(north))
        connection.http.putheader("content-length", str(2**40))
        connection.http.endheaders()
        response = connection.http.getresponse()
        assert (response.status, response.getheader("connection")) == (413, "close")
        assert b"more than 1048576 bytes" in response.read()
    assert federation.upstream.seen == []
    assert logged(caplog, "limit-size") == [f"refused {PULL}: request too large"]


def test_an_undeclared_size_is_counted_and_broken_off(
    federation: Federation, north: Identity
) -> None:
    with Connection(federation, north) as connection:
        connection.http.putrequest("POST", "/v1/fleet/push-object")
        connection.http.putheader("flwr-public-key", node_key(north))
        connection.http.putheader("transfer-encoding", "chunked")
        connection.http.endheaders()
        piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        deadline = time.monotonic() + 20
        with pytest.raises(OSError, match=r"\w"):
            while time.monotonic() < deadline:
                connection.http.send(piece)
    with Connection(federation, north) as connection:
        assert connection.ask(PULL)[0] == 200
    assert [request["path"].decode() for request in federation.upstream.seen] == [PULL]
    assert federation.upstream.broken_off == 1


@pytest.mark.parametrize("size", [0, 1, 256 * 1024, 256 * 1024 + 1, 2**20])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_arrive_whole(
    federation: Federation, north: Identity, size: int, chunked: bool
) -> None:
    body = bytes(i % 251 for i in range(size))
    federation.upstream.answer = body or b"nothing"
    with Connection(federation, north) as connection:
        if chunked:
            key = {"flwr-public-key": node_key(north)}
            pieces = iter([body[i : i + 70_000] for i in range(0, size, 70_000)])
            connection.http.request(
                "POST", "/v1/fleet/push-object", pieces, key, encode_chunked=True
            )
            response = connection.http.getresponse()
            assert (response.status, response.read()) == (200, federation.upstream.answer)
        else:
            answered = connection.ask("/v1/fleet/push-object", body)
            assert answered == (200, federation.upstream.answer)
    assert federation.upstream.seen[0]["body"] == body


def test_a_client_that_leaves_in_the_middle(federation: Federation, north: Identity) -> None:
    with Connection(federation, north) as connection:
        connection.http.putrequest("POST", "/v1/fleet/push-object")
        connection.http.putheader("flwr-public-key", node_key(north))
        connection.http.putheader("content-length", "900000")
        connection.http.endheaders(b"x" * 400_000)
        time.sleep(0.2)
    with Connection(federation, north) as connection:
        assert connection.ask(PULL)[0] == 200
    assert [request["path"].decode() for request in federation.upstream.seen] == [PULL]


def hung(federation: Federation) -> Bells:
    federation.directory.runs.mkdir(exist_ok=True)
    return Bells.of(federation.directory.runs)


def test_a_question_is_held_until_a_run_has_asked(federation: Federation, north: Identity) -> None:
    bells, upstream = hung(federation), federation.upstream
    upstream.answer = b""

    def ask() -> None:
        upstream.answer = b"a message"
        bells.asked.ring()

    later = threading.Timer(0.3, ask)
    with Connection(federation, north) as connection:
        later.start()
        began = time.monotonic()
        assert connection.ask(PULL, b"q", prefer="wait=8") == (200, b"a message")
        assert 0.25 < time.monotonic() - began < 5
        assert [(r["path"].decode(), r["body"]) for r in upstream.seen] == [(PULL, b"q")] * 2
        assert b"prefer" not in {name for name, _ in upstream.seen[0]["headers"]}
    later.join()


def test_a_held_question_ends_and_costs_the_superlink_little(
    federation: Federation, north: Identity
) -> None:
    bells = hung(federation)
    federation.upstream.answer = b""
    with Connection(federation, north) as connection:
        began = time.monotonic()
        assert connection.ask(PULL, prefer="wait=1") == (200, b"")
        assert len(federation.upstream.seen) == 2  # at once, and at the end in case no bell hangs
        assert connection.ask(PULL, prefer="wait=1") == (200, b"")
        assert len(federation.upstream.seen) == 3
        assert 2 <= time.monotonic() - began < 8
        for wish in ("", "wait=", "wait=x", "wait=-1", "respond-async"):
            assert connection.ask(PULL, prefer=wish) == (200, b"")
        assert time.monotonic() - began < 9
        federation.upstream.status = 412
        bells.asked.ring()
        assert connection.ask(PULL, prefer="wait=20")[0] == 412  # an error is told at once


def test_no_message_is_fetched_for_a_site_that_has_left(
    federation: Federation, north: Identity
) -> None:
    bells = hung(federation)
    federation.upstream.answer = b""
    with Connection(federation, north) as connection:
        connection.http.request(
            "POST", PULL, b"", {"flwr-public-key": node_key(north), "prefer": "wait=9"}
        )
        while not federation.upstream.seen:
            time.sleep(0.01)
    time.sleep(0.3)
    federation.upstream.answer = b"a message"
    bells.asked.ring()
    time.sleep(0.3)
    assert len(federation.upstream.seen) == 1


def test_runs_hear_of_each_piece_of_a_reply(federation: Federation, north: Identity) -> None:
    bells = hung(federation)
    with Connection(federation, north) as connection:
        assert connection.ask(PULL)[0] == 200
        assert bells.answered.rung() == 0
        last = 0
        for _ in range(2):
            assert connection.ask("/v1/fleet/push-object", b"o")[0] == 200
            end = time.monotonic() + 10  # it rings once the answer is on its way
            while bells.answered.rung() == last and time.monotonic() < end:
                time.sleep(0.001)
            assert bells.answered.rung() > last
            last = bells.answered.rung()
        assert connection.ask(PULL)[0] == 200
        assert connection.ask("/v1/fleet/push-messages", pushed())[0] == 200
        assert bells.answered.rung() == last  # what was announced is still to come
        assert connection.ask("/v1/fleet/push-messages", pushed(content=6))[0] == 200
        end = time.monotonic() + 10
        while bells.answered.rung() == last and time.monotonic() < end:
            time.sleep(0.001)
        assert bells.answered.rung() > last


def test_rate_limit_is_per_site(
    federation: Federation, north: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    south = federation.join("south")
    with Connection(federation, north) as one, Connection(federation, south) as other:
        statuses = [one.ask("/whoami", method="GET")[0] for _ in range(150)]
        assert set(statuses) == {200, 429}
        assert statuses[:60] == [200] * 60
        assert other.ask("/whoami", method="GET")[0] == 200
        time.sleep(0.1)
        assert one.ask("/whoami", method="GET")[0] == 200
    limited = [r for r in caplog.records if getattr(r, "action", "") == "limit-rate"]
    assert 0 < len(limited) <= 25  # the log is limited too


# --- what


def pushed(source: int = 7, content: int = 0, roots: Sequence[str] = ("m",)) -> bytes:
    """A reply of node 7, as it would announce it."""
    items = [RecordDict.Item(key="s" * content)] if content else []
    metadata = Metadata(src_node_id=source, message_id="m", reply_to_message_id="r")
    request = PushMessagesRequest(
        node=Node(node_id=7),
        messages_list=[Message(metadata=metadata, content=RecordDict(items=items))] * len(roots),
        message_object_trees=[ObjectTree(object_id=root) for root in roots],
    )
    body: bytes = request.SerializeToString()
    return body


def test_nobody_speaks_in_anothers_name(
    federation: Federation, north: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    others = (
        pushed(8), b"\xff\xff", pushed(roots=()), pushed(roots=("m", "m")), pushed(roots=("x",)),
        pushed(roots=("r",)), pushed().replace(b"\x01m", b"\x01r"),
    )  # fmt: skip
    with Connection(federation, north) as connection:
        assert connection.ask("/v1/fleet/push-messages", pushed())[0] == 200
        for body in others:
            assert connection.ask("/v1/fleet/push-messages", body)[0] == 400
    assert [request["body"] for request in federation.upstream.seen] == [pushed()]
    assert len(logged(caplog, "refuse-message")) == len(others)


def test_a_large_content_does_not_travel_in_an_announcement(
    federation: Federation, north: Identity
) -> None:
    """The SuperLink would take it apart, entry by entry, before anybody asks for it."""
    with Connection(federation, north) as connection:
        assert connection.ask("/v1/fleet/push-messages", pushed(content=SMALL - 100))[0] == 200
        assert connection.ask("/v1/fleet/push-messages", pushed(content=SMALL))[0] == 413
        assert connection.ask("/v1/fleet/push-messages", pushed())[0] == 200


def test_flowers_refusals_come_back_and_its_private_headers_do_not(
    federation: Federation, north: Identity
) -> None:
    federation.upstream.status, federation.upstream.answer = 412, b'{"code": 2004}'
    with Connection(federation, north) as connection:
        connection.http.request("POST", PULL, b"", {"flwr-public-key": node_key(north)})
        response = connection.http.getresponse()
        assert (response.status, response.read()) == (412, b'{"code": 2004}')
        names = {name for name, _ in response.getheaders()}
        assert names == {"content-type", "content-length"}


def test_superlink_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """503, which Flower's client takes as: try again."""
    import asyncio

    from fedgraft_server.gateway import Gateway, upstream_session

    statuses: list[int] = []

    async def main() -> None:
        registry, table = _AnySite(), _settings()
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            url = f"https://127.0.0.1:{taken.getsockname()[1]}"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            async with upstream_session(context) as session:
                gateway = Gateway(registry, table, session, url, None)  # type: ignore[arg-type]
                for _ in range(3):
                    await gateway(_scope(), _receive, send)

    async def send(event: Any) -> None:
        if event["type"] == "http.response.start":
            statuses.append(event["status"])

    asyncio.run(main())
    assert statuses == [503, 503, 503]
    assert [vars(r)["action"] for r in caplog.records if hasattr(r, "action")] == ["away"]


async def _receive() -> Any:
    return {"type": "http.request", "body": b"", "more_body": False}


class _AnySite:
    def site_of(self, _: str) -> Any:
        from fedgraft_server.registry import Site

        now = dt.datetime.now(dt.UTC)
        return Site("north", (), "key", 1, now, None, now, "", "")


def _settings() -> Any:
    from fedgraft_server.settings import FederationTable, Settings

    return Settings(federation=FederationTable(name="t", host="localhost"))


def _scope() -> Any:
    return {
        "type": "http",
        "method": "POST",
        "raw_path": PULL.encode(),
        "query_string": b"",
        "headers": [
            (b"flwr-public-key", base64.b64encode(b"key")),
            (b"content-length", b"0"),
        ],
        "extensions": {"tls": {"client_cert_chain": (ssl.DER_cert_to_PEM_cert(b"x"),)}},
    }
