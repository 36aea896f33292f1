"""A site as a Flower ClientApp: a plain function from a request message to a reply message.

The same app answers in a simulation (in-process or on Ray) and in production.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedgraft_client.site import Site
from fedgraft_common.messages import Status, write_counts, write_reply

log = logging.getLogger(__name__)


def client_app(site_for: Callable[[Context], Site]) -> ClientApp:
    """The app of the site (or, in a simulation, the sites) in this process.

    Args:
        site_for: finds the site that a message is for.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            site = site_for(context)
        except Exception:  # Flower would send its text to the server
            log.exception("there is no site for this message")
            return write_reply(message, 0, Status.FAILED)
        return site.answer(message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        try:
            site = site_for(context)
        except Exception:
            log.exception("there is no site for this message")
            return write_counts(message, 0, Status.FAILED)
        return site.evaluate(message)

    return app
