"""Set-ups of secure aggregation, seen from the server: who takes part in the rounds to come.

Three exchanges: the sites' keys, their shares of secrets for each other, and whether these can be
used. Whoever fails in one is left out of the next attempt. The server cannot look into a share that
is encrypted for somebody else, so of a dealer and a site that reports it either may be at fault: a
dealer that more sites report than may work with the server is left out, for the rest of the run;
with fewer reports, those who report.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from fedgraft_common.errors import IdentityError, MessageError
from fedgraft_common.messages import SecureStep
from fedgraft_common.secure_aggregation import SecureServer, check_advertisement
from fedgraft_common.secure_messages import (
    Acceptance,
    Advertisement,
    Sharing,
    Terms,
    from_bits,
)
from fedgraft_common.site_signature import Trust
from fedgraft_server.secure_faults import SecureFaults
from fedgraft_server.secure_questions import SecureQuestions, noted, too_few

log = logging.getLogger(__name__)
ATTEMPTS = 10  # set-ups in a row; each leaves out the sites that failed in those before

Registered = Callable[[bytes], tuple[str, int | None]]
"""A certificate (DER) to its site's name and node id; raises IdentityError if it is not live."""


@dataclass(slots=True)
class SetUp:
    """A complete set-up.

    Attributes:
        server: its state machine.
        nodes: node id of each site of the roster.
        delivered: nodes that have taken their shares.
    """

    server: SecureServer
    nodes: dict[str, int]
    delivered: set[int] = field(default_factory=set)

    @property
    def names(self) -> dict[int, str]:
        """Site of each node."""
        return {node: name for name, node in self.nodes.items()}


