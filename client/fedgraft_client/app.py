"""A site as a Flower ClientApp: a plain function from a request message to a reply message.

The same app answers in a simulation (in-process or on Ray) and in production.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedgraft_client.site import Site


def client_app(site_for: Callable[[Context], Site]) -> ClientApp:
    """The app of the site (or, in a simulation, the sites) in this process.

    Args:
        site_for: finds the site that a message is for.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return site_for(context).answer(message)

    return app
