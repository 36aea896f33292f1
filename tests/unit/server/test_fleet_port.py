"""Calls over gRPC in the place of HTTP: what is used of Flower, and how answers are put.

With a real SuperLink it is in integration/test_server_up.py.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc
import pytest
from flwr.common import constant
from flwr.proto import fleet_pb2
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.error.grpc import _flower_error_to_grpc_json
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from fedgraft_server import fleet_port
from fedgraft_server.fleet_port import CALLS, OPENS, FleetPort, SuperLinkAwayError
from fedgraft_server.gateway import FLEET_PATHS

PULL = b"/v1/fleet/pull-messages"
BODY = PullMessagesRequest(node=Node(node_id=7)).SerializeToString()
HEADERS = {
    b"flwr-public-key": base64.b64encode(b"key"),
    b"flwr-signature": base64.b64encode(b"\x00\xff"),
    b"flwr-timestamp": b"2026-01-02T03:04:05+00:00",
    b"content-type": b"application/x-protobuf",
}


TIMES = (b"\xff", b"now", b"2026-01-02T03:04:05", b"2026-01-02T03:04:05+00:00\t", b"\x01")


def test_flower_has_what_is_used_here() -> None:
    assert OPENS == constant.FLWR_INTERNAL_GRPC_FLEET_API
    methods = fleet_pb2.DESCRIPTOR.services_by_name["Fleet"].methods_by_name
    for path, (name, takes) in CALLS.items():
        assert path in FLEET_PATHS
        assert methods[name].input_type.full_name == takes.DESCRIPTOR.full_name
        assert PROTOBUF_REQUEST_TYPES["POST", path.decode()] is takes
    binary = {
        FLEET_HTTP_PUBLIC_KEY_HEADER: constant.PUBLIC_KEY_HEADER,
        FLEET_HTTP_SIGNATURE_HEADER: constant.SIGNATURE_HEADER,
    }
    assert {name.decode(): other for name, other in fleet_port._BINARY.items()} == binary
    described = dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())
    assert {constant.TIMESTAMP_HEADER, *described} == {n.decode() for n in fleet_port._TEXT}


def ask(
    monkeypatch: pytest.MonkeyPatch, handler: Callable[[bytes, Any], bytes], *calls: Any
) -> list[Any]:
    """The answers of a service with one handler to `(path, headers, body)`."""

    class Service(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                lambda body, context: handler(body, (details.method, context))
            )

    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Service(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setattr(
        grpc.aio,
        "secure_channel",
        lambda address, _, options: grpc.aio.insecure_channel(address, options=options),
    )

    async def main() -> list[Any]:
        client = FleetPort(f"127.0.0.1:{port}", b"")
        try:
            return [await client.call(*call) for call in calls]
        finally:
            await client.close()

    try:
        return asyncio.run(main())
    finally:
        server.stop(0).wait()


def test_a_call_passes_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def handler(body: bytes, call: Any) -> bytes:
        method, context = call
        seen.append((method, body, dict(context.invocation_metadata())))
        return b"answer"

    [found] = ask(monkeypatch, handler, (PULL, HEADERS, BODY))
    assert (found.status, found.content, found.kind) == (200, b"answer", b"application/x-protobuf")
    [(method, body, metadata)] = seen
    assert (method, body) == ("/flwr.proto.Fleet/PullMessages", BODY)
    assert metadata["flwr-public-key-bin"] == b"key"
    assert metadata["flwr-signature-bin"] == b"\x00\xff"
    assert metadata["flwr-timestamp"] == "2026-01-02T03:04:05+00:00"
    assert "content-type" not in metadata


@pytest.mark.parametrize("code", [ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED, 987654])
def test_flower_s_errors_look_as_over_http(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    error = FlowerError(code, "secret", public_details="more")

    def handler(_: bytes, call: Any) -> bytes:
        call[1].abort(grpc.StatusCode.FAILED_PRECONDITION, _flower_error_to_grpc_json(error, "no"))
        raise AssertionError

    [found] = ask(monkeypatch, handler, (PULL, HEADERS, BODY))
    known = API_ERROR_MAP.get(code)
    assert found.status == (500 if known is None else known.http_status_code)
    assert found.kind == b"application/json"
    assert json.loads(found.content) == {"code": code, "detail": "no", "extra": "more"}


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, 401),
        (grpc.StatusCode.INVALID_ARGUMENT, 400),
        (grpc.StatusCode.INTERNAL, 500),
    ],
)
def test_other_refusals(
    monkeypatch: pytest.MonkeyPatch, code: grpc.StatusCode, status: int
) -> None:
    def handler(_: bytes, call: Any) -> bytes:
        call[1].abort(code, "Invalid node ID")
        raise AssertionError

    [found] = ask(monkeypatch, handler, (PULL, HEADERS, BODY))
    assert found.status == status
    assert json.loads(found.content) == {"detail": "Invalid node ID"}


def test_what_is_unreadable_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def handler(_: bytes, call: Any) -> bytes:
        raise AssertionError(call)

    found = ask(
        monkeypatch, handler,
        (PULL, HEADERS, b"\xff\xff"),
        (PULL, HEADERS | {b"flwr-signature": b"?"}, BODY),
        *((PULL, HEADERS | {b"flwr-timestamp": time}, BODY) for time in TIMES),
        (PULL, HEADERS | {b"flwr-package-name": b"a\tb"}, BODY),
    )  # fmt: skip
    assert [answer.status for answer in found] == [400] + [401] * 7


def test_a_proxy_for_the_internet_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    [found] = ask(monkeypatch, lambda body, _: body, (PULL, HEADERS, BODY))
    assert found.status == 200


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))

        async def main() -> None:
            client = FleetPort(f"127.0.0.1:{taken.getsockname()[1]}", b"")
            try:
                await client.call(PULL, HEADERS, BODY)
            finally:
                await client.close()

        with pytest.raises(SuperLinkAwayError):
            asyncio.run(main())
