"""Secure aggregation, both sides in one long file, so that it can be held against the paper.

The server learns the sum of the sites' integer vectors and nothing else. The protocol is that of
Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017
(figure 4: double masking, Shamir shares, signed keys), with two changes: its first two exchanges
are done once for many rounds, and its consistency check costs no exchange. Both machines are pure:
messages in, messages out; randomness, keys and trust are passed in; states go to bytes and back.

    set-up, once    SecureSite.advertise      -> SecureServer.add_advertisement   figure 4, round 0
                    SecureServer.roster       -> SecureSite.share
                    SecureSite.share          -> SecureServer.add_sharing                   round 1
                    SecureServer.delivery     -> SecureSite.accept, or .unusable
    round t         SecureSite.mask           -> SecureRound.add_input                      round 2
                    SecureRound.close         -> SecureSite.unmask
                    SecureSite.unmask         -> SecureRound.add_answer                     round 4
                    SecureRound.total

A site u has for each round t an X25519 key pair (sk, pk) and a self-mask secret b, all derived from
one secret that never leaves; every site holds a Shamir share of every sk and b. In round t

    y_u = x_u + PRG(b_u) + sum_{v > u} PRG(k_uv) - sum_{v < u} PRG(k_uv)    mod 2^bits
    k_uv = HKDF(X25519(sk_u, pk_v); roster, round, u, v, context)

and each site then gives, for the survivors S that the server names, its share of b_v for v in S and
its share of sk_v for v not in S. The context is a hash of what the site was asked to compute on: if
the server gives two sites different models, their masks do not cancel (Pasquini, Francati and
Ateniese, "Eluding Secure Aggregation in Federated Learning via Model Inconsistency", CCS 2022).

What is guaranteed. n sites are in the roster, d may be missing in a round, c work with the server,
t = n - d shares give a secret, and d (d + 1) + c < n. In each round, whatever the server and those
c sites do, they learn nothing about the inputs of honest sites but at most one sum, over at least
n - d - c of them, chosen without knowing any input. (Random oracle for the hashes, gap
Diffie-Hellman for X25519, ChaCha20 and HKDF as pseudo-random functions, unforgeable signatures: the
assumptions of the paper's theorem 6.5.) An honest site signs one roster; gives one masked input in
a round; answers one S in a round, with |S| >= n - d; so never gives shares of both secrets of
anybody. A site of the plan that is missing from the roster counts as missing: n and d are both
smaller by one then, t is the same, and the condition still holds.

Proof of what the missing exchange needs. All honest sites that go on have the same roster, because
each has seen the signatures of all its members on it. Fix a round; let H be the honest sites,
|H| >= n - c. A secret is known to the adversary only with the answers of t - c honest sites; with
fewer its shares say nothing. Each honest site answers at most once and excludes at most d sites.

  1. Nobody's b and sk are both known: that takes 2 (t - c) different honest answers out of at most
     n - c, that is n <= 2 d + c. But n > d (d + 1) + c >= 2 d + c for d >= 1, and n > c for d = 0.
     (With c' < c colluders: 2 (n - d - c') <= n - c', n <= 2 d + c', the same.)
  2. Let D be the honest sites whose sk is known. Each was excluded by t - c honest sites, all
     together exclude at most (n - c) d times, so |D| <= (n - c) d / (n - d - c), which is
     d + d^2 / (n - d - c), below d + 1 because d^2 < n - d - c. Hence |D| <= d. (Fewer colluders
     make the bound smaller.)
  3. Let N = H without D, so |N| >= n - c - d, and B the sites of N that gave an input and whose b
     is known. The input of every other honest site stays under its own PRG(b), for D by 1. If N
     has a member w outside B, then every v in B has a mask PRG(k_vw) that is unknown, because
     neither sk is, and that is in no other vector but y_w, which PRG(b_w) hides if it was given at
     all: nothing is learned. If B = N, the masks inside N form a complete graph of unknown keys,
     which cancel in the sum over N and in no other combination (the paper's lemma 6.1): exactly
     that sum is learned; and nothing if two sites of N had different contexts.

Mixed lists, where S differs from site to site, are thus allowed to the server and gain it nothing;
a site none of whose secrets is known only hides its own input, and with it everybody's. The order
in which answers and inputs come does not enter. The condition on d and c is checked by `Terms`.

Not promised: that a sum comes out. More than d sites stop a round by staying away, one by dealing
wrong shares at set-up, and few by answering with wrong ones (`_TRIES`); and a site can add what it
likes to the sum by its input. Not promised either: anything about a server that also holds the CA's
key and can invent sites or take their names, beyond the c of them that sites who know each other's
keys let pass (`fedgraft_client.peers`); and secrecy of past rounds once states are stolen: a site's
own state opens its own inputs, those of n - d sites everybody's.
Reasons and attacks: `deploy/decisions/0005-secure-aggregation.md`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, islice
from typing import Final, NoReturn, Self

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedgraft_common import shamir
from fedgraft_common.errors import AggregationError, CheckpointError, MessageError, PlanError
from fedgraft_common.masks import Vector, add_masks, key_stream
from fedgraft_common.secure_messages import (
    HASH,
    KEY,
    Advertisement,
    Answer,
    Delivery,
    Question,
    Roster,
    Sharing,
    Statement,
    Terms,
    from_bits,
    pack_list,
    to_bits,
    unpack_list,
)
from fedgraft_common.site_signature import SiteKey, Trust, public_key, verify

ADVERTISEMENT: Final = "secure-aggregation advertisement"
ROSTER: Final = "secure-aggregation roster"
STATEMENT: Final = "secure-aggregation statement"
_NONCE: Final = bytes(12)  # every sealing key encrypts once
_SELF_MASK, _ROUND_KEY = 0, 1  # order of a dealer's shares for a round
_SHARES: Final = 2 * shamir.SHARE
_TRIES: Final = 1000
"""Choices of answers to look for wrong shares in. k sites that answer wrongly are found for sure if
the sum of C(d, i) C(n - d, i) for i = 0 to k is at most this: as many as there may be, d, up to 16
sites; two with 24 sites and d = 3 or 40 and d = 2; one up to 100 sites and d = 9. With more the
round may be lost. (No maintained library decodes Reed-Solomon codes over a 257-bit prime field.)
"""


@dataclass(frozen=True, slots=True)
class SiteState:
    """A site's state as bytes; write both in one transaction, before the message they belong to.

    Attributes:
        setup: changes in the set-up only; holds secrets. Up to some hundred kilobytes.
        rounds: which rounds have had an input and an answer; small.
    """

    setup: bytes
    rounds: bytes


class SecureSite:
    """A site's part.

    Every message is a function of the state, so that it can be repeated byte for byte: after a
    call that returned a message, save the state, then send. A state put back from an older copy
    would let the server ask twice; the site's ledger, which finds that, must hold it.

    Attributes:
        terms: what was agreed.
        name: the site's.
    """

    def __init__(self, terms: Terms, key: SiteKey, secret: bytes, last_masked: int = 0) -> None:
        """A new set-up.

        Args:
            terms: read from the site's own plan and the session that the server named.
            key: signs.
            secret: 32 bytes from the operating system's generator, for this set-up alone.
            last_masked: the last round of the run in which the site gave a masked input under an
                earlier set-up; 0 if there was none. The same input under two set-ups would be
                summed over two sets of sites, and the difference is not for the server to know.

        Raises:
            MessageError: the set-up is for rounds that already had their input.
        """
        if len(secret) != KEY:
            raise ValueError(f"{len(secret)} bytes of secret instead of {KEY}")
        if terms.first_round <= last_masked:
            _refuse(
                "first round of the set-up", terms.first_round,
                f"one after {last_masked}, which had its masked input under an earlier set-up",
            )  # fmt: skip
        self.terms = terms
        self.name = key.name
        self._key = key
        self._secret = secret
        self._certificate = key.certificate_der
        self._last_masked = last_masked
        self._roster: Roster | None = None
        self._own = b""  # this site's shares of its own secrets
        self._held: tuple[bytes, ...] = ()  # from each dealer, its shares for every round
        self._masked: dict[int, bytes] = {}  # round -> SHA-256 of the masked input
        self._answered: dict[int, bytes] = {}  # round -> survivors

    def save(self) -> SiteState:
        """The whole state."""
        roster = self._roster.to_bytes() if self._roster else b""
        setup = pack_list(
            [
                self.terms.to_bytes(), self.name.encode("ascii"), self._secret, self._certificate,
                self._last_masked.to_bytes(8), roster, self._own, pack_list(self._held),
            ]
        )  # fmt: skip
        rounds = [
            pack_list([number.to_bytes(8), self._masked.get(number, b""), answered])
            for number in sorted(self._masked.keys() | self._answered.keys())
            for answered in [self._answered.get(number, b"")]
        ]
        return SiteState(setup, pack_list(rounds))

    @classmethod
    def restore(cls, state: SiteState, key: SiteKey) -> Self:
        """The site whose state this is.

        Args:
            state: what `save` made.
            key: the same key; its certificate may have been renewed.

        Raises:
            CheckpointError: damaged, or another site's.
        """
        try:
            terms, name, secret, certificate, last, roster, own, held = unpack_list(state.setup, 8)
            if name.decode("ascii") != key.name:
                raise _damaged(f"that of site {name.decode('ascii')}", f"that of site {key.name}")
            site = cls(Terms.from_bytes(terms), key, secret, int.from_bytes(last))
            site._certificate = certificate
            if public_key(certificate) != key.key.public_key():
                raise _damaged("one made with another key", "one of this site's key")
            site._roster = Roster.from_bytes(roster) if roster else None
            site._own = own
            site._held = tuple(unpack_list(held))
            for entry in unpack_list(state.rounds):
                number, masked, answered = unpack_list(entry, 3)
                if masked:
                    site._masked[int.from_bytes(number)] = masked
                if answered:
                    site._answered[int.from_bytes(number)] = answered
        except (MessageError, PlanError, ValueError) as error:
            raise _damaged(str(error), "the state that was saved") from None
        return site

    @property
    def last_masked(self) -> int:
        """The last round with a masked input, under this set-up or an earlier one; 0: none."""
        return max(self._masked, default=self._last_masked)

    @property
    def ready(self) -> bool:
        """Whether the set-up is complete."""
        return bool(self._held)

    @property
    def roster(self) -> Roster | None:
        """The roster this site signed, if it has signed one."""
        return self._roster

    # Set-up (figure 4, rounds 0 and 1), once for all rounds.

    def advertise(self) -> Advertisement:
        """The site's public keys, signed; the same bytes each time."""
        keys, commitments = [], []
        for number in range(self.terms.first_round, self.terms.last_round + 1):
            own = X25519PrivateKey.from_private_bytes(self._round_secret(_ROUND_KEY, number))
            keys.append(own.public_key().public_bytes_raw())
            commitments.append(commitment(self._round_secret(_SELF_MASK, number)))
        unsigned = Advertisement(
            self.terms.digest, self.name, self._certificate,
            self._sealing_key().public_key().public_bytes_raw(),
            b"".join(keys), b"".join(commitments),
        )  # fmt: skip
        return replace(unsigned, signature=self._key.sign(ADVERTISEMENT, unsigned.signed))

    def share(self, roster: Roster, trust: Trust) -> Sharing:
        """Checks everybody's keys; encrypts this site's shares for its peers and signs the roster.

        Args:
            roster: from the server.
            trust: whose certificates count.

        Raises:
            MessageError: another roster than the one signed before; this site's keys are not in
                it as it made them; a site is in it twice; terms or sizes differ.
            IdentityError: a certificate is not the site's.
        """
        if self._roster is not None and roster.digest != self._roster.digest:
            _refuse("roster", f"{roster.digest.hex()[:16]}", "the one this site signed before")
        check_roster(roster, self.terms, trust)
        me = roster.number(self.name)
        if roster.advertisements[me] != self.advertise():
            _refuse(f"keys of site {self.name}", "others in the roster", "those it advertised")
        dealt = self._deal(roster)
        ciphertexts = [
            b"" if peer == me else ChaCha20Poly1305(self._seal(roster, me, peer)).encrypt(
                _NONCE, dealt[peer], None
            )
            for peer in range(len(roster))
        ]  # fmt: skip
        self._roster, self._own = roster, dealt[me]
        return Sharing(
            self.name, roster.digest, tuple(ciphertexts), self._key.sign(ROSTER, roster.digest)
        )

    def accept(self, delivery: Delivery) -> None:
        """Takes the peers' shares, once all of them have signed the roster this site signed.

        Once they are taken, no later delivery is looked at.

        Raises:
            MessageError: a signature is missing, is by another key or for another roster; a share
                is not what its sender encrypted, or is malformed.
        """
        if self._held:
            return
        self._check_delivery(delivery)
        held = [self._opened(*received) for received in enumerate(delivery.ciphertexts)]
        self._held = tuple(held)

    def unusable(self, delivery: Delivery) -> tuple[int, ...]:
        """Numbers of the sites whose shares in a delivery `accept` would refuse; changes nothing.

        The server cannot look into a ciphertext: only whom it is for can say who deals rubbish.

        Raises:
            MessageError: something else about the delivery is wrong; see `accept`.
        """
        found: list[int] = []
        if not self._held:
            self._check_delivery(delivery)
            for dealer, ciphertext in enumerate(delivery.ciphertexts):
                try:
                    self._opened(dealer, ciphertext)
                except MessageError:
                    found.append(dealer)
        return tuple(found)

    def _check_delivery(self, delivery: Delivery) -> None:
        """That all sites of the roster have signed it, and each has sent something."""
        roster = self._signed_roster()
        n = len(roster)
        if delivery.roster != roster.digest:
            _refuse("delivery", "for another roster", "for the one this site signed")
        if len(delivery.ciphertexts) != n or len(delivery.signatures) != n:
            _refuse("delivery", f"{len(delivery.signatures)} sites", f"all {n} of the roster")
        for advertisement, signature in zip(
            roster.advertisements, delivery.signatures, strict=True
        ):
            key = public_key(advertisement.certificate)
            verify(key, ROSTER, roster.digest, signature, advertisement.site)

    def _opened(self, dealer: int, ciphertext: bytes) -> bytes:
        """A dealer's shares for this site, for every round."""
        roster = self._signed_roster()
        me, who = roster.number(self.name), f"shares of site {roster.names[dealer]}"
        if dealer == me:
            return self._own
        try:
            cipher = ChaCha20Poly1305(self._seal(roster, dealer, me))
            shares = cipher.decrypt(_NONCE, ciphertext, None)
        except InvalidTag:
            _refuse(who, "changed or for somebody else", "as it sent them")
        if len(shares) != self.terms.rounds * _SHARES:
            _refuse(who, f"{len(shares)} bytes", "two for each round")
        for start in range(0, len(shares), shamir.SHARE):
            shamir.parse(shares[start : start + shamir.SHARE])
        return shares

    # A round (figure 4, rounds 2 and 4).

    def check_open(self, number: int) -> None:
        """Refuses a round that a new input can have no place in, before one is computed.

        Raises:
            MessageError: the set-up is not complete or not for this round; the round, or a later
                one, had an input; or its survivors were named.
        """
        self._ready_roster()
        self._check_round(number)
        if number in self._answered:
            _refuse("masked input", f"round {number}", "a round that is not being unmasked yet")
        if number <= self.last_masked:
            _refuse("masked input", f"round {number}", f"a round after {self.last_masked}")

    def mask(self, number: int, values: Vector, context: bytes) -> Vector:
        """The masked input of a round: uniform to whoever does not know the masks.

        Args:
            number: of the round.
            values: (length,) of the terms' dtype; not changed.
            context: 32 bytes, SHA-256 of what the round's request asked to compute on; equal at
                all sites, or nothing comes out.

        Returns:
            (length,), the same dtype. Asked again with the same values it is the same.

        Raises:
            MessageError: the set-up is not complete or not for this round; the round is over; it
                had another input already; values of another length or dtype.
        """
        roster = self._ready_roster()
        self._check_round(number)
        check_vector(values, self.terms)
        if len(context) != HASH:
            _refuse("context", f"{len(context)} bytes", f"{HASH} bytes")
        if number in self._answered:
            _refuse("masked input", f"round {number}", "a round that is not being unmasked yet")
        if number < self.last_masked:
            _refuse("masked input", f"round {number}", f"a round from {self.last_masked} on")
        me = roster.number(self.name)
        own = X25519PrivateKey.from_private_bytes(self._round_secret(_ROUND_KEY, number))
        plus = [self_mask_key(self._round_secret(_SELF_MASK, number), roster, number)]
        minus: list[bytes] = []
        for peer in range(len(roster)):
            if peer != me:
                key = pair_mask_key(own, me, peer, roster, self._index(number), number, context)
                (plus if peer > me else minus).append(key)
        masked = values.copy()
        add_masks(masked, plus, minus)
        digest = hashlib.sha256(masked.data).digest()
        if self._masked.setdefault(number, digest) != digest:
            _refuse("masked input", f"a second one for round {number}", "the first, repeated")
        return masked

    def unmask(self, question: Question) -> Answer:
        """One share for every site: of its self-mask if the server has its input, else of its key.

        Args:
            question: whose inputs the server has.

        Returns:
            The same bytes each time it is asked the same.

        Raises:
            MessageError: the set-up is not complete or not for this round; too few survivors;
                other survivors than were named before in this round; this site is named a survivor
                and gave nothing.
        """
        roster = self._ready_roster()
        self._check_round(question.round)
        if question.roster != roster.digest:
            _refuse("question", "for another roster", "for the one this site signed")
        survivors = from_bits(question.survivors, len(roster))
        before = self._answered.get(question.round, question.survivors)
        if before != question.survivors:
            _refuse(
                f"survivors of round {question.round}", "others than before",
                "those named first: both secrets of a site are never given",
            )  # fmt: skip
        if len(survivors) < self.terms.needed:
            _refuse("survivors", len(survivors), f"at least {self.terms.needed}")
        if roster.number(self.name) in survivors and question.round not in self._masked:
            _refuse("survivors", f"{self.name} among them", "only sites that gave an input")
        start = self._index(question.round) * _SHARES
        shares = b"".join(
            held[at : at + shamir.SHARE]
            for dealer, held in enumerate(self._held)
            for at in [start + (_SELF_MASK if dealer in survivors else _ROUND_KEY) * shamir.SHARE]
        )
        unsigned = Statement(
            self.name, roster.digest, question.round, question.survivors,
            hashlib.sha256(shares).digest(),
        )  # fmt: skip
        signature = self._key.sign(STATEMENT, unsigned.signed)
        self._answered[question.round] = question.survivors
        return Answer(replace(unsigned, signature=signature), shares)

    def statements(self) -> tuple[Statement, ...]:
        """What this site has signed about its answers: its part of a transcript."""
        roster = self._signed_roster()
        return tuple(
            self.unmask(Question(roster.digest, number, self._answered[number])).statement
            for number in sorted(self._answered)
        )

    # Secrets.

    def _round_secret(self, kind: int, number: int) -> bytes:
        return _derive(self._secret, self.terms.digest, "round", kind, number)

    def _sealing_key(self) -> X25519PrivateKey:
        secret = _derive(self._secret, self.terms.digest, "sealing key")
        return X25519PrivateKey.from_private_bytes(secret)

    def _seal(self, roster: Roster, sender: int, receiver: int) -> bytes:
        """The key for what one site encrypts to another in this set-up, and for nothing else."""
        peer = receiver if roster.names[sender] == self.name else sender
        shared = _agree(self._sealing_key(), roster.advertisements[peer].sealing_key)
        return _derive(shared, roster.digest, "sealed shares", sender, receiver)

    def _deal(self, roster: Roster) -> list[bytes]:
        """For each site of the roster, its shares of this site's secrets in all rounds."""
        secrets = [
            self._round_secret(kind, number)
            for number in range(self.terms.first_round, self.terms.last_round + 1)
            for kind in (_SELF_MASK, _ROUND_KEY)
        ]
        size = shamir.randomness_size(len(secrets), self.terms.needed)
        randomness = key_stream(_derive(self._secret, roster.digest, "polynomials"), size)
        return shamir.split(secrets, self.terms.needed, len(roster), randomness)

    # State.

    def _signed_roster(self) -> Roster:
        if self._roster is None:
            _refuse("message", "one for a later step", "the roster first")
        return self._roster

    def _ready_roster(self) -> Roster:
        if not self._held:
            _refuse("message", "one for a round", "the peers' shares first: finish the set-up")
        return self._signed_roster()

    def _check_round(self, number: int) -> None:
        if not self.terms.first_round <= number <= self.terms.last_round:
            _refuse(
                "round", number,
                f"{self.terms.first_round} to {self.terms.last_round}, as the set-up is for",
            )  # fmt: skip

    def _index(self, number: int) -> int:
        return number - self.terms.first_round


