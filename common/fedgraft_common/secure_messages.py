"""What is sent for secure aggregation, as canonical bytes; long, for each is described here.

    set-up   site -> server   Advertisement   its public keys for every round, signed
             server -> site   Roster          everybody's advertisement
             site -> server   Sharing         encrypted shares for every peer, the roster signed
             server -> site   Delivery        the shares meant for it, everybody's signature
             site -> server   Acceptance      that it has taken them, or whose it cannot use
    a round  site -> server   (length,) uint32 or uint64, the masked input
             server -> site   Question        whose masked inputs there are
             site -> server   Answer          one share of one secret of every site, signed

Canonical: equal messages are equal bytes, and nothing else parses to the same message. A message
is a mark, a kind and fields with their lengths before them; numbers have 8 bytes, most significant
first. Parsers check form only; `secure_aggregation.py` says who may send what when.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Final, Self

import numpy as np

from fedgraft_common.errors import MessageError, PlanError
from fedgraft_common.plan import LEAST_SITES
from fedgraft_common.shamir import SHARE

_MARK: Final = b"FgSA\x01"  # the last byte is the version
NAME: Final = re.compile(rb"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # as invite.SiteName
_SEAL: Final = 16  # bytes that authenticated encryption adds
_MAX_SITES: Final = 10_000
_MAX_ROUNDS: Final = 100_000
_MAX_BYTES: Final = 1 << 34  # of a vector; far below what one ChaCha20 nonce can mask (2^38)
HASH: Final = 32
KEY: Final = 32


class _Kind(IntEnum):
    TERMS = 1
    ADVERTISEMENT = 2
    ROSTER = 3
    SHARING = 4
    DELIVERY = 5
    QUESTION = 6
    ANSWER = 7
    STATEMENT = 8
    LIST = 9
    ACCEPTANCE = 10


@dataclass(frozen=True, slots=True)
class Terms:
    """What all parties must agree on before anything is sent; both sides derive it from the plan.

    Attributes:
        run: 32 bytes that name the run: SHA-256 over plan and run.
        session: 16 bytes, new for each set-up; the server draws them.
        first_round: the first round this set-up is for.
        rounds: how many it is for.
        length: values in a site's vector.
        bits: 32 or 64: sums are modulo 2^bits.
        sites: n, as in the plan.
        dropouts: d, how many of them may be missing in a round.
        colluders: c, how many of them may work with the server.
    """

    run: bytes
    session: bytes
    first_round: int
    rounds: int
    length: int
    bits: int
    sites: int
    dropouts: int
    colluders: int

    def __post_init__(self) -> None:
        n, d, c = self.sites, self.dropouts, self.colluders
        for name, value, low, high in (
            ("rounds", self.rounds, 1, _MAX_ROUNDS),
            ("first round", self.first_round, 1, 1 << 62),
            ("sites", n, LEAST_SITES, _MAX_SITES),
            ("dropouts", d, 0, n),
            ("colluders", c, 0, n),
            ("length", self.length, 1, _MAX_BYTES // 8),
        ):
            if not low <= value <= high:
                raise _unmet(name, value, f"{low} to {high}")
        if self.bits not in (32, 64):
            raise _unmet("bits", self.bits, "32 or 64")
        if (len(self.run), len(self.session)) != (HASH, 16):
            raise _unmet("names", f"{len(self.run)} and {len(self.session)} bytes", "32 and 16")
        if d * (d + 1) + c >= n:
            raise PlanError(
                "privacy.tolerated_dropouts, privacy.tolerated_colluders", f"{d} and {c}",
                f"numbers with d (d + 1) + c below the {n} sites of the run, here {d * (d + 1) + c}"
                ": only then can a server that names different survivors to different sites learn "
                "no more than one sum over enough sites",
                "Tolerate fewer dropouts or colluders, or wait for more sites.",
            )  # fmt: skip

    @property
    def needed(self) -> int:
        """Survivors a round needs (n - d), and the threshold of the secret sharing."""
        return self.sites - self.dropouts

    @property
    def last_round(self) -> int:
        """The last round this set-up is for."""
        return self.first_round + self.rounds - 1

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """uint32 or uint64."""
        return np.dtype(np.uint32 if self.bits == 32 else np.uint64)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical bytes."""
        return hashlib.sha256(self.to_bytes()).digest()

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        numbers = (
            self.first_round, self.rounds, self.length, self.bits, self.sites, self.dropouts,
            self.colluders,
        )  # fmt: skip
        return _pack(_Kind.TERMS, self.run, self.session, *map(_number, numbers))

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Reads what `to_bytes` made.

        Raises:
            MessageError: malformed.
            PlanError: terms that cannot be met.
        """
        run, session, *numbers = _unpack(_Kind.TERMS, content, 9)
        return cls(run, session, *map(_parse_number, numbers))


@dataclass(frozen=True, slots=True)
class Advertisement:
    """A site's public keys for one set-up.

    Attributes:
        terms: digest of the terms it agrees to.
        site: its name.
        certificate: DER.
        sealing_key: X25519, for what peers encrypt to it.
        round_keys: X25519, one for each round, one after the other.
        commitments: to its self-mask secrets, SHA-256, one for each round.
        signature: by the certificate's key, over all the rest.
    """

    terms: bytes
    site: str
    certificate: bytes
    sealing_key: bytes
    round_keys: bytes
    commitments: bytes
    signature: bytes = b""

    @property
    def signed(self) -> bytes:
        """What the signature is over."""
        return _pack(_Kind.ADVERTISEMENT, *self._fields())

    def _fields(self) -> tuple[bytes, ...]:
        return (
            self.terms, self.site.encode("ascii"), self.certificate, self.sealing_key,
            self.round_keys, self.commitments,
        )  # fmt: skip

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        return _pack(_Kind.ADVERTISEMENT, *self._fields(), self.signature)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Reads what `to_bytes` made.

        Raises:
            MessageError: malformed.
        """
        terms, site, certificate, sealing_key, keys, commitments, signature = _unpack(
            _Kind.ADVERTISEMENT, content, 7
        )
        _check_sizes("advertisement", (terms, HASH), (sealing_key, KEY))
        if len(keys) != len(commitments) or len(keys) % KEY or not keys:
            raise _malformed("advertisement", f"{len(keys)} bytes of keys", "32 for each round")
        return cls(terms, _name(site), certificate, sealing_key, keys, commitments, signature)


