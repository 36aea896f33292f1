"""The egress audit: what left the sites, byte by byte.

First the replies of the rehearsal, as the bytes that Flower puts on the network: each is explained
by the plan and the request to its last byte, is the one that the site's ledger committed, and holds
nothing twice. Then a shorter run whose data hold a canary string and a canary tensor, and rounds
that fail on purpose with the canary in the error: neither is in anything that left.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from numpy.typing import NDArray
from scipy.stats import binom, entropy

from fedgraft_client import site as site_module
from fedgraft_client.app import client_app
from fedgraft_client.entry import Entry, Kind
from fedgraft_client.runtime import Runtime
from fedgraft_client.site import Site, SiteConfig
from fedgraft_common.messages import (
    ADAPTER,
    EVALUATE,
    PLAN,
    ROUND,
    SecureStep,
    Status,
    TensorSpec,
    read_status,
    to_record,
)
from fedgraft_common.modality import take
from fedgraft_common.packing import PACKAGE, pack
from fedgraft_common.plan import Plan
from fedgraft_common.secure_terms import masked_schema
from fedgraft_simulations.audit.accounted import account_for, why_not
from fedgraft_simulations.audit.part import (
    AuditContext,
    Finding,
    PartResult,
    Report,
    Verdict,
    listed,
    worst,
)
from fedgraft_simulations.audit.planted import Canary, find
from fedgraft_simulations.audit.rehearsal import Exchange, Rehearsal, site_of
from fedgraft_simulations.audit.replaced import replaced
from fedgraft_simulations.local_grid import LocalGrid
from fedgraft_simulations.partition import partition

TRAIN = "train"
MOST_COORDINATES = 2048
"""Values of an update whose bytes are compared over all messages."""
REPEATED = 0.01
"""Share of values that may occur twice at one place: float32 has gaps, and rounds to them."""
ALARM = 1e-5
"""Of the test of single bits: the chance that it is false."""
LEAST_ENTROPY = 7.9
"""Bits in a byte that noise or masks fill; 8 would be all."""
PLANTED_ROUNDS = {"quick": 2, "full": 10}


@dataclass
class Egress:
    """What was seen of many replies.

    Attributes:
        messages: how many.
        bytes: of each kind: values, masks, form, envelope.
        unexplained: what is wrong, in words.
        uncommitted: replies that are not what the ledger committed, in words.
        words: how often each status left.
        digests: how often the same tensors left.
        sample: (updates, coordinates) uint32, the bits of values that left.
    """

    messages: int = 0
    bytes: Counter[str] = field(default_factory=Counter)
    unexplained: list[str] = field(default_factory=list)
    uncommitted: list[str] = field(default_factory=list)
    words: Counter[str] = field(default_factory=Counter)
    digests: Counter[str] = field(default_factory=Counter)
    sample: list[NDArray[np.uint32]] = field(default_factory=list)


class EgressPart:
    """See the module."""

    name = "egress"
    title = "What left the sites"

    def run(self, context: AuditContext, progress: Report) -> PartResult:
        """Looks at the rehearsal's replies, then plants canaries and looks again."""
        started = time.perf_counter()
        progress(0.0, "running the plan")
        run = context.rehearsal
        progress(0.5, "accounting for every byte")
        seen = look_at(run, context.random("egress", "coordinates"))
        directory = context.directory / self.name
        planted = plant(context, directory, lambda done: progress(0.6 + 0.4 * done, "canaries"))
        findings = (
            *_accounted(seen, run.plan), *_noise(seen, run.plan), *planted.findings(),
        )  # fmt: skip
        verdict = worst(findings)
        return PartResult(
            name=self.name,
            title=self.title,
            verdict=verdict,
            summary=_summary(verdict, seen, run),
            findings=findings,
            facts=_facts(seen, run),
            not_covered=(
                "What a dishonest program at a site hid inside its noise or its masks could not be "
                "told from noise and masks.",
                "When a message leaves is visible to the server; how long a round took may tell "
                "something about the number of records.",
                "Canaries are searched for as bytes. What an attacker can compute about a record "
                "from noised values is measured by the other parts.",
            ),
            seconds=time.perf_counter() - started,
        )


