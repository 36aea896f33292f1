"""The protocol: exact sums, hidden inputs, refused deviations. Long: the protocol is one file."""

from __future__ import annotations

import datetime as dt
import hashlib
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare, kstest

from fedgraft_common import secure_aggregation, shamir
from fedgraft_common.errors import (
    AggregationError,
    CheckpointError,
    IdentityError,
    MessageError,
    PlanError,
)
from fedgraft_common.secure_aggregation import (
    ADVERTISEMENT,
    STATEMENT,
    SecureRound,
    SecureServer,
    SecureSite,
    SiteState,
    check_roster,
)
from fedgraft_common.secure_messages import (
    Advertisement,
    Answer,
    Question,
    Roster,
    Terms,
    to_bits,
)
from fedgraft_common.site_signature import SiteKey
from fedgraft_simulations.secure_rounds import SecureRounds, Step
from fedgraft_simulations.throwaway_keys import (
    throwaway_authority,
    throwaway_key,
    throwaway_keys,
)

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
NAMES = [f"site-{i:02d}" for i in range(14)]
KEYS, TRUST = throwaway_keys(NAMES, NOW)
CONTEXT = hashlib.sha256(b"a model").digest()
Vector = NDArray[np.unsignedinteger[Any]]


def terms(n: int = 5, d: int = 1, c: int = 1, **changes: Any) -> Terms:
    return replace(Terms(bytes(32), bytes(16), 1, 2, 7, 32, n, d, c), **changes)


def secret(name: str, seed: int = 0) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


class Federation:
    """All parties, with their set-up done."""

    def __init__(self, agreed: Terms, seed: int = 0, names: list[str] = NAMES) -> None:
        self.terms = agreed
        self.names = names[: agreed.sites]
        self.server = SecureServer(agreed, TRUST)
        self.sites = {
            name: SecureSite(agreed, KEYS[name], secret(name, seed)) for name in self.names
        }
        for site in self.sites.values():
            self.server.add_advertisement(site.advertise())
        self.roster = self.server.close_roster()
        self.sharings = {name: site.share(self.roster, TRUST) for name, site in self.sites.items()}
        for sharing in self.sharings.values():
            self.server.add_sharing(sharing)
        for name, site in self.sites.items():
            site.accept(self.server.delivery(name))

    def __getitem__(self, number: int) -> SecureSite:
        return self.sites[self.names[number]]

    def round(self, number: int = 1) -> SecureRound:
        return SecureRound(self.terms, self.roster, number, CONTEXT)

    def inputs(self, seed: int = 0) -> dict[str, Vector]:
        values = np.random.default_rng(seed)
        kind, high = self.terms.dtype, 2**self.terms.bits
        return {
            name: values.integers(0, high, self.terms.length, dtype=kind) for name in self.names
        }

    def masked(self, round_: SecureRound, names: list[str], seed: int = 0) -> None:
        for name in names:
            values = self.inputs(seed)[name]
            round_.add_input(name, self.sites[name].mask(round_.number, values, CONTEXT))

    def question(self, numbers: set[int], number: int = 1) -> Question:
        return Question(self.roster.digest, number, to_bits(sorted(numbers), len(self.names)))


@pytest.fixture
def federation() -> Federation:
    return Federation(terms())


def wrapped(values: list[Vector]) -> list[int]:
    """The sum in Python's integers: slow and obvious."""
    modulus = 2 ** (8 * values[0].dtype.itemsize)
    return [sum(map(int, column)) % modulus for column in zip(*values, strict=True)]


# The sum is exact for every subset of dropouts that is allowed; else nothing comes out.