class SecureSetUps:
    """Makes the set-ups of one run.

    Args:
        terms: of a new set-up from a round on.
        questions: asks sites.
        grid: knows the run's nodes.
        trust: whose certificates count, now.
        faults: who is left out; dealers that are found are added.
        registered: which node is which site; None: the certificate alone says so.

    Attributes:
        refusing: sites, or nodes that have not named themselves yet, that refused the newest terms.
    """

    def __init__(
        self,
        terms: Callable[[int], Terms],
        questions: SecureQuestions,
        grid: Grid,
        trust: Callable[[], Trust],
        faults: SecureFaults,
        registered: Registered | None,
    ) -> None:
        self._terms = terms
        self._questions = questions
        self._grid = grid
        self._trust = trust
        self._faults = faults
        self._registered = registered
        self._names: dict[int, str] = {}
        self.refusing: list[str] = []

    def agree(self, first: int) -> SetUp | None:
        """A complete set-up from a round on; None if sites have trained that round already.

        Raises:
            MessageError: too few sites; names those that were left out, and why.
        """
        out = dict(self._faults.out)  # site to reason
        absent: dict[str, str] = {}
        reports: dict[str, set[str]] = defaultdict(set)  # dealer to who cannot use its shares
        for attempt in range(ATTEMPTS):
            terms, trust = self._terms(first), self._trust()
            offers, refused = self._advertise(terms, trust, first)
            if not attempt and len(offers) < terms.needed <= len(offers) + len(refused):
                return None
            if not attempt and len(offers.keys() - out) < terms.needed <= len(offers):
                log.warning("trying again with %s", sorted(out), extra={"action": "set-up"})
                out = {}  # it does not work without them, and they may have been mended
            setup = SetUp(SecureServer(terms, trust), {})
            for name in sorted(offers.keys() - out):
                node, advertisement = offers[name]
                with noted(SecureStep.ADVERTISE, first, node):
                    setup.server.add_advertisement(advertisement)
                    setup.nodes[name] = node
            if len(setup.nodes) < terms.needed:
                told = f" ({'; '.join(out.values())})" if out else ""
                raise too_few(f"set-up{told}", len(setup.nodes), terms.needed)
            failed = self._share(setup, first)
            complaints = [] if failed else self._deliver(setup, first, failed)
            if not failed and not complaints:
                facts = {"action": "set-up", "round": first}
                log.info("secure aggregation of %d sites", len(setup.nodes), extra=facts)
                return setup
            for reporter, dealer in complaints:
                reports[dealer].add(reporter)
            absent |= failed
            out = self._judge(reports, terms.colluders) | absent
            log.warning(
                "a new set-up: %s", "; ".join(out.values()),
                extra={"action": "set-up", "round": first},
            )  # fmt: skip
        raise too_few(f"set-up ({'; '.join(out.values())})", 0, terms.needed)

    def _advertise(
        self, terms: Terms, trust: Trust, first: int
    ) -> tuple[dict[str, tuple[int, Advertisement]], set[int]]:
        """Node and keys of each site that has a right to its name; nodes that refuse the terms."""
        asked = dict.fromkeys(self._grid.get_node_ids(), terms.to_bytes())
        said = self._questions.ask(SecureStep.ADVERTISE, first, asked)
        offers: dict[str, tuple[int, Advertisement]] = {}
        for node, answer in said.answers.items():
            with noted(SecureStep.ADVERTISE, first, node):
                offered = Advertisement.from_bytes(answer)
                if self._registered is not None:
                    _check_registered(self._registered(offered.certificate), offered.site, node)
                check_advertisement(offered, terms, trust)
                if offers.setdefault(offered.site, (node, offered))[0] != node:
                    raise IdentityError(
                        f"node {node}", f"site {offered.site}, a second time",
                        "one node for each site", "Somebody may be posing as that site.",
                    )  # fmt: skip
        self._names |= {node: name for name, (node, _) in offers.items()}
        self.refusing = [self._names.get(node, f"node {node}") for node in sorted(said.refused)]
        return offers, said.refused

    def _share(self, setup: SetUp, first: int) -> dict[str, str]:
        """Has the roster signed; returns who has not, and why."""
        message = setup.server.close_roster().to_bytes()
        asked = dict.fromkeys(setup.nodes.values(), message)
        for node, answer in self._questions.ask(SecureStep.SHARE, first, asked).answers.items():
            with noted(SecureStep.SHARE, first, node):
                sharing = Sharing.from_bytes(answer)
                _check_name(sharing.site, setup.names[node])
                setup.server.add_sharing(sharing)
        return {name: f"{name} sent no shares" for name in setup.server.missing}

    def _deliver(self, setup: SetUp, first: int, failed: dict[str, str]) -> list[tuple[str, str]]:
        """Hands out the shares; one that is away gets them with its first round.

        Args:
            setup: with everybody's shares.
            first: round.
            failed: who has not taken them, and why, is added to it.

        Returns:
            Pairs (site, dealer whose shares it cannot use).
        """
        server, names = setup.server, setup.names
        asked = {node: server.delivery(name).to_bytes() for node, name in names.items()}
        said = self._questions.ask(SecureStep.ACCEPT, first, asked)
        complaints: list[tuple[str, str]] = []
        for node in said.answers.keys() | said.refused:
            failed[names[node]] = f"{names[node]} did not take its shares"
        for node, answer in said.answers.items():
            with noted(SecureStep.ACCEPT, first, node):
                found = Acceptance.from_bytes(answer)
                unusable = from_bits(found.unusable, len(server.roster))
                if found.roster != server.roster.digest:
                    raise MessageError("roster", "another", "the one it signed", "It is left out.")
                complaints += [(names[node], server.roster.names[n]) for n in sorted(unusable)]
                if not unusable:
                    setup.delivered.add(node)
                del failed[names[node]]
        return complaints

    def _judge(self, reports: Mapping[str, set[str]], colluders: int) -> dict[str, str]:
        """Whom to leave out, and why: a dealer that more sites report than may lie, else them."""
        before = dict(self._faults.out)
        out: dict[str, str] = {}
        for dealer, reporters in reports.items():
            if len(reporters) > colluders:
                told = ", ".join(sorted(reporters))
                self._faults.out[dealer] = f"{dealer} dealt shares that {told} cannot use"
            else:
                out |= {name: f"{name} cannot use the shares of {dealer}" for name in reporters}
        if self._faults.out != before:
            self._faults.write()
        return out | self._faults.out


def _check_registered(found: tuple[str, int | None], name: str, node: int) -> None:
    if found != (name, node):
        raise IdentityError(
            f"node {node}", f"keys of site {name}", f"those of the site that node is ({found[0]})",
            "Somebody may be posing as that site; it was left out. Tell the site.",
        )  # fmt: skip


def _check_name(found: str, expected: str) -> None:
    if found != expected:
        raise MessageError("site", found, expected, "The message was ignored.")
