"""A site as a Flower ClientApp: a plain function from a request message to a reply message.

The same app answers in a simulation (in-process or on Ray) and in production. A request that a
network carried has its adapter packed into one array; the reply then is packed too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedgraft_client.egress import guard_package
from fedgraft_client.site import Site
from fedgraft_common.errors import MessageError
from fedgraft_common.messages import (
    ADAPTER,
    SecureStep,
    Status,
    write_counts,
    write_reply,
    write_secure,
)
from fedgraft_common.packing import is_packed, pack, unpack

log = logging.getLogger(__name__)
Ask = Callable[[Site, Message], Message]
Refuse = Callable[[Message, int, Status], Message]


def client_app(site_for: Callable[[Context], Site]) -> ClientApp:
    """The app of the site (or, in a simulation, the sites) in this process.

    Args:
        site_for: finds the site that a message is for.
    """
    app = ClientApp(mods=[packed])

    def answer(message: Message, context: Context, ask: Ask, refuse: Refuse) -> Message:
        try:
            site = site_for(context)
        except Exception:  # Flower would send its text to the server
            log.exception("there is no site for this message", extra={"action": "fail"})
            return refuse(message, 0, Status.FAILED)
        return ask(site, message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, context, Site.answer, write_reply)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, context, Site.evaluate, write_counts)

    @app.query()
    def keep_final(message: Message, context: Context) -> Message:
        return answer(message, context, Site.keep_final, write_reply)

    for step in SecureStep:

        @app.query(step.value)
        def secure(message: Message, context: Context, step: SecureStep = step) -> Message:
            def ask(site: Site, message: Message) -> Message:
                return site.secure(step, message)

            return answer(message, context, ask, write_secure)

    return app


def packed(message: Message, context: Context, answer: Callable[..., Message]) -> Message:
    """Flower mod: unpacks a packed request, and packs its reply."""
    content = message.content.array_records if message.has_content() else {}
    adapter = content.get(ADAPTER)
    if adapter is None or not is_packed(adapter):
        return answer(message, context)
    try:
        message.content[ADAPTER] = unpack(adapter)
    except MessageError as error:
        log.warning("refused a message: %s", error, extra={"action": "refuse"})
        return write_reply(message, 0, Status.MESSAGE)
    reply = answer(message, context)
    if reply.has_content() and ADAPTER in reply.content.array_records:
        plain = reply.content.array_records[ADAPTER]
        reply.content[ADAPTER] = guard_package(pack(plain), plain)
    return reply