@dataclass(frozen=True)
class Roster:
    """Everybody's advertisement, in the order of the names; a site's place in it is its number."""

    advertisements: tuple[Advertisement, ...]

    def __len__(self) -> int:
        return len(self.advertisements)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Sorted, all different."""
        return tuple(a.site for a in self.advertisements)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical bytes: sites that have the same one agree on every key."""
        return hashlib.sha256(self.to_bytes()).digest()

    def number(self, site: str) -> int:
        """A site's place, from 0.

        Raises:
            MessageError: it is not in the roster.
        """
        if site not in self._numbers:
            raise MessageError(
                "site", site, "one of the roster", "The message was ignored; compare the names."
            )
        return self._numbers[site]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        return _pack(_Kind.ROSTER, *(a.to_bytes() for a in self.advertisements))

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Reads what `to_bytes` made.

        Raises:
            MessageError: malformed, a name twice, or names not in order.
        """
        roster = cls(
            tuple(Advertisement.from_bytes(part) for part in _unpack(_Kind.ROSTER, content))
        )
        if list(roster.names) != sorted(set(roster.names)):
            raise _malformed("roster", list(roster.names)[:8], "different names, in order")
        return roster


@dataclass(frozen=True, slots=True)
class Sharing:
    """A site's shares for its peers, and its word that it saw this roster.

    Attributes:
        site: its name.
        roster: digest.
        ciphertexts: for each site of the roster; empty for itself.
        signature: by the certificate's key, over the roster's digest.
    """

    site: str
    roster: bytes
    ciphertexts: tuple[bytes, ...]
    signature: bytes

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        return _pack(
            _Kind.SHARING, self.site.encode("ascii"), self.roster, self.signature, *self.ciphertexts
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Reads what `to_bytes` made.

        Raises:
            MessageError: malformed.
        """
        site, roster, signature, *ciphertexts = _unpack(_Kind.SHARING, content, at_least=3)
        _check_sizes("sharing", (roster, HASH))
        return cls(_name(site), roster, tuple(ciphertexts), signature)


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the others sent to one site.

    Attributes:
        roster: digest.
        ciphertexts: from each site of the roster; empty from itself.
        signatures: of each site, over the roster's digest.
    """

    roster: bytes
    ciphertexts: tuple[bytes, ...]
    signatures: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        return _pack(
            _Kind.DELIVERY, self.roster, pack_list(self.ciphertexts), pack_list(self.signatures)
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Reads what `to_bytes` made.

        Raises:
            MessageError: malformed.
        """
        roster, ciphertexts, signatures = _unpack(_Kind.DELIVERY, content, 3)
        _check_sizes("delivery", (roster, HASH))
        return cls(roster, tuple(unpack_list(ciphertexts)), tuple(unpack_list(signatures)))


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What became of a delivery.

    Attributes:
        roster: digest.
        unusable: one bit for each site of the roster whose shares were malformed or not what it
            had encrypted, see `to_bits`; none: the shares were taken.
    """

    roster: bytes
    unusable: bytes

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        return _pack(_Kind.ACCEPTANCE, self.roster, self.unusable)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Reads what `to_bytes` made.

        Raises:
            MessageError: malformed.
        """
        roster, unusable = _unpack(_Kind.ACCEPTANCE, content, 2)
        _check_sizes("acceptance", (roster, HASH))
        return cls(roster, unusable)