class SecureServer:
    """The server's part of the set-up; `SecureRound` is its part of a round.

    It checks all that a site would refuse, so that the culprit is known. Nothing it holds is
    secret from the sites, and nothing here has to be honest for the guarantee.

    Attributes:
        terms: what was agreed.
    """

    def __init__(self, terms: Terms, trust: Trust) -> None:
        self.terms = terms
        self._trust = trust
        self._advertisements: dict[str, Advertisement] = {}
        self._closed = False
        self._sharings: dict[str, Sharing] = {}

    def save(self) -> bytes:
        """The whole state."""
        return pack_list(
            [
                self.terms.to_bytes(), bytes([self._closed]),
                pack_list([a.to_bytes() for a in self._advertisements.values()]),
                pack_list([s.to_bytes() for s in self._sharings.values()]),
            ]
        )  # fmt: skip

    @classmethod
    def restore(cls, state: bytes, trust: Trust) -> Self:
        """The server whose state this is.

        Raises:
            CheckpointError: damaged.
        """
        try:
            terms, closed, advertisements, sharings = unpack_list(state, 4)
            server = cls(Terms.from_bytes(terms), trust)
            for part in unpack_list(advertisements):
                advertisement = Advertisement.from_bytes(part)
                server._advertisements[advertisement.site] = advertisement
            server._closed = closed != b"\0"
            for part in unpack_list(sharings):
                sharing = Sharing.from_bytes(part)
                server._sharings[sharing.site] = sharing
        except (MessageError, PlanError) as error:
            raise _damaged(str(error), "the state that was saved") from None
        return server

    def add_advertisement(self, advertisement: Advertisement) -> None:
        """Takes a site's keys; the same again changes nothing.

        Raises:
            MessageError: the roster is closed, other keys than before, the certificate's key is
                that of a site of another name, or what `share` refuses.
            IdentityError: the certificate is not the site's.
        """
        if self._advertisements.get(advertisement.site) == advertisement:
            return
        full = len(self._advertisements) >= self.terms.sites
        if self._closed or full or advertisement.site in self._advertisements:
            _refuse(
                f"keys of site {advertisement.site}", "late, one too many or a second time",
                f"one set of keys from each of {self.terms.sites} sites, before the roster closes",
            )  # fmt: skip
        check_advertisement(advertisement, self.terms, self._trust)
        key = public_key(advertisement.certificate)
        for known in self._advertisements.values():
            if public_key(known.certificate) == key:
                _refuse(
                    f"keys of site {advertisement.site}", f"signed by the key of {known.site}",
                    "a key for each site",
                )  # fmt: skip
        self._advertisements[advertisement.site] = advertisement

    @property
    def advertised(self) -> frozenset[str]:
        """Sites whose keys have come."""
        return frozenset(self._advertisements)

    def close_roster(self) -> Roster:
        """Takes no more keys; what is sent to all sites. Sites that are missing count as dropouts.

        Raises:
            AggregationError: too few sites.
            MessageError: two sites have the same key.
        """
        found = len(self._advertisements)
        if found < self.terms.needed:
            raise _unfinished("sites in the roster", found, f"at least {self.terms.needed}")
        if not self._closed:
            roster = Roster(tuple(self._advertisements[n] for n in sorted(self._advertisements)))
            check_roster(roster, self.terms, self._trust)
            self._closed = True
        return self.roster

    @cached_property
    def roster(self) -> Roster:
        """What `close_roster` closed."""
        if not self._closed:
            _refuse("roster", "open", "one that is closed")
        return Roster(tuple(self._advertisements[n] for n in sorted(self._advertisements)))

    def add_sharing(self, sharing: Sharing) -> None:
        """Takes a site's encrypted shares; the same again changes nothing.

        Raises:
            MessageError: for another roster, by an unknown site, badly signed, of a wrong size, or
                a second time with other shares.
        """
        roster = self.roster
        number, n = roster.number(sharing.site), len(roster)
        if sharing.roster != roster.digest or len(sharing.ciphertexts) != n:
            _refuse(f"shares of site {sharing.site}", "for another roster", f"for these {n} sites")
        size = self.terms.rounds * _SHARES + 16
        for receiver, ciphertext in enumerate(sharing.ciphertexts):
            if len(ciphertext) != (0 if receiver == number else size):
                _refuse(f"shares of site {sharing.site}", f"{len(ciphertext)} bytes", f"{size}")
        key = public_key(roster.advertisements[number].certificate)
        verify(key, ROSTER, roster.digest, sharing.signature, sharing.site)
        if self._sharings.setdefault(sharing.site, sharing) != sharing:
            _refuse(f"shares of site {sharing.site}", "others than before", "the first, repeated")

    @property
    def ready(self) -> bool:
        """Whether every site of the roster has sent its shares."""
        return self._closed and len(self._sharings) == len(self.roster)

    @property
    def missing(self) -> frozenset[str]:
        """Sites of the roster that have sent no shares; without them the set-up must start anew."""
        return frozenset(self.roster.names) - self._sharings.keys()

    def delivery(self, site: str) -> Delivery:
        """What all others sent to a site; may be asked for at any time later.

        Raises:
            AggregationError: not all sites have sent their shares.
        """
        roster = self.roster
        number = roster.number(site)
        if missing := sorted(self.missing):
            raise _unfinished("sites that sent no shares", missing, "none")
        sharings = [self._sharings[name] for name in roster.names]
        return Delivery(
            roster.digest,
            tuple(s.ciphertexts[number] for s in sharings),
            tuple(s.signature for s in sharings),
        )

    def signatures(self) -> tuple[bytes, ...]:
        """Every site's signature on the roster, in its order: part of a transcript."""
        return tuple(self._sharings[name].signature for name in self.roster.names)


