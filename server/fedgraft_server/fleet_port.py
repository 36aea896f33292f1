"""The four small calls that a round consists of, over the SuperLink's gRPC port.

Flower's HTTP API spends most of a call in its web framework: 4 ms of processor, whatever the call
is. The same handlers stand behind a gRPC service, and there a call costs a third of that. A site
speaks HTTP to the gateway, as a stock SuperNode does, and the bytes inside are the same protobuf;
so the gateway can pass them on either way.

Flower 1.41 opens that port if it is asked to, and calls it deprecated. With a Flower that has none,
every call goes over HTTP and a round takes longer. `tests/unit/server/test_fleet_port.py` pins what
is used here to flwr 1.41.

Always over HTTP go activation, farewell and heartbeat, since only there Flower holds the key in an
activation against the key that signed it; and objects on their way to a site: they may be large,
and HTTP passes them on as fast as the site reads.
"""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio
from flwr.common import constant
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PushObjectRequest,
)
from flwr.supercore.error import FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]

OPENS: Final[str | None] = getattr(constant, "FLWR_INTERNAL_GRPC_FLEET_API", None)
"""Environment variable that makes a SuperLink open the port; None if this Flower has none."""

_SERVICE: Final = "/flwr.proto.Fleet/"
CALLS: Final[Mapping[bytes, tuple[str, type[Message]]]] = {
    b"/v1/fleet/pull-messages": ("PullMessages", PullMessagesRequest),
    b"/v1/fleet/push-messages": ("PushMessages", PushMessagesRequest),
    b"/v1/fleet/push-object": ("PushObject", PushObjectRequest),
    b"/v1/fleet/confirm-message-received": (
        "ConfirmMessageReceived", ConfirmMessageReceivedRequest,
    ),
}  # fmt: skip
"""Path of a call in Flower's HTTP API -> its name in the gRPC service, and what it takes."""
_BINARY: Final = {
    b"flwr-public-key": "flwr-public-key-bin",
    b"flwr-signature": "flwr-signature-bin",
}
_TIME: Final = b"flwr-timestamp"
_TEXT: Final = frozenset(
    {_TIME, b"flwr-component-name", b"flwr-package-name", b"flwr-package-version"}
)
_PATIENCE: Final = 60.0  # seconds that a call may take
_AT_ONCE: Final = 32  # calls under way
_REFUSED: Final = {grpc.StatusCode.UNAUTHENTICATED: 401, grpc.StatusCode.INVALID_ARGUMENT: 400}
_AWAY: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class SuperLinkAwayError(Exception):
    """Nobody answers on the port, or not in time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the SuperLink said, as its HTTP API would have put it.

    Attributes:
        status: HTTP's.
        content: protobuf, or JSON if the status is not 200.
    """

    status: int
    content: bytes

    @property
    def kind(self) -> bytes:
        """HTTP's content type."""
        return b"application/x-protobuf" if self.status == 200 else b"application/json"


class FleetPort:
    """A client of the SuperLink's gRPC port; one connection for all sites. Close it.

    Args:
        address: `host:port` on loopback.
        certificate: PEM of the CA that the SuperLink's certificate is from.
    """

    def __init__(self, address: str, certificate: bytes) -> None:
        self._channel = grpc.aio.secure_channel(
            address,
            grpc.ssl_channel_credentials(certificate),
            options=(
                ("grpc.enable_http_proxy", 0),  # it would be asked for loopback, too
                ("grpc.max_send_message_length", -1),  # the gateway has a limit of its own
                ("grpc.max_receive_message_length", -1),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ),
        )
        self._calls: dict[bytes, Any] = {
            path: self._channel.unary_unary(_SERVICE + name) for path, (name, _) in CALLS.items()
        }
        self._room = asyncio.Semaphore(_AT_ONCE)

    async def call(self, path: bytes, headers: Mapping[bytes, bytes], body: bytes) -> Answer:
        """Passes a site's call on.

        Args:
            path: one of `CALLS`.
            headers: of the HTTP call; who it is from, and signed.
            body: its protobuf.

        Raises:
            SuperLinkAwayError: see there.
        """
        try:
            metadata = _metadata(headers)
            CALLS[path][1].FromString(body)
        except ValueError:
            return Answer(401, _json("unreadable authentication headers"))
        except DecodeError:
            return Answer(400, _json("not the protobuf of this call"))
        try:
            async with self._room:
                return Answer(
                    200, await self._calls[path](body, metadata=metadata, timeout=_PATIENCE)
                )
        except grpc.aio.AioRpcError as error:
            if error.code() in _AWAY:
                raise SuperLinkAwayError(error.code().name) from None
            return _refusal(error)

    async def close(self) -> None:
        """Hangs up."""
        await self._channel.close()


def _metadata(headers: Mapping[bytes, bytes]) -> list[tuple[str, str | bytes]]:
    """The gRPC form of Flower's headers: what is base64 in HTTP is bytes here.

    Raises:
        ValueError: one that gRPC would not carry, or a time that Flower could not read.
    """
    found: list[tuple[str, str | bytes]] = []
    for name, value in headers.items():
        if name in _BINARY:
            found.append((_BINARY[name], base64.b64decode(value, validate=True)))
        elif name in _TEXT:
            text = value.decode("ascii")
            if not text.isprintable() or (name == _TIME and not _has_zone(text)):
                raise ValueError(text)
            found.append((name.decode("ascii"), text))
    return found


def _has_zone(time: str) -> bool:
    return dt.datetime.fromisoformat(time).tzinfo is not None


def _refusal(error: grpc.aio.AioRpcError) -> Answer:
    """Flower's error in the form that its HTTP API gives it."""
    found = FlowerError.from_json(error.details())
    if found is not None:
        known = API_ERROR_MAP.get(found.code)
        status = 500 if known is None else known.http_status_code
        return Answer(status, json.dumps(found.to_json(found.message)).encode())
    return Answer(_REFUSED.get(error.code(), 500), _json(error.details() or error.code().name))


def _json(reason: str) -> bytes:
    return json.dumps({"detail": reason}).encode()