@dataclass(frozen=True, slots=True)
class Question:
    """Whose masked inputs the server holds, once it takes no more.

    Attributes:
        roster: digest.
        round: its number.
        survivors: one bit for each site of the roster, see `to_bits`.
    """

    roster: bytes
    round: int
    survivors: bytes

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        return _pack(_Kind.QUESTION, self.roster, _number(self.round), self.survivors)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Reads what `to_bytes` made.

        Raises:
            MessageError: malformed.
        """
        roster, number, survivors = _unpack(_Kind.QUESTION, content, 3)
        _check_sizes("question", (roster, HASH))
        return cls(roster, _parse_number(number), survivors)


@dataclass(frozen=True, slots=True)
class Statement:
    """A site's signed word about an answer: what an auditor needs, without the shares.

    A site gives its share of the self-mask secret of every survivor and its share of the round
    key of every other site, so `survivors` says all.

    Attributes:
        site: who answered.
        roster: digest.
        round: its number.
        survivors: as in the question.
        shares: SHA-256 of the shares it gave.
        signature: by the certificate's key, over all the rest.
    """

    site: str
    roster: bytes
    round: int
    survivors: bytes
    shares: bytes
    signature: bytes = b""

    def _fields(self) -> tuple[bytes, ...]:
        return (
            self.site.encode("ascii"), self.roster, _number(self.round), self.survivors, self.shares
        )  # fmt: skip

    @property
    def signed(self) -> bytes:
        """What the signature is over."""
        return _pack(_Kind.STATEMENT, *self._fields())

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        return _pack(_Kind.STATEMENT, *self._fields(), self.signature)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Reads what `to_bytes` made.

        Raises:
            MessageError: malformed.
        """
        site, roster, number, survivors, shares, signature = _unpack(_Kind.STATEMENT, content, 6)
        _check_sizes("statement", (roster, HASH), (shares, HASH))
        return cls(_name(site), roster, _parse_number(number), survivors, shares, signature)