@dataclass(frozen=True, slots=True)
class Total:
    """What a round reveals.

    Attributes:
        values: (length,) sum of the survivors' inputs modulo 2^bits.
        survivors: names of the sites whose inputs are in it.
        wrong: pairs (site that gave it, site whose secret it is of) of shares that did not fit.
            Either may be at fault.
    """

    values: Vector
    survivors: tuple[str, ...]
    wrong: tuple[tuple[str, str], ...] = ()


class SecureRound:
    """The server's part of one round.

    Attributes:
        number: of the round.
        unreadable: the site whose secret `total` could not find; empty otherwise.
    """

    def __init__(self, terms: Terms, roster: Roster, number: int, context: bytes) -> None:
        """An open round.

        Args:
            terms: of the set-up.
            roster: of the set-up.
            number: of the round.
            context: as the sites have it.
        """
        self.number = number
        self._terms = terms
        self._roster = roster
        self._context = context
        self._inputs: dict[int, bytes] = {}  # site -> SHA-256 of its masked input
        self._sum = np.zeros(terms.length, dtype=terms.dtype)
        self._question: Question | None = None
        self._answers: dict[int, Answer] = {}
        self.unreadable = ""

    def save(self) -> bytes:
        """The whole state, with the sum so far. Save it between `close` and asking the sites."""
        return pack_list(
            [
                self.number.to_bytes(8), self._context,
                self._sum.astype(self._sum.dtype.newbyteorder("<"), copy=False).tobytes(),
                pack_list([site.to_bytes(8) + digest for site, digest in self._inputs.items()]),
                self._question.to_bytes() if self._question else b"",
                pack_list([answer.to_bytes() for answer in self._answers.values()]),
            ]
        )  # fmt: skip

    @classmethod
    def restore(cls, state: bytes, terms: Terms, roster: Roster) -> Self:
        """The round whose state this is.

        Raises:
            CheckpointError: damaged.
        """
        try:
            number, context, sums, inputs, question, answers = unpack_list(state, 6)
            restored = cls(terms, roster, int.from_bytes(number), context)
            values = np.frombuffer(sums, terms.dtype.newbyteorder("<")).astype(terms.dtype)
            check_vector(values, terms)
            restored._sum = values
            for entry in unpack_list(inputs):
                restored._inputs[int.from_bytes(entry[:8])] = entry[8:]
            restored._question = Question.from_bytes(question) if question else None
            for part in unpack_list(answers):
                answer = Answer.from_bytes(part)
                restored._answers[roster.number(answer.statement.site)] = answer
        except (MessageError, ValueError) as error:
            raise _damaged(str(error), "the state that was saved") from None
        return restored

    @property
    def inputs(self) -> frozenset[str]:
        """Sites whose masked inputs have been added."""
        return frozenset(self._roster.names[site] for site in self._inputs)

    def add_input(self, site: str, masked: Vector) -> None:
        """Adds a masked input to the sum; the same again changes nothing, late or not.

        Args:
            site: whose it is, as its connection proved.
            masked: (length,) of the terms' dtype.

        Raises:
            MessageError: an unknown site, another length or dtype, a second input, or one that
                comes after `close`: it is never unmasked.
        """
        number = self._roster.number(site)
        check_vector(masked, self._terms)
        digest = hashlib.sha256(masked.data).digest()
        if number in self._inputs:
            if self._inputs[number] != digest:
                _refuse(f"input of site {site}", "a second one", f"one in round {self.number}")
            return
        if self._question is not None:
            _refuse(f"input of site {site}", "late", "one before the survivors are named")
        self._inputs[number] = digest
        np.add(self._sum, masked, out=self._sum)

    def close(self) -> Question:
        """Takes no more inputs; what all sites of the roster are asked, survivors or not.

        Raises:
            AggregationError: too few inputs; nothing is asked, so nothing is revealed.
        """
        if len(self._inputs) < self._terms.needed:
            raise _unfinished(
                f"inputs of round {self.number}", len(self._inputs),
                f"at least {self._terms.needed}",
            )  # fmt: skip
        if self._question is None:
            bits = to_bits(sorted(self._inputs), len(self._roster))
            self._question = Question(self._roster.digest, self.number, bits)
        return self._question

    def add_answer(self, answer: Answer) -> None:
        """Takes a site's shares; the same again changes nothing.

        Raises:
            MessageError: by an unknown site, for another roster, round or set of survivors, badly
                signed, malformed, or others than before.
        """
        statement = answer.statement
        number = self._roster.number(statement.site)
        who = f"shares of site {statement.site}"
        if self._question is None:
            _refuse(who, "early", "shares after the survivors are named")
        asked = (self._roster.digest, self.number, self._question.survivors)
        if (statement.roster, statement.round, statement.survivors) != asked:
            _refuse(who, "for another round, roster or set of survivors", "what was asked")
        if len(answer.shares) != len(self._roster) * shamir.SHARE:
            _refuse(who, f"{len(answer.shares)} bytes", f"{shamir.SHARE} for each site")
        if hashlib.sha256(answer.shares).digest() != statement.shares:
            _refuse(who, "others than it signed", "those it speaks of")
        key = public_key(self._roster.advertisements[number].certificate)
        verify(key, STATEMENT, statement.signed, statement.signature, statement.site)
        for dealer in range(len(self._roster)):
            shamir.parse(answer.share(dealer))
        if self._answers.setdefault(number, answer) != answer:
            _refuse(who, "others than before", "the first, repeated")

    @property
    def answers(self) -> frozenset[str]:
        """Sites that have answered."""
        return frozenset(self._roster.names[site] for site in self._answers)

    @property
    def enough(self) -> bool:
        """Whether `total` has as many answers as it needs."""
        return len(self._answers) >= self._terms.needed

    @property
    def statements(self) -> tuple[Statement, ...]:
        """What the sites signed: part of a transcript."""
        return tuple(self._answers[site].statement for site in sorted(self._answers))

    def total(self) -> Total:
        """The sum of the survivors' inputs.

        Raises:
            AggregationError: too few answers, or a secret that its shares do not give.
        """
        if self._question is None or not self.enough:
            raise _unfinished(
                f"answers in round {self.number}", len(self._answers),
                f"at least {self._terms.needed}",
            )  # fmt: skip
        plus: list[bytes] = []
        minus: list[bytes] = []
        wrong: set[tuple[int, int]] = set()
        survivors = sorted(self._inputs)
        for dealer in range(len(self._roster)):
            secret = self._secret(dealer, wrong)
            if dealer in self._inputs:
                minus.append(self_mask_key(secret, self._roster, self.number))
                continue
            own = X25519PrivateKey.from_private_bytes(secret)
            index = self.number - self._terms.first_round
            for peer in survivors:  # added at the peer if dealer > peer, else subtracted
                key = pair_mask_key(
                    own, dealer, peer, self._roster, index, self.number, self._context
                )
                (minus if dealer > peer else plus).append(key)
        values = self._sum.copy()
        add_masks(values, plus, minus)
        names = self._roster.names
        return Total(
            values,
            tuple(names[site] for site in survivors),
            tuple(sorted((names[holder], names[dealer]) for holder, dealer in wrong)),
        )

    def _secret(self, dealer: int, wrong: set[tuple[int, int]]) -> bytes:
        """A site's self-mask secret or round key, recognised by what it advertised."""
        suspects = {holder for holder, _ in wrong}
        order = sorted(self._answers, key=lambda holder: (holder in suspects, holder))
        shares = {holder: self._answers[holder].share(dealer) for holder in order}
        for tries, chosen in enumerate(_choices(order, self._terms.needed)):
            secret = shamir.combine(chosen, [shares[holder] for holder in chosen])
            if secret is None or not self._fits(dealer, secret):
                continue
            if tries or suspects:
                good = [shares[holder] for holder in chosen]
                for other in set(order).difference(chosen):
                    if shamir.predict(chosen, good, other) != shares[other]:
                        wrong.add((other, dealer))
            return secret
        self.unreadable = self._roster.names[dealer]
        raise _unfinished(
            f"secret of site {self.unreadable} in round {self.number}",
            "wrong shares", f"{self._terms.needed} that fit",
        )  # fmt: skip

    def _fits(self, dealer: int, secret: bytes) -> bool:
        at = (self.number - self._terms.first_round) * KEY
        advertisement = self._roster.advertisements[dealer]
        if dealer in self._inputs:
            return commitment(secret) == advertisement.commitments[at : at + KEY]
        own = X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
        return own == advertisement.round_keys[at : at + KEY]