@st.composite
def agreements(draw: st.DrawFn) -> Terms:
    n = draw(st.integers(3, 14))
    d = draw(st.sampled_from([d for d in range(n) if d * (d + 1) < n]))
    c = draw(st.integers(0, n - d * (d + 1) - 1))
    return terms(
        n, d, c, rounds=draw(st.integers(1, 3)), first_round=draw(st.integers(1, 9)),
        length=draw(st.integers(1, 40)), bits=draw(st.sampled_from([32, 64])),
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(agreements(), st.data())
def test_the_sum_is_exact_or_the_round_is_aborted(agreed: Terms, data: st.DataObject) -> None:
    names = NAMES[: agreed.sites]
    away = data.draw(st.sets(st.sampled_from(names), max_size=agreed.dropouts), "not in the set-up")
    rounds = SecureRounds(
        agreed, {name: KEYS[name] for name in names}, TRUST, secret,
        dict.fromkeys(away, Step.ADVERTISE),
    )  # fmt: skip
    there = [name for name in names if name not in away]
    for number in range(agreed.first_round, agreed.last_round + 1):
        absent = data.draw(
            st.dictionaries(
                st.sampled_from(there), st.sampled_from([Step.MASK, Step.UNMASK]),
                max_size=agreed.dropouts + 1,
            ),
            "absent",
        )  # fmt: skip
        source = np.random.default_rng(data.draw(st.integers(0, 99)))
        high = data.draw(st.sampled_from([1, 2, 2**agreed.bits]))
        inputs: dict[str, Vector] = {
            name: source.integers(0, high, agreed.length, dtype=agreed.dtype) for name in there
        }
        given_ = [name for name in there if absent.get(name) is not Step.MASK]
        answering = len(there) - len(absent)
        if min(len(given_), answering) < agreed.needed:
            with pytest.raises(AggregationError, match="no site's input was revealed"):
                rounds.sum(number, inputs, b"a model", absent)
            continue
        total = rounds.sum(number, inputs, b"a model", absent)
        assert total.values.tolist() == wrapped([inputs[name] for name in given_])
        assert total.values.dtype == agreed.dtype
        assert list(total.survivors) == given_
        assert total.wrong == ()


@pytest.mark.parametrize("missing", [s for k in range(3) for s in combinations(range(5), k)])
def test_every_subset_of_dropouts(missing: tuple[int, ...], federation: Federation) -> None:
    """Before the masked input; d = 1, so two missing sites are too many."""
    round_ = federation.round()
    there = [name for i, name in enumerate(federation.names) if i not in missing]
    federation.masked(round_, there)
    if len(missing) > 1:
        with pytest.raises(AggregationError, match="inputs of round 1"):
            round_.close()
        return
    question = round_.close()
    for site in federation.sites.values():
        round_.add_answer(site.unmask(question))
    assert round_.total().values.tolist() == wrapped([federation.inputs()[n] for n in there])


def test_too_few_answers_open_nothing(federation: Federation) -> None:
    round_ = federation.round()
    federation.masked(round_, federation.names)
    question = round_.close()
    for number in range(3):
        round_.add_answer(federation[number].unmask(question))
    assert not round_.enough
    with pytest.raises(AggregationError, match="answers in round 1: found 3; allowed: at least 4"):
        round_.total()
    # The three answers fit every self-mask secret: with a fourth share chosen freely any would do.
    shares = [federation[i].unmask(question).share(4) for i in range(3)]
    found = {shamir.combine([0, 1, 2, 3], [*shares, bytes(32) + bytes([x])]) for x in range(50)}
    assert len(found) == 50


# A single masked input is uniform.


def test_a_masked_input_is_uniform_and_the_masks_are_fresh() -> None:
    agreed = terms(3, 1, 0, length=50_000, rounds=2)
    federation = Federation(agreed)
    zeros = np.zeros(agreed.length, np.uint32)
    seen = [
        federation[i].mask(number, zeros, CONTEXT) for number in (1, 2) for i in range(3)
    ]  # fmt: skip
    for masked in [*seen, *(seen[i] - seen[j] for i, j in combinations(range(6), 2))]:
        counts = np.bincount(np.frombuffer(masked.tobytes(), np.uint8), minlength=256)
        assert chisquare(counts).pvalue > 1e-5
        assert kstest(masked / 2**32, "uniform").pvalue > 1e-5
    # All masks but the self-masks cancel in the sum over all sites of one round, and only there.
    assert (seen[0] + seen[1] + seen[2] != 0).any()


def hkdf(secret_: bytes, salt: bytes, purpose: str, *numbers: int) -> bytes:
    info = f"fedgraft secure aggregation\n{purpose}\n".encode()
    info += b"".join(number.to_bytes(8) for number in numbers)
    return HKDF(hashes.SHA256(), 32, salt, info).derive(secret_)


def stream(key: bytes, agreed: Terms) -> Vector:
    """PRG: one encryption of zeros."""
    cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    content = cipher.update(bytes(agreed.length * agreed.bits // 8))
    return np.frombuffer(content, f"<u{agreed.bits // 8}")


@pytest.mark.parametrize("bits", [32, 64])
def test_against_the_equation(bits: int) -> None:
    """y_u = x_u + PRG(b_u) + sum_{v > u} PRG(k_uv) - sum_{v < u} PRG(k_uv), term by term."""
    agreed = terms(first_round=5, bits=bits)
    federation = Federation(agreed)
    salt = federation.roster.digest
    for number, u in ((5, 0), (5, 2), (6, 4)):
        x = federation.inputs()[NAMES[u]]
        b = hkdf(secret(NAMES[u]), agreed.digest, "round", 0, number)
        expected = x + stream(hkdf(b, salt, "self mask", number), agreed)
        sk = hkdf(secret(NAMES[u]), agreed.digest, "round", 1, number)
        for v in {0, 1, 2, 3, 4} - {u}:
            pk = X25519PrivateKey.from_private_bytes(
                hkdf(secret(NAMES[v]), agreed.digest, "round", 1, number)
            ).public_key()
            shared = X25519PrivateKey.from_private_bytes(sk).exchange(pk)
            pair = (min(u, v), max(u, v))
            mask = stream(hkdf(shared, salt + CONTEXT, "pair mask", number, *pair), agreed)
            expected = expected + mask if v > u else expected - mask
        assert federation[u].mask(number, x, CONTEXT).tolist() == expected.tolist()


def test_either_mask_alone_hides_an_input() -> None:
    """A late site, whose round key is opened, stays under its self-mask; a survivor, whose
    self-mask is opened, under the masks it shares with other honest sites.
    """
    agreed = terms(length=50_000)
    federation = Federation(agreed)
    zeros = np.zeros(agreed.length, np.uint32)
    masked = [federation[i].mask(1, zeros, CONTEXT) for i in range(5)]
    answers = [federation[i].unmask(federation.question({0, 1, 2, 3})) for i in range(4)]
    opened = [
        shamir.combine(range(4), [answer.share(dealer) for answer in answers])
        for dealer in range(5)
    ]
    salt = federation.roster.digest
    assert opened[4] is not None
    late = masked[4].copy()
    for peer in range(4):  # all the masks that the opened key tells
        own = X25519PrivateKey.from_private_bytes(opened[4])
        pk = X25519PublicKey.from_public_bytes(
            federation.roster.advertisements[peer].round_keys[:32]
        )
        late += stream(hkdf(own.exchange(pk), salt + CONTEXT, "pair mask", 1, peer, 4), agreed)
    bare = [late]
    for survivor in range(4):
        self_mask = opened[survivor]
        assert self_mask is not None
        bare.append(masked[survivor] - stream(hkdf(self_mask, salt, "self mask", 1), agreed))
    for hidden in bare:
        counts = np.bincount(np.frombuffer(hidden.tobytes(), np.uint8), minlength=256)
        assert chisquare(counts).pvalue > 1e-5
    # What is left at the late site is its self-mask and nothing else.
    b = federation[4]._round_secret(secure_aggregation._SELF_MASK, 1)
    assert (late == stream(hkdf(b, salt, "self mask", 1), agreed)).all()


def test_masks_that_are_not_fresh_would_be_noticed() -> None:
    """The statistic above can fail: the difference of two inputs under the same masks."""
    agreed = terms(3, 1, 0, length=50_000, rounds=2)
    zeros = np.zeros(agreed.length, np.uint32)
    a, b = (Federation(agreed)[0].mask(1, zeros + k, CONTEXT) for k in (0, 1))
    counts = np.bincount(np.frombuffer((b - a).tobytes(), np.uint8), minlength=256)
    assert chisquare(counts).pvalue < 1e-5


class Masks:
    """In place of the ChaCha20 streams: one uniform vector for each key, which may be shifted."""

    def __init__(self) -> None:
        self.by_key: dict[bytes, Vector] = {}
        self.shift: dict[bytes, Vector] = {}

    def add(self, vector: Vector, plus: list[bytes], minus: list[bytes]) -> None:
        for keys, operation in ((plus, np.add), (minus, np.subtract)):
            for key in keys:
                operation(vector, self.mask(key, vector), out=vector)

    def mask(self, key: bytes, like: Vector) -> Vector:
        if key not in self.by_key:
            high = 2 ** (8 * like.dtype.itemsize)
            source = np.random.default_rng(int.from_bytes(key))
            self.by_key[key] = source.integers(0, high, len(like), dtype=like.dtype)
        return self.by_key[key] + self.shift.get(key, np.zeros_like(like))


@pytest.mark.parametrize("bit", [0, 31])
@pytest.mark.parametrize(("one", "two"), [(0, 1), (3, 2)])
def test_the_server_sees_the_same_for_any_inputs_with_the_same_sum(
    monkeypatch: pytest.MonkeyPatch, bit: int, one: int, two: int
) -> None:
    """Flipping a bit of one site's input, with the sum kept by another's, changes nothing that the
    server sees, if the unknown mask between the two changes by as much: for uniform masks the two
    inputs are equally likely, whatever is seen.
    """
    masks = Masks()
    monkeypatch.setattr(secure_aggregation, "add_masks", masks.add)

    def view(inputs: dict[str, Vector]) -> list[bytes]:
        federation = Federation(terms())
        round_ = federation.round()
        seen = []
        for name in federation.names[:4]:  # one site is missing, and its key is opened
            masked = federation.sites[name].mask(1, inputs[name], CONTEXT)
            round_.add_input(name, masked)
            seen.append(masked.tobytes())
        question = round_.close()
        answers = [site.unmask(question) for site in federation.sites.values()]
        for answer in answers:
            round_.add_answer(answer)
        total = round_.total().values
        assert total.tolist() == wrapped([inputs[name] for name in federation.names[:4]])
        return [*seen, question.to_bytes(), *(a.to_bytes() for a in answers), total.tobytes()]

    federation = Federation(terms())
    before = federation.inputs()
    after = {name: values.copy() for name, values in before.items()}
    after[NAMES[one]][3] ^= np.uint32(1 << bit)
    change = after[NAMES[one]] - before[NAMES[one]]
    after[NAMES[two]] -= change
    expected = view(before)
    assert view(after) != expected  # the same masks: single masked inputs differ
    pair = secure_aggregation.pair_mask_key(
        X25519PrivateKey.from_private_bytes(
            federation[one]._round_secret(secure_aggregation._ROUND_KEY, 1)
        ),
        one, two, federation.roster, 0, 1, CONTEXT,
    )  # fmt: skip
    assert pair in masks.by_key
    masks.shift[pair] = -change if two > one else change
    assert view(after) == expected


# A server in the middle, and rosters.


def advertise(name: str, agreed: Terms, key: SiteKey | None = None) -> Advertisement:
    return SecureSite(agreed, key or KEYS[name], secret(name, 99)).advertise()


def swapped(roster: Roster, number: int, other: Advertisement) -> Roster:
    listed = list(roster.advertisements)
    listed[number] = other
    return Roster(tuple(listed))


def test_keys_replaced_by_the_server_are_refused_by_peers_and_by_the_owner() -> None:
    agreed = terms()
    sites = [SecureSite(agreed, KEYS[name], secret(name)) for name in NAMES[:5]]
    honest = Roster(tuple(site.advertise() for site in sites))
    mine = honest.advertisements[1]
    for forged in (
        replace(mine, round_keys=bytes(64)),
        replace(mine, sealing_key=honest.advertisements[0].sealing_key),
        replace(mine, commitments=bytes(64)),
        replace(mine, signature=honest.advertisements[0].signature),
    ):
        for site in (sites[0], sites[1]):
            with pytest.raises(MessageError, match="does not fit"):
                site.share(swapped(honest, 1, forged), TRUST)
    replayed = advertise(NAMES[1], agreed)  # signed by the site in an earlier set-up, same terms
    with pytest.raises(MessageError, match=f"keys of site {NAMES[1]}"):
        sites[1].share(swapped(honest, 1, replayed), TRUST)
    assert sites[1].roster is None


def test_a_certificate_that_the_ca_did_not_issue_is_refused() -> None:
    agreed = terms()
    foreign = throwaway_key(throwaway_authority(NOW), NAMES[1], NOW)
    site = SecureSite(agreed, KEYS[NAMES[0]], secret(NAMES[0]))
    honest = Roster((site.advertise(), *(advertise(name, agreed) for name in NAMES[1:5])))
    with pytest.raises(IdentityError, match=f"certificate of site {NAMES[1]}"):
        site.share(swapped(honest, 1, advertise(NAMES[1], agreed, foreign)), TRUST)
    assert site.roster is None


def test_one_site_under_two_names_is_refused() -> None:
    agreed = terms(3, 1, 0)
    authority = throwaway_authority(NOW)
    key = throwaway_key(authority, "a", NOW)
    public = key.key.public_key()
    second = SiteKey("b", authority.issue_site("b", public, dt.timedelta(days=1), NOW), key.key)
    third = throwaway_key(authority, "c", NOW)
    roster = Roster(tuple(advertise(k.name, agreed, k) for k in (key, second, third)))
    with pytest.raises(MessageError, match="one site under two names"):
        check_roster(roster, agreed, replace(TRUST, ca=authority.certificate))


def test_rosters_of_another_size_or_order_are_refused() -> None:
    agreed = terms()
    site = SecureSite(agreed, KEYS[NAMES[0]], secret(NAMES[0]))
    listed = (site.advertise(), *(advertise(name, agreed) for name in NAMES[1:6]))
    for wrong, text in (
        (listed[:3], "found 3; allowed: 4 to 5"),
        (listed, "found 6; allowed: 4 to 5"),
        ((*listed[1:4], listed[0]), "out of order"),
        ((*listed[:4], listed[3]), "one twice"),
    ):
        with pytest.raises(MessageError, match=text):
            site.share(Roster(wrong), TRUST)
    with pytest.raises(MessageError, match="one of the roster"):
        site.share(Roster(listed[1:]), TRUST)


@pytest.mark.parametrize(
    "other",
    [{"run": b"\1" * 32}, {"session": b"\1" * 16}, {"length": 8}, {"dropouts": 0}, {"rounds": 3}],
)
def test_keys_for_another_run_setup_or_plan_are_refused(other: dict[str, Any]) -> None:
    """A replayed set-up."""
    agreed = terms()
    site = SecureSite(agreed, KEYS[NAMES[0]], secret(NAMES[0]))
    old = advertise(NAMES[1], terms(**other))
    roster = Roster((site.advertise(), old, *(advertise(name, agreed) for name in NAMES[2:5])))
    with pytest.raises(MessageError, match="for another run, set-up or plan"):
        site.share(roster, TRUST)
    with pytest.raises(MessageError, match="for another run, set-up or plan"):
        SecureServer(agreed, TRUST).add_advertisement(old)


def test_a_wrong_number_of_round_keys_is_refused() -> None:
    unsigned = replace(advertise(NAMES[0], terms()), round_keys=bytes(32), commitments=bytes(32))
    signed = replace(unsigned, signature=KEYS[NAMES[0]].sign(ADVERTISEMENT, unsigned.signed))
    with pytest.raises(MessageError, match="found '32 bytes'; allowed: 64"):
        SecureServer(terms(), TRUST).add_advertisement(signed)


def test_a_whole_setup_that_is_replayed_to_a_site_is_refused() -> None:
    old = Federation(terms(), seed=1)
    site = SecureSite(old.terms, KEYS[NAMES[0]], secret(NAMES[0], 2))
    with pytest.raises(MessageError, match=f"keys of site {NAMES[0]}"):
        site.share(old.roster, TRUST)


def test_different_rosters_for_different_sites_are_refused() -> None:
    """A colluding site advertises two sets of keys and signs both rosters."""
    agreed = terms()
    sites = {name: SecureSite(agreed, KEYS[name], secret(name)) for name in NAMES[:5]}
    bad = NAMES[4]
    twin = SecureSite(agreed, KEYS[bad], secret(bad, 1))
    one = Roster(tuple(site.advertise() for site in sites.values()))
    two = swapped(one, 4, twin.advertise())
    halves = {name: one if i < 2 else two for i, name in enumerate(NAMES[:4])}
    sharings = {name: sites[name].share(roster, TRUST) for name, roster in halves.items()}
    for roster, colluder in ((one, sites[bad]), (two, twin)):
        sharings[bad] = colluder.share(roster, TRUST)
        server = SecureServer(agreed, TRUST)
        for advertisement in roster.advertisements:
            server.add_advertisement(advertisement)
        server.close_roster()
        server._sharings = dict(sharings)  # a dishonest server does not check
        for name in NAMES[:4]:
            text = "does not fit" if halves[name] is roster else "for another roster"
            with pytest.raises(MessageError, match=text):
                sites[name].accept(server.delivery(name))
            assert not sites[name].ready


def test_a_site_signs_one_roster_only() -> None:
    agreed = terms()
    site = SecureSite(agreed, KEYS[NAMES[0]], secret(NAMES[0]))
    one = Roster((site.advertise(), *(advertise(name, agreed) for name in NAMES[1:5])))
    assert site.share(one, TRUST) == site.share(one, TRUST)
    with pytest.raises(MessageError, match="the one this site signed before"):
        site.share(Roster(one.advertisements[:4]), TRUST)


# What is dealt at set-up.


def test_shares_that_were_changed_swapped_or_are_for_somebody_else_are_refused() -> None:
    federation = Federation(terms())
    site = SecureSite(federation.terms, KEYS[NAMES[0]], secret(NAMES[0]))
    site.share(federation.roster, TRUST)
    good = federation.server.delivery(NAMES[0])
    other = federation.server.delivery(NAMES[1]).ciphertexts[2]
    flipped = bytes([good.ciphertexts[2][0] ^ 1]) + good.ciphertexts[2][1:]
    for wrong in (flipped, other, good.ciphertexts[3], b"", good.ciphertexts[2][:-1]):
        listed = list(good.ciphertexts)
        listed[2] = wrong
        with pytest.raises(MessageError, match=f"shares of site {NAMES[2]}"):
            site.accept(replace(good, ciphertexts=tuple(listed)))
    for part in (
        replace(good, signatures=good.signatures[:4]),
        replace(good, ciphertexts=good.ciphertexts[:4]),
        replace(good, roster=bytes(32)),
        replace(good, signatures=(good.signatures[1], *good.signatures[1:])),
    ):
        with pytest.raises(MessageError):
            site.accept(part)
    assert not site.ready
    site.accept(good)
    assert site.ready


@pytest.mark.parametrize("content", [bytes(33), bytes(33 * 3) + b"\xff" * 33, b""])
def test_malformed_shares_of_a_dishonest_dealer_are_refused(content: bytes) -> None:
    """Properly encrypted by their sender, and still no shares."""
    federation = Federation(terms())
    site = SecureSite(federation.terms, KEYS[NAMES[0]], secret(NAMES[0]))
    site.share(federation.roster, TRUST)
    good = federation.server.delivery(NAMES[0])
    seal = federation[1]._seal(federation.roster, 1, 0)
    forged = ChaCha20Poly1305(seal).encrypt(bytes(12), content, None)
    listed = list(good.ciphertexts)
    listed[1] = forged
    with pytest.raises(MessageError, match="share"):
        site.accept(replace(good, ciphertexts=tuple(listed)))
    assert not site.ready


def test_the_server_refuses_shares_that_do_not_fit(federation: Federation) -> None:
    server = SecureServer(federation.terms, TRUST)
    for advertisement in federation.roster.advertisements:
        server.add_advertisement(advertisement)
    with pytest.raises(MessageError, match="roster"):
        server.add_sharing(federation.sharings[NAMES[0]])
    server.close_roster()
    good = federation.sharings[NAMES[0]]
    for wrong in (
        replace(good, site=NAMES[1]),  # from the wrong site
        replace(good, site=NAMES[7]),
        replace(good, roster=bytes(32)),
        replace(good, ciphertexts=good.ciphertexts[:4]),
        replace(good, ciphertexts=(b"x", *good.ciphertexts[1:])),
        replace(good, ciphertexts=(b"", b"", *good.ciphertexts[2:])),
        replace(good, signature=federation.sharings[NAMES[1]].signature),
    ):
        with pytest.raises(MessageError):
            server.add_sharing(wrong)
    with pytest.raises(AggregationError, match="sites that sent no shares"):
        server.delivery(NAMES[0])
    server.add_sharing(good)
    server.add_sharing(good)
    other = (b"", good.ciphertexts[2], *good.ciphertexts[2:])
    with pytest.raises(MessageError, match="others than before"):
        server.add_sharing(replace(good, ciphertexts=other))
    assert server.missing == set(NAMES[1:5])


def test_the_server_takes_one_set_of_keys_from_each_site_in_time() -> None:
    agreed = terms()
    server = SecureServer(agreed, TRUST)
    with pytest.raises(AggregationError, match="sites in the roster"):
        server.close_roster()
    for name in NAMES[:4]:
        server.add_advertisement(advertise(name, agreed))
        server.add_advertisement(advertise(name, agreed))
    again = SecureSite(agreed, KEYS[NAMES[0]], secret(NAMES[0])).advertise()
    with pytest.raises(MessageError, match="a second time"):
        server.add_advertisement(again)
    server.close_roster()
    with pytest.raises(MessageError, match="late"):
        server.add_advertisement(advertise(NAMES[4], agreed))
    full = SecureServer(agreed, TRUST)
    for name in NAMES[:5]:
        full.add_advertisement(advertise(name, agreed))
    with pytest.raises(MessageError, match="one too many"):
        full.add_advertisement(advertise(NAMES[5], agreed))
    assert server.advertised == set(NAMES[:4])
    assert server.close_roster().names == tuple(NAMES[:4])


# Masked inputs.


def test_a_second_masked_input_for_a_round_is_refused(federation: Federation) -> None:
    values = federation.inputs()[NAMES[0]]
    first = federation[0].mask(1, values, CONTEXT)
    assert (federation[0].mask(1, values, CONTEXT) == first).all()
    other = values.copy()
    other[0] ^= np.uint32(1)
    for again, context in ((other, CONTEXT), (values, bytes(32))):
        with pytest.raises(MessageError, match="a second one for round 1"):
            federation[0].mask(1, again, context)
    assert (federation[0].mask(1, values, CONTEXT) == first).all()


def test_a_replayed_round_is_refused(federation: Federation) -> None:
    values = federation.inputs()[NAMES[0]]
    federation[0].mask(2, values, CONTEXT)
    with pytest.raises(MessageError, match="a round from 2 on"):
        federation[0].mask(1, values, CONTEXT)


def test_a_round_is_over_once_it_was_unmasked(federation: Federation) -> None:
    """A site that was not heard of in time, and whose key was opened, keeps its input."""
    federation[0].unmask(federation.question({1, 2, 3, 4}))
    with pytest.raises(MessageError, match="not being unmasked yet"):
        federation[0].mask(1, federation.inputs()[NAMES[0]], CONTEXT)
    federation[0].mask(2, federation.inputs()[NAMES[0]], CONTEXT)


@pytest.mark.parametrize("number", [0, 3, -1])
def test_a_round_outside_the_setup_is_refused(federation: Federation, number: int) -> None:
    with pytest.raises(MessageError, match="1 to 2, as the set-up is for"):
        federation[0].mask(number, federation.inputs()[NAMES[0]], CONTEXT)
    question = replace(federation.question({1, 2, 3, 4}), round=max(number, 0))
    with pytest.raises(MessageError, match="1 to 2, as the set-up is for"):
        federation[0].unmask(question)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(6, np.uint32), np.zeros(8, np.uint32), np.zeros(7, np.uint64),
        np.zeros(7, np.int32), np.zeros(7, np.float32), np.zeros((7, 1), np.uint32),
        np.zeros(14, np.uint32)[::2], np.zeros(7, ">u4"), [0] * 7,
    ],
)  # fmt: skip
def test_a_vector_of_another_shape_or_kind_is_refused(federation: Federation, values: Any) -> None:
    with pytest.raises(MessageError, match=r"allowed: uint32\(7,\), contiguous"):
        federation[0].mask(1, values, CONTEXT)
    round_ = federation.round()
    with pytest.raises(MessageError, match="vector"):
        round_.add_input(NAMES[0], values)
    assert not round_.inputs
    federation[0].mask(1, federation.inputs()[NAMES[0]], CONTEXT)  # nothing was used up


def test_a_context_is_a_hash(federation: Federation) -> None:
    with pytest.raises(MessageError, match="context"):
        federation[0].mask(1, federation.inputs()[NAMES[0]], b"")


def test_different_models_for_different_sites_give_nothing(federation: Federation) -> None:
    """The masks do not cancel: what comes out is uniform."""
    round_ = federation.round()
    for name, values in federation.inputs().items():
        context = CONTEXT if name != NAMES[2] else hashlib.sha256(b"another").digest()
        round_.add_input(name, federation.sites[name].mask(1, values, context))
    question = round_.close()
    for site in federation.sites.values():
        round_.add_answer(site.unmask(question))
    wanted = wrapped(list(federation.inputs().values()))
    assert not set(round_.total().values.tolist()) & set(wanted)


def test_the_server_adds_one_input_of_a_site_in_time(federation: Federation) -> None:
    round_ = federation.round()
    federation.masked(round_, NAMES[:4])
    first = federation[0].mask(1, federation.inputs()[NAMES[0]], CONTEXT)
    round_.add_input(NAMES[0], first)  # repeated: not added again
    with pytest.raises(MessageError, match="a second one"):
        round_.add_input(NAMES[0], first + np.uint32(1))
    with pytest.raises(MessageError, match="one of the roster"):
        round_.add_input(NAMES[7], first)
    question = round_.close()
    late = federation[4].mask(1, federation.inputs()[NAMES[4]], CONTEXT)
    with pytest.raises(MessageError, match="late"):
        round_.add_input(NAMES[4], late)
    round_.add_input(NAMES[0], first)
    for site in federation.sites.values():  # the late site answers, too
        round_.add_answer(site.unmask(question))
    total = round_.total()
    assert total.survivors == tuple(NAMES[:4])
    assert total.values.tolist() == wrapped([federation.inputs()[n] for n in NAMES[:4]])


# Unmasking.


def test_both_secrets_of_a_site_are_never_given(federation: Federation) -> None:
    federation[0].mask(1, federation.inputs()[NAMES[0]], CONTEXT)
    first = federation[0].unmask(federation.question({0, 1, 2, 3}))
    assert federation[0].unmask(federation.question({0, 1, 2, 3})) == first
    for others in ({0, 1, 2, 4}, {0, 1, 2, 3, 4}, {1, 2, 3, 4}):
        with pytest.raises(MessageError, match="both secrets of a site are never given"):
            federation[0].unmask(federation.question(others))
    federation[0].unmask(federation.question({1, 2, 3, 4}, number=2))  # another round


def test_an_answer_has_one_share_of_each_site(federation: Federation) -> None:
    for site in federation.sites.values():
        site.mask(1, federation.inputs()[site.name], CONTEXT)
    answers = [site.unmask(federation.question({0, 1, 2, 4})) for site in federation.sites.values()]
    for dealer in range(5):
        shares = [answer.share(dealer) for answer in answers]
        kind = secure_aggregation._ROUND_KEY if dealer == 3 else secure_aggregation._SELF_MASK
        for holders in combinations(range(5), 4):
            secret_ = shamir.combine(holders, [shares[holder] for holder in holders])
            assert secret_ == federation[dealer]._round_secret(kind, 1)
        for fewer in combinations(range(5), 3):
            secret_ = shamir.combine(fewer, [shares[holder] for holder in fewer])
            assert secret_ != federation[dealer]._round_secret(kind, 1)


def test_nothing_that_leaves_holds_a_secret_in_the_clear(federation: Federation) -> None:
    """Neither a secret nor a share, but the shares an answer is made of."""
    site = federation[0]
    site.mask(1, federation.inputs()[NAMES[0]], CONTEXT)
    answer = site.unmask(federation.question({0, 1, 2, 3}))
    left = federation.roster.to_bytes()
    left += b"".join(sharing.to_bytes() for sharing in federation.sharings.values())
    secrets = [s._round_secret(kind, t) for s in federation.sites.values() for kind, t in KINDS]
    blobs = [blob for s in federation.sites.values() for blob in s._held]
    shares = [blob[at : at + 33] for blob in blobs for at in range(0, len(blob), 33)]
    assert len({*secrets, *shares}) == 5 * 4 + 5 * 5 * 4  # all different
    assert not any(value in left for value in [*secrets, *shares])
    assert not any(value in answer.to_bytes() for value in [*secrets, site._secret])
    given_ = {answer.share(dealer) for dealer in range(5)}
    assert sum(share in given_ for share in shares) == 5


def test_no_key_encrypts_twice(federation: Federation) -> None:
    pairs = [(u, v) for u in range(5) for v in range(5) if u != v]
    keys = {(u, v): federation[u]._seal(federation.roster, u, v) for u, v in pairs}
    assert len(set(keys.values())) == len(pairs)
    assert all(federation[v]._seal(federation.roster, u, v) == keys[u, v] for u, v in pairs)


KINDS = [(kind, t) for kind in (0, 1) for t in (1, 2)]


def test_too_few_survivors_are_refused(federation: Federation) -> None:
    federation[0].mask(1, federation.inputs()[NAMES[0]], CONTEXT)
    for survivors in ({0, 1, 2}, {0}, set()):
        with pytest.raises(MessageError, match="at least 4"):
            federation[0].unmask(federation.question(survivors))
    federation[0].unmask(federation.question({0, 1, 2, 3}))  # nothing was used up


@pytest.mark.parametrize("bits", [b"\xfc", b"\xff", b"", b"\xf0\x00"])
def test_survivors_that_are_no_sites_are_refused(federation: Federation, bits: bytes) -> None:
    with pytest.raises(MessageError, match="survivors"):
        federation[0].unmask(Question(federation.roster.digest, 1, bits))


def test_a_survivor_that_gave_nothing_refuses(federation: Federation) -> None:
    with pytest.raises(MessageError, match="only sites that gave an input"):
        federation[0].unmask(federation.question({0, 1, 2, 3}))
    federation[0].unmask(federation.question({1, 2, 3, 4}))


def test_a_question_under_another_setup_is_refused(federation: Federation) -> None:
    question = replace(federation.question({1, 2, 3, 4}), roster=bytes(32))
    with pytest.raises(MessageError, match="question"):
        federation[0].unmask(question)


def test_a_round_before_the_setup_is_complete_is_refused() -> None:
    federation = Federation(terms())
    site = SecureSite(federation.terms, KEYS[NAMES[0]], secret(NAMES[0]))
    for message in (
        lambda: site.accept(federation.server.delivery(NAMES[0])),
        lambda: site.mask(1, federation.inputs()[NAMES[0]], CONTEXT),
        lambda: site.unmask(federation.question({1, 2, 3, 4})),
    ):
        with pytest.raises(MessageError, match="first"):
            message()
    site.share(federation.roster, TRUST)
    with pytest.raises(MessageError, match="finish the set-up"):
        site.mask(1, federation.inputs()[NAMES[0]], CONTEXT)


def resigned(answer: Answer, **changes: Any) -> Answer:
    """A dishonest site signs what it likes."""
    shares = changes.pop("shares", answer.shares)
    digest = hashlib.sha256(shares).digest()
    unsigned = replace(answer.statement, shares=digest, signature=b"", **changes)
    signature = KEYS[unsigned.site].sign(STATEMENT, unsigned.signed)
    return Answer(replace(unsigned, signature=signature), shares)


def test_shares_from_the_wrong_site_or_for_something_else_are_refused(
    federation: Federation,
) -> None:
    round_ = federation.round()
    federation.masked(round_, NAMES[:5])
    good = federation[0].unmask(federation.question({0, 1, 2, 3, 4}))
    with pytest.raises(MessageError, match="early"):
        round_.add_answer(good)
    round_.close()
    for wrong in (
        replace(good, statement=replace(good.statement, site=NAMES[1])),  # another's signature
        resigned(good, site=NAMES[7]),  # not in the roster
        resigned(good, round=2),
        resigned(good, roster=bytes(32)),
        resigned(good, survivors=to_bits([0, 1, 2, 3], 5)),
        resigned(good, shares=good.shares[:-33]),
        resigned(good, shares=good.shares + bytes(33)),
        resigned(good, shares=b"\xff" * len(good.shares)),
        replace(good, shares=bytes(len(good.shares))),
    ):
        with pytest.raises(MessageError):
            round_.add_answer(wrong)
    assert not round_.answers
    round_.add_answer(good)
    round_.add_answer(good)
    with pytest.raises(MessageError, match="others than before"):
        round_.add_answer(resigned(good, shares=bytes(33) + good.shares[33:]))
    assert round_.answers == {NAMES[0]}
    assert round_.statements == (good.statement,)


@pytest.mark.parametrize("liars", [(0,), (4,), (2, 5), (7, 0)])
def test_wrong_shares_are_found_and_left_out(liars: tuple[int, ...]) -> None:
    federation = Federation(terms(8, 2, 1))
    round_ = federation.round()
    federation.masked(round_, NAMES[:7])
    question = round_.close()
    for number in range(8):
        answer = federation[number].unmask(question)
        if number in liars:
            answer = resigned(answer, shares=bytes(33) + answer.shares[33:-1] + b"\x07")
        round_.add_answer(answer)
    total = round_.total()
    assert total.values.tolist() == wrapped([federation.inputs()[n] for n in NAMES[:7]])
    blamed = {holder for holder, _ in total.wrong}
    assert blamed <= {NAMES[i] for i in liars}
    if min(liars) < 6:
        assert blamed


def test_too_many_wrong_shares_end_the_round_without_a_wrong_sum(federation: Federation) -> None:
    round_ = federation.round()
    federation.masked(round_, NAMES[:5])
    question = round_.close()
    for number in range(5):
        answer = federation[number].unmask(question)
        round_.add_answer(answer if number > 1 else resigned(answer, shares=bytes(33 * 5)))
    with pytest.raises(AggregationError, match="wrong shares"):
        round_.total()


# A server that names different survivors to different sites.


@cache
def _prepared(agreed: Terms) -> tuple[Federation, dict[str, SiteState]]:
    federation = Federation(agreed)
    return federation, {name: site.save() for name, site in federation.sites.items()}


def prepared(agreed: Terms) -> Federation:
    """A federation whose sites are fresh from the set-up."""
    federation, states = _prepared(agreed)
    for name, state in states.items():
        federation.sites[name] = SecureSite.restore(state, KEYS[name])
    return federation


def exposed(agreed: Terms, lists: dict[int, set[int]]) -> tuple[set[int], set[int]]:
    """Honest sites whose self-mask secret, and whose round key, the server and the last c sites
    can put together: by the shares that real sites give.
    """
    federation = prepared(agreed)
    n, t = agreed.sites, agreed.needed
    honest = range(n - agreed.colluders)
    answers: dict[int, list[tuple[int, bool, bytes]]] = {dealer: [] for dealer in honest}
    for number in honest:
        if number in lists[number]:
            federation[number].mask(1, federation.inputs()[NAMES[number]], CONTEXT)
        answer = federation[number].unmask(federation.question(lists[number]))
        for dealer in honest:
            answers[dealer].append((number, dealer in lists[number], answer.share(dealer)))
    masks: set[int] = set()
    keys: set[int] = set()
    for dealer in honest:
        for survivor, found in ((True, masks), (False, keys)):
            own = [(holder, share) for holder, kind, share in answers[dealer] if kind is survivor]
            for bad in range(n - agreed.colluders, n):  # colluders hand out everything
                start = (0 if survivor else 1) * shamir.SHARE
                own.append((bad, federation[bad]._held[dealer][start : start + shamir.SHARE]))
            if len(own) >= t:
                kind = secure_aggregation._SELF_MASK if survivor else secure_aggregation._ROUND_KEY
                secret_ = shamir.combine([h for h, _ in own[:t]], [s for _, s in own[:t]])
                assert secret_ == federation[dealer]._round_secret(kind, 1)
                found.add(dealer)
    return masks, keys


@settings(max_examples=40, deadline=None)
@given(agreements(), st.data())
def test_mixed_lists_open_no_second_sum(agreed: Terms, data: st.DataObject) -> None:
    n, d, c = agreed.sites, agreed.dropouts, agreed.colluders
    agreed = terms(n, d, c, rounds=1, length=1)
    favourites = data.draw(st.permutations(range(n)))[: d + 1]  # a clever server aims at a few
    lists = {
        number: set(range(n))
        - data.draw(st.sets(st.sampled_from([*favourites, *range(n)]), max_size=d))
        for number in range(n - c)
    }
    masks, keys = exposed(agreed, lists)
    assert not masks & keys
    assert len(keys) <= d
    assert n - c - len(keys) >= agreed.needed - c


@pytest.mark.parametrize(("n", "d", "c"), [(3, 1, 0), (4, 1, 1), (5, 1, 2)])
def test_mixed_lists_all_of_them(n: int, d: int, c: int) -> None:
    """Every way to name survivors to the honest sites."""
    allowed = [set(range(n)), *(set(range(n)) - {gone} for gone in range(n))]
    agreed = terms(n, d, c)
    for choice in product(allowed, repeat=n - c):
        masks, keys = exposed_by_counting(agreed, choice)
        assert not masks & keys and len(keys) <= d


def exposed_by_counting(agreed: Terms, lists: tuple[set[int], ...]) -> tuple[set[int], set[int]]:
    enough = agreed.needed - agreed.colluders
    honest = range(len(lists))
    return (
        {v for v in honest if sum(v in survivors for survivors in lists) >= enough},
        {v for v in honest if sum(v not in survivors for survivors in lists) >= enough},
    )


def test_counting_is_what_real_shares_allow() -> None:
    agreed = terms(6, 1, 2)
    source = random.Random(0)  # noqa: S311
    for _ in range(10):
        lists = {i: set(range(6)) - {source.choice([0, 1, 5])} for i in range(4)}
        assert exposed(agreed, lists) == exposed_by_counting(agreed, tuple(lists.values()))


def test_the_condition_on_dropouts_and_colluders_is_needed() -> None:
    """One step outside it a server gets both secrets of a site: each of two honest sites is told
    that the other is missing, the colluder has a share of everything.
    """
    with pytest.raises(PlanError):
        terms(3, 1, 1)
    outside = replace(terms(3, 1, 0))
    object.__setattr__(outside, "colluders", 1)
    masks, keys = exposed_by_counting(outside, ({0, 2}, {1, 2}))
    assert masks == keys == {0, 1}


# Aborts and restarts.


@pytest.mark.parametrize("step", [Step.SHARE, Step.ACCEPT, Step.MASK, Step.UNMASK, Step.ADVERTISE])
def test_a_site_that_goes_away_at_each_step(step: Step) -> None:
    agreed = terms()
    keys = {name: KEYS[name] for name in NAMES[:5]}
    in_setup = {NAMES[2]: step} if step in (Step.ADVERTISE, Step.SHARE, Step.ACCEPT) else {}
    in_round = {NAMES[2]: step} if step in (Step.MASK, Step.UNMASK) else {}
    if step is Step.SHARE:
        with pytest.raises(AggregationError, match=f"sent no shares.*{NAMES[2]}"):
            SecureRounds(agreed, keys, TRUST, secret, in_setup)
        return
    rounds = SecureRounds(agreed, keys, TRUST, secret, in_setup)
    inputs = {name: np.full(7, 1, np.uint32) for name in rounds.sites}
    total = rounds.sum(1, inputs, b"", in_round)
    expected = 5 if step is Step.UNMASK else 4
    assert total.values.tolist() == [expected] * 7
    back = rounds.sum(2, inputs)  # without a new set-up
    assert back.values.tolist() == [4 if in_setup else 5] * 7


@pytest.mark.parametrize("renewed", [False, True])
def test_a_killed_site_gives_every_answer_again_byte_for_byte(renewed: bool) -> None:
    """The state is saved and restored before every step, and every step is done twice."""
    agreed = terms()
    plain = Federation(agreed)
    values = plain.inputs()[NAMES[0]]
    key = KEYS[NAMES[0]]
    if renewed:
        authority = throwaway_authority(NOW)
        public = key.key.public_key()
        certificate = authority.issue_site(NAMES[0], public, dt.timedelta(days=1), NOW)
        key = SiteKey(NAMES[0], certificate, key.key)

    def killed(site: SecureSite) -> SecureSite:
        return SecureSite.restore(site.save(), key)

    def accepted(site: SecureSite) -> bytes:
        site.accept(plain.server.delivery(NAMES[0]))
        return site.save().setup

    site = SecureSite(agreed, KEYS[NAMES[0]], secret(NAMES[0]))
    steps: list[Callable[[SecureSite], bytes]] = [
        lambda s: s.advertise().to_bytes(),
        lambda s: s.share(plain.roster, TRUST).to_bytes(),
        accepted,
        lambda s: s.mask(1, values, CONTEXT).tobytes(),
        lambda s: s.unmask(plain.question({0, 1, 2, 3})).to_bytes(),
        lambda s: s.mask(2, values, CONTEXT).tobytes(),
        lambda s: s.unmask(plain.question({1, 2, 3, 4}, 2)).to_bytes(),
    ]
    for step in steps:
        site = killed(site)
        first = step(site)
        assert step(killed(site)) == first
        assert step(plain.sites[NAMES[0]]) == first
    with pytest.raises(MessageError, match="never given"):
        killed(site).unmask(plain.question({0, 1, 2, 3, 4}))
    with pytest.raises(MessageError, match="unmasked"):
        killed(site).mask(2, values + np.uint32(1), CONTEXT)
    assert killed(site).last_masked == 2
    assert [s.round for s in killed(site).statements()] == [1, 2]
    assert killed(site).save() == site.save()


def test_a_second_input_is_refused_after_a_restart(federation: Federation) -> None:
    values = federation.inputs()[NAMES[0]]
    federation[0].mask(1, values, CONTEXT)
    again = SecureSite.restore(federation[0].save(), KEYS[NAMES[0]])
    with pytest.raises(MessageError, match="a second one for round 1"):
        again.mask(1, values + np.uint32(1), CONTEXT)


def test_what_a_round_adds_to_the_state_is_small(federation: Federation) -> None:
    before = federation[0].save()
    federation[0].mask(1, federation.inputs()[NAMES[0]], CONTEXT)
    federation[0].unmask(federation.question({0, 1, 2, 3}))
    after = federation[0].save()
    assert after.setup == before.setup
    assert len(after.rounds) - len(before.rounds) < 100


def test_a_new_setup_is_for_rounds_without_an_input(federation: Federation) -> None:
    site = federation[0]
    site.mask(1, federation.inputs()[NAMES[0]], CONTEXT)
    key, own = KEYS[NAMES[0]], secret(NAMES[0], 1)
    with pytest.raises(MessageError, match="found 1; allowed: one after 1"):
        SecureSite(federation.terms, key, own, site.last_masked)
    later = SecureSite(replace(federation.terms, first_round=2), key, own, site.last_masked)
    assert SecureSite.restore(later.save(), key).last_masked == 1  # also before it masks anything


def test_a_damaged_or_foreign_state_is_refused(federation: Federation) -> None:
    state = federation[0].save()
    for damaged in (
        replace(state, setup=state.setup[:-1]),
        replace(state, rounds=b""),
        SiteState(b"", b""),
    ):
        with pytest.raises(CheckpointError, match="state of secure aggregation"):
            SecureSite.restore(damaged, KEYS[NAMES[0]])
    with pytest.raises(CheckpointError, match=f"that of site {NAMES[0]}"):
        SecureSite.restore(state, KEYS[NAMES[1]])
    authority = throwaway_authority(NOW)
    with pytest.raises(CheckpointError, match="another key"):
        SecureSite.restore(state, throwaway_key(authority, NAMES[0], NOW))
    with pytest.raises(ValueError, match="bytes of secret"):
        SecureSite(federation.terms, KEYS[NAMES[0]], b"short")


def test_a_killed_server_goes_on_where_it_was() -> None:
    agreed = terms()
    plain = Federation(agreed)
    server = SecureServer(agreed, TRUST)

    def killed() -> SecureServer:
        return SecureServer.restore(server.save(), TRUST)

    for advertisement in plain.roster.advertisements:
        server.add_advertisement(advertisement)
        server = killed()
    assert server.close_roster() == plain.roster
    for sharing in plain.sharings.values():
        server = killed()
        server.add_sharing(sharing)
    assert killed().delivery(NAMES[0]) == plain.server.delivery(NAMES[0])
    round_ = plain.round()
    for name in NAMES[:4]:
        plain.masked(round_, [name])
        round_ = SecureRound.restore(round_.save(), agreed, killed().roster)
    question = round_.close()
    for site in plain.sites.values():
        round_ = SecureRound.restore(round_.save(), agreed, plain.roster)
        assert round_.close() == question
        round_.add_answer(site.unmask(question))
    total = SecureRound.restore(round_.save(), agreed, plain.roster).total()
    assert total.values.tolist() == wrapped([plain.inputs()[n] for n in NAMES[:4]])
    for state, restore in (
        (round_.save()[:-1], lambda s: SecureRound.restore(s, agreed, plain.roster)),
        (round_.save(), lambda s: SecureRound.restore(s, terms(length=8), plain.roster)),
        (server.save()[:-1], lambda s: SecureServer.restore(s, TRUST)),
    ):
        with pytest.raises(CheckpointError, match="Start a new set-up"):
            restore(state)


def test_a_key_of_small_order_stops_nobody() -> None:
    """Its owner is dishonest; honest sites mask with what it knows anyway, and the sum over the
    others stays out of reach only while its key cannot be opened.
    """
    agreed = terms()
    bad = SecureSite(agreed, KEYS[NAMES[4]], secret(NAMES[4]))
    unsigned = replace(bad.advertise(), round_keys=bytes(64), signature=b"")
    forged = replace(unsigned, signature=KEYS[NAMES[4]].sign(ADVERTISEMENT, unsigned.signed))
    sites = [SecureSite(agreed, KEYS[name], secret(name)) for name in NAMES[:4]]
    roster = Roster((*(site.advertise() for site in sites), forged))
    sharings = [site.share(roster, TRUST) for site in sites]
    bad.advertise = lambda: forged  # type: ignore[method-assign]
    sharings.append(bad.share(roster, TRUST))
    server = SecureServer(agreed, TRUST)
    for advertisement in roster.advertisements:
        server.add_advertisement(advertisement)
    server.close_roster()
    for sharing in sharings:
        server.add_sharing(sharing)
    for site in sites:
        site.accept(server.delivery(site.name))
    zeros = np.zeros(7, np.uint32)
    round_ = SecureRound(agreed, roster, 1, CONTEXT)
    for site in sites:
        round_.add_input(site.name, site.mask(1, zeros, CONTEXT))
    question = round_.close()
    for site in sites:
        round_.add_answer(site.unmask(question))
    with pytest.raises(AggregationError, match=f"secret of site {NAMES[4]}"):
        round_.total()
