"""A site's line to the server; long, for only this file here knows Flower's Fleet calls.

Flower's own `http_request_response` ends the process when it cannot connect, and interrupts it
when a heartbeat is not let in. A site that must come back after every failure cannot use that, so
this file goes one layer deeper, to `FleetHttpClient`, with the same calls in the same order:

    activate -> (pull message -> pull objects -> answer -> push message -> push objects -> confirm)*
             -> deactivate, and a heartbeat every 20 seconds beside it

Of Flower's Fleet calls eight are used. Missing on purpose: `register-node` (an operator registers
sites), `get-run` and `get-fab`. A site never asks for the program that a run carries with it, so
there is none that it could run.

`tests/unit/client/test_connection.py` pins every name and signature used here to flwr 1.41.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    pull_objects,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedgraft_common.errors import LinkError, MessageError
from fedgraft_common.files import write_atomically
from fedgraft_common.inflation import (
    MEBIBYTE,
    MessageLimits,
    inflate_message,
    malformed,
    object_names,
    too_large,
)
from fedgraft_common.inline import announce, is_inline, opened, place_holder
from fedgraft_common.parcel import wrap
from fedgraft_common.rebuilding import ends_of, rebuild
from fedgraft_common.remembered import Remembered

log = logging.getLogger(__name__)

_SERVER_WAITS: Final = 120.0  # seconds the server may take to complete a message it has announced
_ONCE: Final = "/flwr.proto.Fleet/PullMessages"  # hands a message out: the answer must not be lost
_AGAIN: Final = (0.1, 0.4)  # seconds before another call is made again whose connection broke


@dataclass(frozen=True, slots=True)
class Limits:
    """What a site takes from the network; more is refused before it is read.

    Attributes:
        response: bytes of one answer of the server. Flower sends arrays in pieces of 5 MiB.
        message: what one message may be.
        timeout: seconds without a byte before a call counts as failed.
    """

    response: int = 64 * MEBIBYTE
    message: MessageLimits = field(default_factory=MessageLimits)
    timeout: float = 30.0


class RunOver(Exception):  # noqa: N818 - an event, not an error
    """The run that a message belongs to has ended; nobody waits for the reply."""


@dataclass(slots=True)
class Outgoing:
    """A reply on its way: built once, so that sending it again sends the same bytes.

    Attributes:
        message: its announcement.
        run: Flower's number of the run.
        tree: the names of its objects.
        contents: bytes of each object, by its SHA-256.
    """

    message: ProtoMessage
    run: int
    tree: ObjectTree
    contents: dict[str, bytes] = field(repr=False)


class FleetConnection:
    """One site at one server, activated and kept alive until `close`.

    Args:
        address: `host:port` of the server's gateway (or, in tests, of a SuperLink).
        key: the site's node key. The server knows the public half.
        tls: for mutual TLS: trusts our CA only, and has the site's certificate and key loaded.
            None for plain HTTP, which only a loopback address gets.
        limits: what is taken from the network.
        last_node: the number this site had when it was last connected. A site that vanished counts
            as connected for a minute, and a connected site is not let in; with its number it can
            say goodbye first.

    Raises:
        LinkError: no connection, or the server does not let this site in.
    """

    def __init__(
        self,
        address: str,
        key: ec.EllipticCurvePrivateKey,
        tls: ssl.SSLContext | None,
        limits: Limits | None = None,
        last_node: int | None = None,
    ) -> None:
        self.address = address
        self.limits = limits or Limits()
        if tls is None and not _is_loopback(address):
            raise LinkError(
                "server address", address, "mutual TLS, or a loopback address in a test",
                "Join the federation with an invite: it brings the certificates.",
            )  # fmt: skip
        scheme = "http" if tls is None else "https"
        self._client = _Client(f"{scheme}://{address}", key, tls, self.limits)
        self._remembered = Remembered()
        self._received: ConfirmMessageReceivedRequest | None = None
        self._ours = ""  # id of the last request, if it is of our server's form
        self._node: Node | None = None
        self._heart: HeartbeatSender | None = None
        try:
            self._node = Node(node_id=self._activate(key, last_node))
            self._heart = HeartbeatSender(self._heartbeat)
            self._heart.start()
        except BaseException:
            self._client.close()
            raise

    @property
    def node_id(self) -> int:
        """The server's number for this site."""
        return cast(Node, self._node).node_id

    def receive(self, wait: float = 0.0) -> Message | None:
        """The next message for this site, complete, or None.

        Args:
            wait: whole seconds that the server may hold the question open until there is one. A
                server that does not know how answers at once.

        Raises:
            LinkError: the connection failed.
            MessageError: the message is damaged or too large; the server will not send it again.
            RunOver: its run ended while it was fetched.
        """
        with _told(self.address):
            self._confirm()
            self._client.wait = int(wait)
            response = self._client.PullMessages(PullMessagesRequest(node=self._node))
            if not response.messages_list:
                return None
            if not response.message_object_trees:
                raise malformed("a message without objects")
            tree = response.message_object_trees[0]
            announced = response.messages_list[0]
            run = announced.metadata.run_id
            if is_inline(announced):
                message = opened(announced, self.limits.message)
                self._ours = tree.object_id
            else:
                message = self._pull(run, tree)
                self._received = ConfirmMessageReceivedRequest(
                    node=self._node, run_id=run, message_object_id=tree.object_id
                )
        if message.metadata.run_id != run or message.metadata.dst_node_id != self.node_id:
            raise malformed("a message for another run or site")
        return message

    def prepare(self, reply: Message) -> Outgoing:
        """Turns a reply into what is sent: one message if the request is of our server's form.

        An older server of ours takes such a reply for a failed one: servers are upgraded first.
        """
        is_ours = reply.metadata.reply_to_message_id == self._ours
        if is_ours:
            name, content = place_holder(reply.metadata.reply_to_message_id)
            if (announced := announce(reply, name)) is not None:
                tree = ObjectTree(object_id=name)
                return Outgoing(announced, reply.metadata.run_id, tree, {name: content})
        if is_ours and (parcel := wrap(reply)) is not None:
            name = get_object_id(parcel)
            reply.metadata.__dict__["_message_id"] = name
            stripped = message_to_proto(remove_content_from_message(reply))
            return Outgoing(
                stripped, reply.metadata.run_id, ObjectTree(object_id=name), {name: parcel}
            )
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree = get_object_tree(reply)
            objects: dict[str, InflatableObject] = get_all_nested_objects(reply)
            contents = {name: thing.deflate() for name, thing in objects.items()}
        stripped = message_to_proto(remove_content_from_message(reply))
        return Outgoing(stripped, reply.metadata.run_id, tree, contents)

    def send(self, reply: Outgoing) -> None:
        """Sends a reply; it may have been sent before, in part or as a whole.

        Flower would also send how long the answer took. That stays here.

        Raises:
            LinkError: the connection failed; the same reply can be sent again.
            RunOver: nobody waits for it.
        """
        with _told(self.address):
            for _ in range(1 + len(_AGAIN)):
                if self._push(reply):
                    return
        raise _lost(self.address, "an object that the server would not store")

    def close(self) -> None:
        """Says goodbye, if there is anyone to hear it, and closes."""
        if self._heart is not None and self._heart.is_running:
            self._heart.stop()
        self._heart = None
        node, self._node = self._node, None
        try:
            if node is not None:
                with _told(self.address):
                    self._confirm()
                    self._client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
        except (LinkError, RunOver) as error:
            log.debug("closing: %s", error, extra={"action": "close"})
        finally:
            self._client.close()

    def __enter__(self) -> FleetConnection:
        """The connection itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()

    def _confirm(self) -> None:
        """Lets the server delete the last message; not before its reply, which somebody awaits."""
        received, self._received = self._received, None
        if received is not None:
            with suppress(RunOver), _told(self.address):
                self._client.ConfirmMessageReceived(received)

    def _push(self, reply: Outgoing) -> bool:
        """Whether the server has all of it; if not, it will say what is still missing."""
        response = self._client.PushMessages(
            PushMessagesRequest(
                node=self._node,
                messages_list=[reply.message],
                message_object_trees=[reply.tree],
            )
        )
        wanted = set(response.objects_to_push)  # what is addressed by its hash travels once
        return all(
            self._client.PushObject(
                PushObjectRequest(
                    node=self._node,
                    run_id=reply.run,
                    object_id=name,
                    object_content=content,
                    session_id=response.session_id,
                )
            ).stored
            for name, content in reply.contents.items()
            if name in wanted
        )

    def _activate(self, key: ec.EllipticCurvePrivateKey, last_node: int | None) -> int:
        request = ActivateNodeRequest(
            public_key=public_key_to_bytes(key.public_key()),
            heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL,
        )
        with _told(self.address):
            try:
                return self._client.ActivateNode(request).node_id
            except httpx.HTTPStatusError as error:
                reason = _flower_error(error.response)
                occupied = ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED
                if last_node is None or reason is None or reason.code != occupied:
                    raise
            with suppress(httpx.HTTPStatusError):  # whether it helped, the next call tells
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=last_node))
            return self._client.ActivateNode(request).node_id

    def _heartbeat(self) -> bool:
        """Whether the server heard it; Flower's sender tries again soon if it did not."""
        try:
            with _told(self.address):
                return self._client.SendNodeHeartbeat(
                    SendNodeHeartbeatRequest(
                        node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
                    )
                ).success
        except Exception as error:  # nothing may leave this thread: Flower would end the process
            log.debug("heartbeat: %s", error, extra={"action": "heartbeat"})
            return False

    def _pull(self, run: int, tree: ObjectTree) -> Message:
        """A message that comes in pieces; the fewest if it is of our form."""
        names = object_names(tree, self.limits.message)
        own = tree.object_id
        room = self.limits.message.bytes

        def pull(name: str) -> bytes:
            nonlocal room
            if (known := self._remembered.get(name)) is not None:
                return known
            request = PullObjectRequest(node=self._node, run_id=run, object_id=name)
            response = self._client.PullObject(request)
            if not response.object_found:
                raise ObjectPullError(name, "the server does not have it")
            if not response.object_available:
                raise ObjectUnavailableError(name)
            room -= len(response.object_content)
            if room < 0:
                raise too_large(self.limits.message)
            if get_object_id(response.object_content) != name:
                raise malformed("an object that does not match its SHA-256")
            self._remembered.keep(name, response.object_content)
            return response.object_content

        def pull_all(some: list[str]) -> dict[str, bytes]:
            return pull_objects(
                some, pull, max_time=_SERVER_WAITS, initial_backoff=0.02, backoff_cap=1.0
            )

        try:
            contents = pull_all(ends_of(tree))
            message = rebuild(own, contents, self.limits.message)
            self._ours = "" if message is None else own
            if message is None:
                contents |= pull_all([name for name in names if name not in contents])
                message = inflate_message(own, contents, self.limits.message)
            return message
        except ObjectPullError as error:
            raise malformed(str(error)) from None


