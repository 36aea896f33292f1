"""The site's ClientApp for a stock `flower-supernode`: the slower, less guarded way.

A SuperNode starts a process for every message, so nothing stays warm, and it runs whatever the
run's bundle names. With `fedgraft site up` neither happens. The SuperNode's own configuration says
which site this is:

    flower-supernode --node-config 'site="my_module:open_site"' ...

`open_site` takes Flower's Context and returns a `fedgraft_client.site.Site`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module

from flwr.app import Context

from fedgraft_client.app import client_app
from fedgraft_client.site import Site
from fedgraft_common.errors import LinkError


def site_of_this_node(context: Context) -> Site:
    """The site that the SuperNode's configuration names.

    Raises:
        LinkError: it names none, or nothing that can be loaded.
    """
    return _opener(str(context.node_config.get("site", "")))(context)


@lru_cache(maxsize=1)
def _opener(name: str) -> Callable[[Context], Site]:
    module, _, function = name.partition(":")
    try:
        opener: Callable[[Context], Site] = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError):
        raise LinkError(
            "node-config site", name, "MODULE:FUNCTION that returns a Site",
            "Correct --node-config of flower-supernode, or use `fedgraft site up`.",
        ) from None  # fmt: skip
    return opener


app = client_app(site_of_this_node)