# What both sides compute and check.


def check_roster(roster: Roster, terms: Terms, trust: Trust) -> None:
    """Refuses a roster that no honest site would sign.

    Raises:
        MessageError: too few or too many sites, a site twice, an advertisement that is wrong.
        IdentityError: a certificate is not the site's.
    """
    n = len(roster)
    if not terms.needed <= n <= terms.sites:
        _refuse("sites in the roster", n, f"{terms.needed} to {terms.sites}")
    if list(roster.names) != sorted(set(roster.names)):
        _refuse("sites in the roster", "one twice or out of order", "each once, in order")
    keys = set()
    for advertisement in roster.advertisements:
        check_advertisement(advertisement, terms, trust)
        keys.add(public_key(advertisement.certificate).public_numbers())
    if len(keys) != n:
        _refuse("keys in the roster", "one site under two names", "a key for each site")


def check_advertisement(advertisement: Advertisement, terms: Terms, trust: Trust) -> None:
    """Refuses keys that the site did not sign, or that are for something else.

    Raises:
        MessageError: other terms, a wrong number of keys, a signature that does not fit.
        IdentityError: the certificate is not the site's.
    """
    who = f"keys of site {advertisement.site}"
    key = trust.check(advertisement.site, advertisement.certificate)
    verify(key, ADVERTISEMENT, advertisement.signed, advertisement.signature, advertisement.site)
    if advertisement.terms != terms.digest:
        _refuse(who, "for another run, set-up or plan", "for these terms")
    if len(advertisement.round_keys) != terms.rounds * KEY:
        _refuse(who, f"{len(advertisement.round_keys)} bytes", f"{terms.rounds * KEY}")