class Dialler:
    """Makes one connection after the other, and remembers the site's number between them.

    Args:
        address: see `FleetConnection`.
        key: see `FleetConnection`.
        tls: see `FleetConnection`.
        limits: see `FleetConnection`.
        memory: a file for the number, so that a site that was killed is let in at once.
    """

    def __init__(
        self,
        address: str,
        key: ec.EllipticCurvePrivateKey,
        tls: ssl.SSLContext | None,
        limits: Limits | None = None,
        memory: Path | None = None,
    ) -> None:
        self._address = address
        self._key = key
        self._tls = tls
        self._limits = limits
        self._memory = memory
        self._node = self._remembered()

    def __call__(self) -> FleetConnection:
        """A connection.

        Raises:
            LinkError: no connection, or the server does not let this site in.
        """
        connection = FleetConnection(self._address, self._key, self._tls, self._limits, self._node)
        if connection.node_id != self._node:
            self._node = connection.node_id
            if self._memory is not None:
                write_atomically(self._memory, str(self._node).encode(), durable=False)
        return connection

    def _remembered(self) -> int | None:
        try:
            text = self._memory.read_text(encoding="ascii") if self._memory is not None else ""
            return int(text) if text else None
        except (OSError, ValueError):
            return None  # it only saves a minute


class _Headers:
    """Tells the server our Flower version; what it thinks of it is an ordinary error here."""

    def __init__(self) -> None:
        self._headers = dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Adds headers. No compression: a small answer cannot become a large one."""
        context.request.headers.update(self._headers)
        context.request.headers["accept-encoding"] = "identity"
        return call_next(context)


class _Client(FleetHttpClient):
    """Flower's client, but it follows no redirect, reads no more than the limit and tries again.

    A connection that breaks under a call need not end the session: every call but one may be made
    twice. An answer to PullMessages that was lost on the way is a message lost; then the site
    connects anew, by which the server knows that it has to ask again.
    """

    def __init__(
        self,
        url: str,
        key: ec.EllipticCurvePrivateKey,
        tls: ssl.SSLContext | None,
        limits: Limits,
    ) -> None:
        super().__init__(
            url,
            interceptors=[_Headers(), NodeAuthHttpInterceptor(key, key.public_key())],
            verify=tls if tls is not None else True,
            timeout=limits.timeout,
        )
        self.wait = 0  # seconds that the next PullMessages may be held
        self._client.follow_redirects = False  # an update goes to the server and nowhere else
        self._limit = limits.response

    def _unary_unary(self, **call: Any) -> Any:
        for wait in () if call["rpc_method"] == _ONCE else _AGAIN:
            try:
                return super()._unary_unary(**call)
            except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
                log.debug("%s: %s", call["rpc_method"], error, extra={"action": "retry"})
                time.sleep(wait)
        return super()._unary_unary(**call)  # each attempt is built and signed anew

    def _send(self, context: ProtobufRequestContext, *, stream: bool = False) -> httpx.Response:
        if self.wait and context.rpc_method == _ONCE:
            context.request.headers["prefer"] = f"wait={self.wait}"
        response = super()._send(context, stream=True)
        if response.is_closed:
            return response  # an error; Flower has read the beginning of its text
        context.request.extensions["timeout"]["read"] = self._client.timeout.read
        content = bytearray()
        try:
            for chunk in response.iter_raw():
                content += chunk
                if len(content) > self._limit:
                    raise MessageError(
                        "server's answer", "more bytes", f"at most {self._limit}",
                        "The message was ignored; compare the versions of server and site.",
                    )  # fmt: skip
        finally:
            response.close()
        return httpx.Response(response.status_code, content=bytes(content), request=context.request)


@contextmanager
def _told(address: str) -> Iterator[None]:
    """Turns what HTTP and Flower report into our own errors."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        reason = _flower_error(error.response)
        if reason is not None and reason.code == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED:
            raise RunOver from None
        raise _refused(address, error.response) from None
    except (httpx.HTTPError, OSError) as error:
        raise _lost(address, f"{type(error).__name__}: {error}") from None
    except ValueError as error:  # Flower's word for an answer that is no protobuf
        raise _lost(address, f"an unreadable answer ({error})") from None


def _flower_error(response: httpx.Response) -> FlowerError | None:
    try:
        return FlowerError.from_json(response.text)
    except (ValueError, RecursionError):  # brackets without end
        return None


def _refused(address: str, response: httpx.Response) -> LinkError:
    found = f"HTTP {response.status_code}"
    if (reason := _flower_error(response)) is not None:
        found += f", {reason.message} (code {reason.code})"
    return LinkError(
        f"server {address}", found, "a server that lets this site in",
        "If it lasts, ask the server's operator whether this site is registered and not revoked.",
    )  # fmt: skip


def _lost(address: str, found: str) -> LinkError:
    return LinkError(
        f"server {address}", found, "a connection",
        "If it lasts, check the network, the firewall and the certificates.",
    )  # fmt: skip


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")
