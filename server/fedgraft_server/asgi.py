"""What the gateway and the joining service share of ASGI: bodies with a limit, JSON answers.

Plain ASGI instead of a web framework: the whole surface is a dozen exact paths.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, Final

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

BODY_TIMEOUT: Final = 30.0
"""Seconds without a byte after which a request body is given up."""


class BodyTooLargeError(Exception):
    """More bytes than allowed."""


class BodyLostError(Exception):
    """The client went away, or sent nothing for too long."""


async def body_chunks(receive: Receive, limit: int) -> AsyncIterator[bytes]:
    """The request's body as it arrives.

    Args:
        receive: ASGI's.
        limit: bytes in all; checked before a chunk is handed on.
    """
    total = 0
    more = True
    while more:
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                event = await receive()
        except TimeoutError:
            raise BodyLostError from None
        if event["type"] == "http.disconnect":
            raise BodyLostError
        chunk = event.get("body", b"")
        more = event.get("more_body", False)
        total += len(chunk)
        if total > limit:
            raise BodyTooLargeError
        if chunk:
            yield chunk


async def whole_body(receive: Receive, limit: int) -> bytes:
    """The request's body in one piece; see `body_chunks`."""
    return b"".join([chunk async for chunk in body_chunks(receive, limit)])


async def answer(
    send: Send, status: int, content: object, headers: Headers | None = None, last: bool = False
) -> None:
    """Sends JSON.

    Args:
        send: ASGI's.
        status: HTTP's.
        content: anything JSON can hold.
        headers: more of them.
        last: close the connection, because what else arrives on it is not wanted.
    """
    body = json.dumps(content).encode()
    head: Headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *(headers or []),
    ]
    if last:
        head.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


async def refuse(
    send: Send, status: int, reason: str, headers: Headers | None = None, last: bool = False
) -> None:
    """Sends `{"error": reason}`; see `answer`."""
    await answer(send, status, {"error": reason}, headers, last)