def check_vector(values: Vector, terms: Terms) -> None:
    """Refuses a vector of another shape or kind.

    Raises:
        MessageError: another dtype or shape, or not contiguous.
    """
    if (
        not isinstance(values, np.ndarray)
        or values.dtype != terms.dtype
        or values.shape != (terms.length,)
        or not values.flags.c_contiguous
    ):
        found = f"{getattr(values, 'dtype', type(values).__name__)}{getattr(values, 'shape', '')}"
        _refuse("vector", found, f"{terms.dtype}({terms.length},), contiguous")


def commitment(secret: bytes) -> bytes:
    """To a self-mask secret: recognises it, and says nothing about 256 random bits."""
    return hashlib.sha256(b"fedgraft self-mask secret\n" + secret).digest()


def self_mask_key(secret: bytes, roster: Roster, number: int) -> bytes:
    """The key of PRG(b)."""
    return _derive(secret, roster.digest, "self mask", number)


def pair_mask_key(
    own: X25519PrivateKey,
    me: int,
    peer: int,
    roster: Roster,
    index: int,
    number: int,
    context: bytes,
) -> bytes:
    """The key of PRG(k) between two sites, the same from either side.

    Args:
        own: one side's key for the round.
        me: that side's number.
        peer: the other's.
        roster: with its public key.
        index: of the round in the set-up, from 0.
        number: of the round.
        context: what was computed on.
    """
    public = roster.advertisements[peer].round_keys[index * KEY : (index + 1) * KEY]
    salt = roster.digest + context
    return _derive(_agree(own, public), salt, "pair mask", number, min(me, peer), max(me, peer))