def look_at(run: Rehearsal, random: np.random.Generator) -> Egress:
    """Accounts for everything that crossed the grid in a run."""
    schema = schema_of(run)
    committed = [_committed(site.store.ledger.entries()) for site in run.sites]
    size = sum(math.prod(spec.shape) for spec in schema)
    chosen = np.sort(random.permutation(size)[:MOST_COORDINATES])
    seen = Egress()
    for exchange in run.exchanges():
        seen.messages += 1
        if (fault := why_not(exchange, schema)) is not None:
            seen.unexplained.append(fault)
            continue
        found = account_for(exchange, schema)
        seen.bytes.update(
            values=found.values, masks=found.masks, form=found.form, envelope=found.envelope
        )
        seen.words[found.status.value] += 1
        if not found.digest:
            continue
        if (exchange.kind, exchange.round, found.digest) not in committed[exchange.site]:
            seen.uncommitted.append(f"site {exchange.site}, round {exchange.round}")
        if exchange.kind == TRAIN:
            seen.digests[found.digest] += 1
            seen.sample.append(_values(exchange, schema)[chosen])
    return seen


def _committed(entries: list[Entry]) -> set[tuple[str, int, str]]:
    """What a ledger let out: message type, round, SHA-256."""
    bodies = {e.seq: e.body for e in entries if e.kind is Kind.RESERVE}
    steps = {step.value: step.message_type for step in SecureStep}
    found = set()
    for entry in entries:
        body, kind = entry.body, ""
        if entry.kind is Kind.COMMIT:
            reserved = bodies[int(body["reserve"])]
            if reserved["purpose"] == "start":  # class means, which stay at home
                continue
            kind = EVALUATE if reserved["purpose"] == "evaluate" else TRAIN
            found.add((kind, int(reserved["round"]), str(body["reply"])))
        elif entry.kind is Kind.SECURE and body["step"] in steps:
            kind = steps[str(body["step"])]
            found.add((kind, int(body["round"]), str(body["reply"])))
    return found


def schema_of(run: Rehearsal) -> tuple[TensorSpec, ...]:
    """The tensors that a site sends in a training round of a run."""
    bench = run.sites[0].bench(run.plan)
    schema = bench.adapted.schema
    return masked_schema(schema, bench.fixed_point(run.plan).bits) if run.plan.secure else schema