@dataclass(frozen=True, slots=True)
class Answer:
    """A site's shares for one round.

    Attributes:
        statement: what it gave, signed.
        shares: 33 bytes for each site of the roster: of its self-mask secret if it is a survivor,
            else of its round key.
    """

    statement: Statement
    shares: bytes

    def share(self, number: int) -> bytes:
        """The share of a secret of the site with this number."""
        return self.shares[number * SHARE : (number + 1) * SHARE]

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        return _pack(_Kind.ANSWER, self.statement.to_bytes(), self.shares)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Reads what `to_bytes` made.

        Raises:
            MessageError: malformed, or the statement is about other shares.
        """
        statement, shares = _unpack(_Kind.ANSWER, content, 2)
        answer = cls(Statement.from_bytes(statement), shares)
        if hashlib.sha256(shares).digest() != answer.statement.shares or len(shares) % SHARE:
            raise _malformed("answer", f"{len(shares)} bytes of shares", "those it speaks of")
        return answer


def to_bits(numbers: Sequence[int], sites: int) -> bytes:
    """A set of site numbers as one bit each, site 0 in the most significant; unused bits are 0."""
    flags = np.zeros(sites, dtype=np.uint8)
    flags[list(numbers)] = 1
    return np.packbits(flags).tobytes()


def from_bits(bits: bytes, sites: int) -> frozenset[int]:
    """The set that `to_bits` made.

    Raises:
        MessageError: a length that does not fit, or a site beyond the last.
    """
    flags = np.unpackbits(np.frombuffer(bits, np.uint8))
    if len(bits) != (sites + 7) // 8 or flags[sites:].any():
        raise _malformed("survivors", f"{bits.hex()[:32]}", f"one bit for each of {sites} sites")
    return frozenset(np.flatnonzero(flags).tolist())


def pack_list(parts: Sequence[bytes]) -> bytes:
    """Several byte strings as one."""
    return _pack(_Kind.LIST, *parts)


def unpack_list(content: bytes, count: int | None = None) -> list[bytes]:
    """What `pack_list` made.

    Raises:
        MessageError: malformed, or not `count` of them.
    """
    return _unpack(_Kind.LIST, content, count)


def _pack(kind: _Kind, *fields: bytes) -> bytes:
    parts = [_MARK, bytes([kind])]
    for value in fields:
        parts += [len(value).to_bytes(8), value]
    return b"".join(parts)


def _unpack(
    kind: _Kind, content: bytes, count: int | None = None, at_least: int = 0
) -> list[bytes]:
    what = kind.name.lower()
    start = len(_MARK) + 1
    if content[:start] != _MARK + bytes([kind]):
        raise _malformed(what, content[:start].hex(), "the mark and kind of this message")
    fields = []
    while start < len(content):
        end = start + 8 + int.from_bytes(content[start : start + 8])
        if end > len(content) or len(content) - start < 8:
            raise _malformed(what, f"{len(content)} bytes", "as many as its fields say")
        fields.append(content[start + 8 : end])
        start = end
    if len(fields) < at_least or (count is not None and len(fields) != count):
        raise _malformed(what, f"{len(fields)} fields", str(count or f"at least {at_least}"))
    return fields


def _number(value: int) -> bytes:
    return value.to_bytes(8)


def _parse_number(field: bytes) -> int:
    if len(field) != 8 or field[0] > 0x7F:
        raise _malformed("number", field.hex()[:32], "8 bytes, below 2^63")
    return int.from_bytes(field)


def _name(field: bytes) -> str:
    if not NAME.fullmatch(field):
        raise _malformed("site name", repr(field[:64]), "lower-case letters, digits, hyphens")
    return field.decode("ascii")


def _check_sizes(what: str, *pairs: tuple[bytes, int]) -> None:
    for value, size in pairs:
        if len(value) != size:
            raise _malformed(what, f"{len(value)} bytes", f"{size} bytes")


def _malformed(what: str, found: object, allowed: str) -> MessageError:
    return MessageError(
        f"secure aggregation: {what}", found, allowed, "The message is malformed and was ignored."
    )


def _unmet(name: str, found: object, allowed: str) -> PlanError:
    return PlanError(
        f"secure aggregation: {name}", found, allowed, "Change the plan; nothing was sent."
    )