def _agree(own: X25519PrivateKey, public: bytes) -> bytes:
    """X25519. A key of small order gives zeros: a mask its dishonest owner knows in any case."""
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return bytes(KEY)


def _derive(secret: bytes, salt: bytes, purpose: str, *numbers: int) -> bytes:
    info = b"fedgraft secure aggregation\n" + purpose.encode("ascii") + b"\n"
    info += b"".join(number.to_bytes(8) for number in numbers)
    return HKDF(hashes.SHA256(), KEY, salt, info).derive(secret)


def _choices(order: Sequence[int], count: int) -> Iterator[tuple[int, ...]]:
    """Which answers to use: the first ones; then with one of them replaced, with two, ..."""

    def choices() -> Iterator[tuple[int, ...]]:
        first, spare = order[:count], order[count:]
        for replaced in range(len(spare) + 1):
            for into in combinations(spare, replaced):
                for out in combinations(reversed(first), replaced):
                    yield tuple(sorted(set(first).difference(out).union(into)))

    return islice(choices(), _TRIES)


def _refuse(what: str, found: object, allowed: str) -> NoReturn:
    raise MessageError(
        f"secure aggregation: {what}", found, allowed,
        "Nothing was revealed. If it happens again, the other side is faulty or dishonest.",
    )  # fmt: skip


def _unfinished(what: str, found: object, allowed: str) -> AggregationError:
    return AggregationError(
        f"secure aggregation: {what}", found, allowed,
        "The round is over and no site's input was revealed; go on with the next.",
    )  # fmt: skip


def _damaged(found: str, allowed: str) -> CheckpointError:
    return CheckpointError(
        "state of secure aggregation", found, allowed,
        "Start a new set-up for the rounds that are left.",
    )  # fmt: skip