def _values(exchange: Exchange, schema: tuple[TensorSpec, ...]) -> NDArray[np.uint32]:
    """The bits of an update's values; of 64, the lower half."""
    record = exchange.reply.content.array_records[ADAPTER]
    flat = np.concatenate([record[spec.name].numpy().reshape(-1) for spec in schema])
    return flat.view(np.uint32)[:: flat.itemsize // 4]


def _accounted(seen: Egress, plan: Plan) -> Iterator[Finding]:
    total = sum(seen.bytes.values())
    wrong = listed(seen.unexplained)
    hidden = "masked" if plan.secure else "noised"
    masks = f"{seen.bytes['masks']:,} of keys and shares of masks, " if plan.secure else ""
    yield Finding(
        "Every byte that left is explained by the plan and the request",
        wrong or f"{seen.messages:,} messages, {total:,} bytes: {seen.bytes['values']:,} of "
        f"{hidden} values, {masks}{seen.bytes['form']:,} that say which tensor they are, "
        f"{seen.bytes['envelope']:,} that repeat the request or say the status; 0 others",
        "fail" if wrong else "pass",
        "Each reply is put together again from its tensors, the round and the status, and compared "
        "with the bytes on the network.", "bytes",
    )  # fmt: skip
    yield Finding(
        "A site says one word of a closed list, and nothing about its records",
        ", ".join(f"{word} {count:,} times" for word, count in sorted(seen.words.items())),
        "pass" if set(seen.words) <= {"ok", "kept"} else "fail",
        f"The list: {', '.join(Status)}. No loss, accuracy, count, duration or text of an error.",
        "status",
    )  # fmt: skip
    if plan.privacy.mechanism == "none":
        yield Finding(
            "Nothing left that the site's ledger had not been charged for",
            f"{len(seen.uncommitted):,} updates left uncharged: the plan runs without DP", "fail",
            name="committed",
        )  # fmt: skip
    else:
        wrong = listed(seen.uncommitted)
        yield Finding(
            "Nothing left that the site's ledger had not been charged for",
            f"not in the ledger: {wrong}" if wrong else "every message is one that the ledger "
            "holds, by its SHA-256",
            "fail" if wrong else "pass",
            "From the commits of the sites' signed ledgers.", "committed",
        )  # fmt: skip


def _noise(seen: Egress, plan: Plan) -> Iterator[Finding]:
    """Noise leaves marks on bytes: nothing occurs twice, and every bit is used."""
    twice = sum(count - 1 for count in seen.digests.values())
    sample = np.stack(seen.sample) if seen.sample else np.zeros((0, 0), np.uint32)
    repeated = _repeated(sample)
    octets = sample.view(np.uint8).reshape(*sample.shape, 4)
    used = range(4) if plan.secure else range(1)  # masks fill every byte, noise the last one
    counts = [np.bincount(octets[..., place].reshape(-1), minlength=256) for place in used]
    bits = min(float(entropy(found, base=2)) if sample.size else 0.0 for found in counts)
    enough = sample.size > 20_000  # fewer cannot fill 256 counters evenly
    private = plan.privacy.mechanism != "none"
    hidden = "Noise and masks are" if plan.secure else "Noise is"
    yield Finding(
        "No update left twice, and no value repeats",
        f"{twice} of {sum(seen.digests.values()):,} updates; {repeated:.3%} of the values at one "
        "place",
        "fail" if twice or repeated > REPEATED else "pass",
        f"{hidden} new in every message: equal bytes would be a value without any, or one that "
        "was used twice.", "duplicates",
    )  # fmt: skip
    chance = uneven(sample, 32 if plan.secure else 8)
    full = bits >= LEAST_ENTROPY or not enough
    verdict: Verdict = "pass" if full and chance > ALARM else "fail"
    where = "every byte of every value" if plan.secure else "the last byte of every value"
    yield Finding(
        f"Nothing but {'masks' if plan.secure else 'noise'} can be seen in {where}",
        f"{bits:.3f} of 8 bits of entropy",
        verdict if private else "info",
        f"Over {sample.size:,} values; there is no room for a message. Nor in any one place: "
        f"p-value of the most uneven bit of any value, over all messages, {chance:.2g}.",
        "entropy",
    )


def uneven(sample: NDArray[np.uint32], bits: int) -> float:
    """P-value of the bit that is most often, or most seldom, set: in one place, over all messages.

    Text in the last byte of a few values moves the entropy of all bytes by nothing; but letters
    have a bit that is never set.

    Args:
        sample: (messages, places) the bits of values.
        bits: how many of each value are looked at, from the last.
    """
    if sample.size == 0:
        return 1.0
    messages, places = sample.shape
    ones = np.stack([((sample >> np.uint32(bit)) & 1).sum(axis=0) for bit in range(bits)])
    most = int(np.maximum(ones, messages - ones).max())
    return float(min(1.0, 2 * bits * places * binom.sf(most - 1, messages, 0.5)))


def _repeated(sample: NDArray[np.uint32]) -> float:
    """Share of values that another message has at the same place."""
    if sample.shape[0] < 2:
        return 0.0
    ordered = np.sort(sample, axis=0)
    return float((ordered[1:] == ordered[:-1]).mean())


# -- canaries


@dataclass(frozen=True, slots=True)
class Planted:
    """A run with canaries.

    Attributes:
        messages: replies that were searched.
        needles: byte strings that were searched for.
        hits: where one was found, in words.
        failed: replies to requests that failed on purpose, and what is wrong with them.
        failures: how many.
        controls: leaks that were planted on purpose and that the search found, of `planted`.
        planted: how many were planted.
    """

    messages: int
    needles: int
    hits: tuple[str, ...]
    failed: tuple[str, ...]
    failures: int
    controls: int
    planted: int

    def findings(self) -> Iterator[Finding]:
        """What it shows."""
        wrong = listed(self.hits)
        yield Finding(
            "A text and a picture planted in a site's data never leave it",
            f"found: {wrong}" if wrong else f"{self.messages:,} messages searched for "
            f"{self.needles} byte strings, none found",
            "fail" if wrong else "pass",
            "The text is the site's, the data set's and a class's name and grey values of a "
            "record; the picture is a record, searched for raw and after the frozen layers, in "
            "five number formats.", "canaries",
        )  # fmt: skip
        wrong = listed(self.failed)
        yield Finding(
            "A round that fails says so in one word, without the reason",
            wrong or f"{self.failures} requests failed on purpose, with the planted text in the "
            "error: one word each",
            "fail" if wrong else "pass",
            "A malformed plan, an adapter out of range, and an error in the middle of training.",
            "failures",
        )  # fmt: skip
        yield Finding(
            "The search finds a leak where there is one",
            f"{self.controls} of {self.planted} leaks planted on purpose were found, and their "
            "bytes were not accounted for",
            "pass" if self.controls == self.planted else "fail",
            "The text and the picture, put into a copy of a real reply.", "positive control",
        )  # fmt: skip


def plant(context: AuditContext, directory: Path, progress: Any) -> Planted:
    """Runs some rounds at sites whose first one holds canaries, and searches all that left."""
    rounds = min(PLANTED_ROUNDS[context.effort], context.plan.rounds.count)
    plan = context.plan.replace({"rounds.count": rounds})
    runtime, shares = Runtime(context.device), partition(plan)
    canary = Canary.draw(shares[0].train, context.random("egress"))

    def site(number: int) -> Site:
        if number:
            return site_of(plan, directory, number, runtime)
        own = shares[0]
        classes = own.classes
        if classes:
            classes = (*classes[:-1], f"{classes[-1]} {canary.text}")
        task = own.spec.model_copy(update={"classes": classes}) if own.spec else None
        config = SiteConfig(canary.text, classes, own.train.unit_count, simulated=True, task=task)
        planted = canary.plant(own.train)
        return site_of(plan, directory, 0, runtime, planted, config, dataset=canary.text)

    run = Rehearsal.run(plan, directory, site, on_round=lambda n: progress(0.9 * n / rounds))
    bench = run.sites[0].bench(run.plan)
    cached = bench.cache(take(run.sites[0].records.inputs, slice(1)))
    needles = canary.needles((*cached, bench.features(run.initial, cached)))
    exchanges = [*run.exchanges()]
    provoked = list(_provoke(run, canary))
    hits = []
    for exchange in (*exchanges, *provoked):
        for wire in (exchange.sent, *_packed(exchange)):
            if (needle := find(needles, wire)) is not None:
                hits.append(f"site {exchange.site}, round {exchange.round}: {needle!r}")
    failed = [fault for exchange in provoked if (fault := why_not(exchange, ())) is not None]
    words = [read_status(exchange.reply) for exchange in provoked]
    failed += [f"a failing round said {word}" for word in words if word in (Status.OK, Status.KEPT)]
    found = [
        find(needles, leak.sent) is not None and why_not(leak, schema_of(run)) is not None
        for leak in _leaks(exchanges[-1], canary)
    ]
    return Planted(
        messages=len(exchanges) + len(provoked),
        needles=len(needles),
        hits=tuple(hits),
        failed=tuple(failed),
        failures=len(provoked),
        controls=sum(found),
        planted=len(found),
    )


def _packed(exchange: Exchange) -> Iterator[bytes]:
    """The tensors as a daemon sends them: packed into one array."""
    record = exchange.reply.content.array_records.get(ADAPTER)
    if record:
        yield pack(record)[PACKAGE].data


def _provoke(run: Rehearsal, canary: Canary) -> Iterator[Exchange]:
    """Requests that fail at the site with the canary."""

    def fail(*_: object) -> NoReturn:
        raise RuntimeError(f"record {canary.text} cannot be read: {canary.tensor.tolist()}")

    huge = {name: tensor + 1e6 for name, tensor in run.initial.items()}
    changes = {"name": f"{run.plan.name[:50]}-fails", "privacy.secure_aggregation": "summed"}
    plan = run.plan.replace(changes).canonical
    for text, adapter in (("{", run.initial), (plan, huge), (plan, run.initial)):
        grid = LocalGrid(client_app(lambda _: run.sites[0]), len(run.sites))
        content = RecordDict(
            {ADAPTER: to_record(adapter), PLAN: ConfigRecord({PLAN: text, ROUND: 1})}
        )
        request = Message(content, dst_node_id=1, message_type="train")
        silent = logging.getLogger("a failure on purpose")
        silent.disabled = True
        with replaced(site_module, "train_round", fail), replaced(site_module, "log", silent):
            (reply,) = grid.send_and_receive([request])
        wire = message_to_proto(reply).SerializeToString()
        yield Exchange(0, 1, "train", request, wire)


def _leaks(exchange: Exchange, canary: Canary) -> Iterator[Exchange]:
    """Copies of a reply with the canary in them."""
    text: dict[str, Any] = {"note": canary.text}
    tensor = to_record({"note": canary.tensor})
    for more in (ConfigRecord(text), tensor):
        reply = message_from_proto(ProtoMessage.FromString(exchange.sent))
        if isinstance(more, ArrayRecord):
            reply.content[ADAPTER] = more
        else:
            reply.content["note"] = more
        yield replace(exchange, sent=message_to_proto(reply).SerializeToString())


# -- words


def _summary(verdict: Verdict, seen: Egress, run: Rehearsal) -> str:
    if verdict == "fail" and run.plan.privacy.mechanism == "none":
        return "What left is what the plan names, but nothing in it is protected by noise."
    if verdict == "fail":
        return "Something left a site that should not have, or that nobody accounts for."
    return (
        f"Nothing left but what the plan names: all {sum(seen.bytes.values()):,} bytes in "
        f"{seen.messages:,} messages are accounted for, and what was planted in the data is not "
        "among them."
    )


def _facts(seen: Egress, run: Rehearsal) -> dict[str, Any]:
    schema = schema_of(run)
    return {
        "messages": seen.messages,
        "bytes": dict(seen.bytes),
        "status": dict(seen.words),
        "tensors": [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in schema],
        "unexplained": len(seen.unexplained),
        "uncommitted": len(seen.uncommitted),
    }
