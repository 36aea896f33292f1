"""A site's part in secure aggregation, with its memory: nothing leaves that is not on the disk.

The protocol is `fedgraft_common.secure_aggregation`. Its state lives in the site's ledger, whose
chain and witness notice an older copy: a site that had forgotten what it told could be asked again
about another set of survivors. The state after a masked input is part of the round's commit, and
the state after any other message is written with that message's hash, before it leaves.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fedgraft_client.ledger import Ledger
from fedgraft_client.peers import Peers
from fedgraft_common.errors import CheckpointError, MessageError
from fedgraft_common.masks import Vector
from fedgraft_common.messages import SecureStep
from fedgraft_common.plan import Plan
from fedgraft_common.secure_aggregation import SecureSite, SiteState
from fedgraft_common.secure_messages import Acceptance, Delivery, Question, Roster, Terms, to_bits
from fedgraft_common.secure_terms import secure_terms
from fedgraft_common.site_signature import SiteKey, Trust


@dataclass(frozen=True, slots=True)
class Membership:
    """What a site needs to take part.

    Attributes:
        key: what it signs with.
        trust: whose certificates count, now.
    """

    key: SiteKey
    trust: Callable[[], Trust]


class SecureMember:
    """One site in the secure aggregation of one plan.

    Args:
        plan: the run.
        length: values in the adapter.
        bits: 32 or 64: sums are modulo 2^bits.
        ledger: of the site.
        membership: key and trust.
        peers: whom the site knows.
    """

    def __init__(
        self,
        plan: Plan,
        length: int,
        bits: int,
        ledger: Ledger,
        membership: Membership,
        peers: Peers,
    ) -> None:
        self._plan = plan
        self._length = length
        self._bits = bits
        self._ledger = ledger
        self._membership = membership
        self._peers = peers
        self._kept: tuple[SiteState, SecureSite] | None = None

    def answer(self, step: SecureStep, number: int, content: bytes) -> bytes:
        """One step beside a round's own.

        Args:
            step: which.
            number: of the round.
            content: what the server sent.

        Returns:
            The site's message; the same for the same question.

        Raises:
            MessageError: the protocol does not allow it now, or at all.
            IdentityError: a peer's certificate does not count, or too many peers are strangers.
        """
        said: dict[str, Any] = {}
        if step is SecureStep.ADVERTISE:
            site = self._begun(Terms.from_bytes(content))
            message = site.advertise().to_bytes()
        elif step is SecureStep.SHARE:
            site, roster = self._site(), Roster.from_bytes(content)
            self._kept = None  # what is in memory counts once it is stored, not before
            message = site.share(roster, self._membership.trust()).to_bytes()
            said = self._peers.meet(roster, site.name, site.terms.colluders)
        elif step is SecureStep.ACCEPT:
            site, delivery = self._site(), Delivery.from_bytes(content)
            unusable = site.unusable(delivery)
            if not unusable:
                site.accept(delivery)
            bits = to_bits(unusable, len(delivery.signatures))
            message = Acceptance(delivery.roster, bits).to_bytes()
        else:
            site = self._site()
            answer = site.unmask(Question.from_bytes(content))
            message, said = answer.to_bytes(), {"statement": answer.statement.to_bytes().hex()}
        self._keep(site, step, number, message, said)
        return message

    def accept(self, number: int, content: bytes) -> None:
        """Takes the peers' shares with a round's request, if the site has missed that step.

        Raises:
            MessageError: they are not what this site's roster says.
        """
        site = self._site()
        if not site.ready:
            site.accept(Delivery.from_bytes(content))
            self._keep(site, SecureStep.ACCEPT, number, b"")

    def may_leave(self, digest: str) -> bool:
        """Whether the ledger holds a message with this SHA-256."""
        return self._ledger.may_leave(self._plan.hash, digest)

    def check(self, number: int) -> None:
        """Refuses a round that could not be masked, before it is charged.

        Raises:
            MessageError: the set-up is not complete or not for this round; or the round had its
                input, or its survivors were named.
        """
        site = self._site()
        terms = site.terms
        if not site.ready or not terms.first_round <= number <= terms.last_round:
            raise MessageError(
                "secure aggregation: round", number,
                f"{terms.first_round} to {terms.last_round}, after a complete set-up",
                "Nothing was spent. The server is ahead of this site: let it start a new set-up.",
            )  # fmt: skip
        site.check_open(number)

    def mask(self, number: int, values: Vector, context: bytes) -> tuple[Vector, SiteState]:
        """A round's masked input, and the state to store in the same transaction.

        Raises:
            MessageError: the set-up is not complete, or not for this round.
        """
        site = self._site()
        self._kept = None  # what is in memory counts once it is stored, not before
        masked = site.mask(number, values, context)
        return masked, site.save()

    def _begun(self, terms: Terms) -> SecureSite:
        mine = secure_terms(self._plan, self._length, self._bits, terms.session, terms.first_round)
        if terms != mine:
            raise MessageError(
                "secure aggregation: terms", "others", "those that follow from the plan",
                "Server and site run different versions, or the server is not honest.",
            )  # fmt: skip
        state = self._ledger.secure_state(self._plan.hash)
        if state is not None:
            # A state that cannot be read, as after joining again with a new key, is no state.
            with suppress(CheckpointError):
                site = self._restored(state)
                if site.terms == terms:
                    return site
        last = self._ledger.last_trained(self._plan.hash)
        return SecureSite(terms, self._membership.key, secrets.token_bytes(32), last)

    def _site(self) -> SecureSite:
        state = self._ledger.secure_state(self._plan.hash)
        if state is None:
            raise MessageError(
                "secure aggregation: message", "one for a later step", "the terms first",
                "The server is ahead of this site: let it start a new set-up.",
            )  # fmt: skip
        return self._restored(state)

    def _restored(self, state: SiteState) -> SecureSite:
        """Parsed once; in a simulation another process may have gone on since."""
        if self._kept is None or self._kept[0] != state:
            self._kept = state, SecureSite.restore(state, self._membership.key)
        return self._kept[1]

    def _keep(
        self,
        site: SecureSite,
        step: str,
        number: int,
        message: bytes,
        said: dict[str, Any] | None = None,
    ) -> None:
        state = site.save()
        self._kept = None
        reply = hashlib.sha256(message).hexdigest()
        known = self._ledger.may_leave(self._plan.hash, reply)
        complains = step == SecureStep.ACCEPT and not known  # nothing was taken
        if complains or state != self._ledger.secure_state(self._plan.hash):
            self._ledger.keep_secure(self._plan.hash, number, step, reply, state, said)
        elif not known:
            raise MessageError(
                "secure aggregation: message", reply[:16], "one that the ledger holds",
                "The site's state is inconsistent; start a new set-up.",
            )  # fmt: skip
        self._kept = state, site
