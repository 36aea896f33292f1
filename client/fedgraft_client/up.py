"""`fedgraft site up`: site file and identity in, a resident daemon out.

    site.toml -> ledger, records, policy -> Site --+
    identity  -> mutual TLS, node key, operator key +-> Daemon (asks the gateway, answers here)
    gateway's backbone service -> pinned directory -+

Nothing that arrives is code: a plan signed by the federation's operator, and tensors.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import gc
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fedgraft_client.app import client_app
from fedgraft_client.backbone_fetch import Credentials, plan_backbone
from fedgraft_client.blob_store import BlobStore
from fedgraft_client.connection import Dialler, FleetConnection
from fedgraft_client.daemon import Abandoned, Daemon, Pace
from fedgraft_client.identity import Identity, load_identity, renew_if_due
from fedgraft_client.monitoring import monitored
from fedgraft_client.opening import open_site
from fedgraft_client.site import Site
from fedgraft_client.site_file import load_site_file
from fedgraft_common.certificates import is_renewal_due, read_certificate
from fedgraft_common.errors import IdentityError
from fedgraft_common.plan import Plan

log = logging.getLogger(__name__)
RENEWAL = 3600.0  # seconds between two attempts to renew a certificate
BACKBONES = 50 * 2**30
"""Bytes of fetched backbones that a site keeps; those in use stay whatever they weigh."""


class Link:
    """Connects with the certificate that is valid now, renewed when a third of its time is left.

    Args:
        identity: of the site.
        memory: file for Flower's number of the site.
        now: the clock, with time zone.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        identity: Identity,
        memory: Path,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._identity = identity
        self._memory = memory
        self._now = now
        self._clock = clock
        self._next_look = 0.0

    def __call__(self) -> FleetConnection:
        """A connection.

        Raises:
            LinkError: no connection, or the server does not let this site in.
            IdentityError: the certificate has expired.
        """
        self._next_look = self._clock() + RENEWAL
        try:
            renewed = renew_if_due(self._identity, self._now)
        except IdentityError as error:  # there are weeks left to try it again
            log.warning("certificate not renewed: %s", error, extra={"action": "renew"})
        else:
            if renewed is not None:
                log.info("certificate renewed until %s", renewed.expires, extra={"action": "renew"})
        self._identity = now = load_identity(self._identity.directory, self._now)
        dial = Dialler(
            now.facts.gateway, now.node_private_key, now.ssl_context(), memory=self._memory
        )
        return dial()

    def is_outdated(self) -> bool:
        """Whether to connect anew, for a new certificate; looks at it once an hour."""
        if self._clock() < self._next_look:
            return False
        self._next_look = self._clock() + RENEWAL
        present = read_certificate(self._identity.directory / "site.pem")
        return is_renewal_due(present, self._now())


@contextlib.contextmanager
def backbones(identity: Identity, directory: Path) -> Iterator[Callable[[Plan], Path | None]]:
    """Fetches the backbones of plans, and keeps those in use from being evicted.

    Args:
        identity: of the site.
        directory: where they are kept.

    Yields:
        Where a plan's backbone lies, once it has been fetched and checked; None if the plan says.
    """
    store = BlobStore(directory, BACKBONES)
    at = identity.directory
    with contextlib.ExitStack() as pinned:

        def locate(plan: Plan) -> Path | None:
            # Read anew: the certificate is another one after each renewal.
            credentials = Credentials.from_files(at / "ca.pem", at / "site.pem", at / "site.key")
            return pinned.enter_context(
                plan_backbone(
                    plan.backbone,
                    identity.facts.backbone,
                    credentials,
                    identity.operator_key,
                    store,
                )
            )

        yield locate


@contextlib.contextmanager
def resident(
    site_file: Path,
    open_with: Callable[..., Site] = open_site,
    pace: Pace | None = None,
) -> Iterator[Daemon]:
    """A daemon, ready to run, with everything it holds open.

    Args:
        site_file: the site's configuration; its identity is in `home/identity`.
        open_with: makes the Site; a test of the whole federation passes another.
        pace: how often the daemon asks.

    Raises:
        FedgraftError: the site file, the data, the ledger or the identity cannot be used.
    """
    file, base = load_site_file(site_file), site_file.parent
    home = base / file.home
    identity = load_identity(home / "identity")
    with backbones(identity, home / "backbones") as locate:
        site = open_with(
            site_file,
            operator_key=identity.operator_key,
            locate=locate,
            membership=identity.membership,
        )
        try:
            link = Link(identity, home / "node")
            daemon = Daemon(
                file.name,
                link,
                client_app(lambda _: site),
                pace=pace or Pace(),
                is_outdated=link.is_outdated,
            )
            with monitored(daemon, file, home / "status.json", site.store.ledger.spent):
                yield daemon
        finally:
            site.store.close()


def run_until_stopped(site_file: Path, open_with: Callable[..., Site] = open_site) -> int:
    """A daemon until SIGTERM or SIGINT; see `resident`.

    Returns:
        The process' exit code: 130 if a second SIGINT abandoned a round, else 0.
    """
    with resident(site_file, open_with) as daemon, daemon.signals():
        # Cyclic garbage waits until it is a quarter of all that lives; what is loaded by now counts
        # no longer, or it would gather for thousands of rounds.
        gc.freeze()
        gc.collect()
        try:
            daemon.run()
        except Abandoned:
            return 130
        finally:
            gc.unfreeze()
    return 0
