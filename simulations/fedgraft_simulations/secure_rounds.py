"""Secure aggregation of many sites in one process: the production state machines, no network.

Both ends of every pair compute their masks, as they do in production; what a simulation saves is
only the way between them. Absences are part of the schedule, so that failures can be studied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from enum import StrEnum

from fedgraft_common.masks import Vector
from fedgraft_common.secure_aggregation import SecureRound, SecureServer, SecureSite, Total
from fedgraft_common.secure_messages import Roster, Statement, Terms
from fedgraft_common.secure_transcript import Transcript
from fedgraft_common.site_signature import SiteKey, Trust


class Step(StrEnum):
    """Before which a site goes away; in a round it is back in the next one."""

    ADVERTISE = "advertise"
    SHARE = "share"
    ACCEPT = "accept"
    MASK = "mask"
    UNMASK = "unmask"


class SecureRounds:
    """The server and all sites of one set-up.

    Attributes:
        sites: by name; those that advertised.
        server: the set-up's.
        statements: what the sites have signed so far.
    """

    def __init__(
        self,
        terms: Terms,
        keys: Mapping[str, SiteKey],
        trust: Trust,
        secret: Callable[[str], bytes],
        absent: Mapping[str, Step] | None = None,
    ) -> None:
        """Carries the set-up out.

        Args:
            terms: of the set-up.
            keys: what each site signs with.
            trust: in the keys' CA.
            secret: gives each site its 32 bytes, never the same twice.
            absent: sites that go away before a step of the set-up.

        Raises:
            AggregationError: too few sites advertise, or one of the roster sends no shares.
        """
        absent = absent or {}
        self.terms = terms
        self._keys = keys
        self.server = SecureServer(terms, trust)
        self.sites: dict[str, SecureSite] = {}
        self.statements: list[Statement] = []
        for name, key in keys.items():
            if absent.get(name) is not Step.ADVERTISE:
                self.sites[name] = SecureSite(terms, key, secret(name))
                self.server.add_advertisement(self.sites[name].advertise())
        self.server.close_roster()
        for name, site in self.sites.items():
            if absent.get(name) is not Step.SHARE:
                self.server.add_sharing(site.share(self.roster, trust))
        for name, site in self.sites.items():
            delivery = self.server.delivery(name)
            if absent.get(name) is not Step.ACCEPT:
                site.accept(delivery)

    @property
    def roster(self) -> Roster:
        """Who takes part."""
        return self.server.roster

    def sum(
        self,
        number: int,
        inputs: Mapping[str, Vector],
        context: bytes = b"",
        absent: Mapping[str, Step] | None = None,
    ) -> Total:
        """One round.

        Args:
            number: of the round.
            inputs: each site's vector; a site without one gives none.
            context: what the sites computed on; hashed here.
            absent: sites that go away before a step of the round.

        Raises:
            AggregationError: too few inputs or answers; nothing was revealed.
        """
        absent = absent or {}
        hashed = hashlib.sha256(context).digest()
        round_ = SecureRound(self.terms, self.roster, number, hashed)
        for name, values in inputs.items():
            site = self.sites[name]
            if absent.get(name) is not Step.MASK and site.ready:
                round_.add_input(name, site.mask(number, values, hashed))
        question = round_.close()
        for name, site in self.sites.items():
            if name not in absent and site.ready:
                round_.add_answer(site.unmask(question))
        self.statements.extend(round_.statements)
        return round_.total()

    def restart(self, name: str) -> None:
        """A site is killed and comes back with the state it saved."""
        self.sites[name] = SecureSite.restore(self.sites[name].save(), self._keys[name])

    def transcript(self) -> Transcript:
        """What an auditor gets."""
        return Transcript(self.terms, self.roster, self.server.signatures(), tuple(self.statements))
