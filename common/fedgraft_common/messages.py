"""The protocol: what a round's request and reply contain, and nothing else.

    request  server -> site   adapter   ArrayRecord   the current adapter
                              plan      ConfigRecord  {plan: canonical JSON, round: int,
                                                       signature: the operator's, hexadecimal}
    reply    site -> server   adapter   ArrayRecord   adapter (local), or gradient sum: noisy
                                                       (summed) or masked integers (real)
                              status    ConfigRecord  {round: int, status: str}

    final    server -> site   the same request, of message type "query", after the last round: the
                              adapter to keep; the reply is a status
    evaluate server -> site   the same request, of message type "evaluate"
    counts   site -> server   counts    MetricRecord  {correct: float, total: float}, noised
                              status    ConfigRecord  {round: int, status: str}
    secure   server -> site   a request with one more record, of message type "query.STEP" with a
                              step of secure aggregation, or a round's; empty adapter but there
                              secure    ConfigRecord  {message: bytes} (`secure_messages`)
             site -> server   secure    ConfigRecord  {message: bytes}
                              status    ConfigRecord  {round: int, status: str}

A reply with a status other than `ok` carries an empty adapter or no counts. The reasons behind a
refusal or
a failure stay in the site's log.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedgraft_common.errors import (
    AdapterError,
    AggregationError,
    ApprovalError,
    BackboneError,
    BudgetError,
    FedgraftError,
    GradientError,
    HoursError,
    IdentityError,
    MessageError,
    PlanError,
    PolicyError,
    PrivacyError,
    SealedError,
)

ADAPTER: Final = "adapter"
PLAN: Final = "plan"
STATUS: Final = "status"
ROUND: Final = "round"
COUNTS: Final = "counts"
EVALUATE: Final = "evaluate"
FINAL: Final = "query"
SIGNATURE: Final = "signature"
SECURE: Final = "secure"
MESSAGE: Final = "message"

Tensors = dict[str, torch.Tensor]

RANGE: Final = 16.0
"""How far an adapter's value may be from the initial one: public, and far beyond any training."""


class SecureStep(StrEnum):
    """The exchanges of secure aggregation beside a round's own, as Flower's query actions."""

    ADVERTISE = "advertise"  # terms -> the site's public keys
    SHARE = "share"  # everybody's keys -> encrypted shares
    ACCEPT = "accept"  # the peers' shares -> whose cannot be used, if any
    UNMASK = "unmask"  # whose inputs arrived -> one share of a secret of each site

    @property
    def message_type(self) -> str:
        """Flower's message type."""
        return f"query.{self.value}"


class Status(StrEnum):
    """All that a site ever says about how a round went. None of it depends on a private record,
    except that `failed` may follow from one; it says no more than that something broke.
    """

    OK = "ok"
    KEPT = "kept"  # the final adapter arrived
    RETIRED = "retired"  # the budget is used up, as was known in advance; the site is done
    MESSAGE = "refused-message"  # the request does not follow the protocol
    PLAN = "refused-plan"  # the plan is wrong or cannot be met here
    POLICY = "refused-policy"  # the site's own rules do not allow it
    BUDGET = "refused-budget"  # it would cost more privacy than the site has left
    APPROVAL = "refused-approval"  # the operator has not agreed yet; ask again later
    HOURS = "refused-hours"  # not at this time of day; ask again later
    SEALED = "refused-sealed"  # the site has left this run for good
    FAILED = "failed"  # anything else


_REASONS: tuple[tuple[type[FedgraftError], Status], ...] = (
    (BudgetError, Status.BUDGET),
    (ApprovalError, Status.APPROVAL),
    (HoursError, Status.HOURS),
    (SealedError, Status.SEALED),
    (PolicyError, Status.POLICY),
    (MessageError, Status.MESSAGE),
    (AggregationError, Status.MESSAGE),
    (IdentityError, Status.MESSAGE),
    (PlanError, Status.PLAN),
    (PrivacyError, Status.PLAN),
    (AdapterError, Status.PLAN),
    (BackboneError, Status.PLAN),
    (GradientError, Status.PLAN),
)


def status_of(error: Exception) -> Status:
    """What a site says when this went wrong; the error itself stays in its log."""
    return next((status for kind, status in _REASONS if isinstance(error, kind)), Status.FAILED)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and dtype of one tensor that may travel: float32, or uint32 and uint64 masked."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Request:
    """What a site receives in a round.

    Attributes:
        adapter: where the round starts.
        plan: canonical JSON.
        round: its number, from 1.
        signature: Ed25519 over the plan, hexadecimal; empty in a simulation.
        secure: a message of secure aggregation; empty if there is none.
    """

    adapter: ArrayRecord
    plan: str
    round: int
    signature: str = ""
    secure: bytes = b""


def to_record(tensors: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Tensors as a Flower record, in name order, so that equal tensors give equal bytes."""
    record = ArrayRecord()  # its constructor would copy every Array
    for name in sorted(tensors):
        record[name] = to_array(tensors[name])
    return record


def to_array(tensor: torch.Tensor) -> Array:
    """What `Array(ndarray)` gives, byte for byte, without the cost of numpy.save."""
    values = tensor.detach().cpu().contiguous().numpy()
    name = str(values.dtype)
    spec = TensorSpec("", values.shape, name)
    return Array(spec.dtype, spec.shape, "numpy.ndarray", _header(spec) + values.tobytes())


def digest(record: ArrayRecord) -> str:
    """SHA-256 over names and bytes of a record's arrays, in hexadecimal."""
    content = hashlib.sha256()
    for name in sorted(record):
        array = record[name]
        for part in (name, array.dtype, repr(tuple(array.shape)), array.stype):
            content.update(f"{len(part)}:{part}".encode())
        content.update(hashlib.sha256(array.data).digest())
    return content.hexdigest()


def from_record(record: ArrayRecord, schema: tuple[TensorSpec, ...]) -> Tensors:
    """Reads tensors, accepting exactly the schema.

    Args:
        record: what arrived.
        schema: the tensors the plan calls for.

    Returns:
        Tensors of the schema's dtypes by name.

    Raises:
        MessageError: a missing, extra, misshapen, mistyped or non-finite tensor.
    """
    names = {spec.name for spec in schema}
    if unexpected := sorted(set(record) - names):
        raise MessageError(
            f"adapter tensor {unexpected[0]}", "present", "only the plan's tensors",
            "The sender runs another plan or backbone; compare the plan hashes.",
        )  # fmt: skip
    tensors: Tensors = {}
    for spec in schema:
        if spec.name not in record:
            raise MessageError(
                f"adapter tensor {spec.name}", "missing", "every tensor of the plan",
                "The sender runs another plan or backbone; compare the plan hashes.",
            )  # fmt: skip
        array = record[spec.name]
        if array.stype != "numpy.ndarray":
            raise MessageError(
                f"adapter tensor {spec.name}", f"{array.stype} {array.dtype}", spec.dtype,
                "The message is malformed and was ignored.",
            )  # fmt: skip
        if array.dtype != spec.dtype or tuple(array.shape) != spec.shape:
            raise MessageError(
                f"adapter tensor {spec.name}", f"{array.dtype}{tuple(array.shape)}",
                f"{spec.dtype}{spec.shape}", "The message is malformed and was ignored.",
            )  # fmt: skip
        header = _header(spec)
        size = len(header) + spec.bytes
        if not array.data.startswith(header) or len(array.data) != size:
            raise MessageError(
                f"adapter tensor {spec.name}", f"{len(array.data)} bytes of another kind",
                f"{spec.dtype}{spec.shape} in {size} bytes of numpy's format",
                "The message is malformed and was ignored.",
            )  # fmt: skip
        kind = np.dtype(spec.dtype).newbyteorder("<")
        values = np.frombuffer(array.data, kind, offset=len(header)).reshape(spec.shape).copy()
        if not np.isfinite(values).all():
            raise MessageError(
                f"adapter tensor {spec.name}", "NaN or infinity", "finite values",
                "Lower the learning rate, or look for a faulty site.",
            )  # fmt: skip
        tensors[spec.name] = torch.from_numpy(values)
    return tensors


@lru_cache(maxsize=4096)
def _header(spec: TensorSpec) -> bytes:
    """The only bytes that a tensor of this spec can begin with in numpy's format.

    Comparing with them means that nothing a stranger sent is ever parsed.
    """
    file = io.BytesIO()
    facts = {"descr": np.dtype(spec.dtype).str, "fortran_order": False, "shape": spec.shape}
    np.lib.format.write_array_header_1_0(file, facts)
    return file.getvalue()


def check_range(adapter: Tensors, initial: Tensors) -> None:
    """Refuses an adapter that has left the public range around the plan's initial one.

    No training goes there; a dishonest server might, because products of huge values that cancel
    let float32 rounding, which depends on the batch, stand in for a clipped gradient.

    Raises:
        MessageError: names the tensor and its distance.
    """
    for name, tensor in adapter.items():
        distance = float((tensor - initial[name]).abs().max()) if tensor.numel() else 0.0
        if not distance <= RANGE:
            raise MessageError(
                f"adapter tensor {name}", f"{distance:g} away from the initial adapter",
                f"at most {RANGE:g}",
                "The server is dishonest, or the plan's step size is far too large.",
            )  # fmt: skip


def clamp(adapter: Tensors, initial: Tensors) -> Tensors:
    """The nearest adapter inside that range; post-processing, which costs no privacy."""
    return {
        name: torch.clamp(tensor, initial[name] - RANGE, initial[name] + RANGE)
        for name, tensor in adapter.items()
    }


def read_request(message: Message) -> Request:
    """Takes a request apart.

    Raises:
        MessageError: a record or a field is missing or has the wrong type.
    """
    content = message.content if message.has_content() else RecordDict()
    adapter = content.array_records.get(ADAPTER)
    config = content.config_records.get(PLAN)
    secure = content.config_records.get(SECURE)
    if adapter is None or config is None or len(content) != (2 if secure is None else 3):
        raise MessageError(
            "request", sorted(content), f"records {ADAPTER!r} and {PLAN!r}",
            "The server speaks another protocol; compare the versions.",
        )  # fmt: skip
    plan, number = config.get(PLAN), config.get(ROUND)
    if not isinstance(plan, str) or type(number) is not int or number < 1:
        raise MessageError(
            "request", sorted(config), f"{PLAN!r}: text and {ROUND!r}: a number from 1",
            "The server speaks another protocol; compare the versions.",
        )  # fmt: skip
    signature = config.get(SIGNATURE, "")
    if not isinstance(signature, str) or not set(config) <= {PLAN, ROUND, SIGNATURE}:
        raise MessageError(
            "request", sorted(config), f"{PLAN!r}, {ROUND!r} and {SIGNATURE!r}",
            "The server speaks another protocol; compare the versions.",
        )  # fmt: skip
    return Request(adapter, plan, number, signature, read_secure(secure) if secure else b"")


def read_secure(record: ConfigRecord | None) -> bytes:
    """A message of secure aggregation, and nothing else; `secure_messages` says what is in it.

    Raises:
        MessageError: other keys, or no bytes.
    """
    found = dict(record or {})
    message = found.get(MESSAGE)
    if len(found) != 1 or not isinstance(message, bytes):
        raise MessageError(
            SECURE, sorted(found), f"{MESSAGE!r}: bytes",
            "The message is malformed and was ignored.",
        )  # fmt: skip
    return message


def write_reply(
    request: Message, round_number: int, status: Status, adapter: ArrayRecord | None = None
) -> Message:
    """A site's answer: adapter tensors, round, status."""
    content = RecordDict(
        {
            ADAPTER: adapter if adapter is not None else ArrayRecord(),
            STATUS: ConfigRecord({ROUND: round_number, STATUS: status.value}),
        }
    )
    return Message(content, reply_to=request)


@dataclass(frozen=True, slots=True)
class Counts:
    """A released evaluation: both numbers carry noise.

    Attributes:
        correct: held-out units predicted correctly (an average for a unit with many records).
        total: held-out units.
    """

    correct: float
    total: float


def write_counts(
    request: Message, round_number: int, status: Status, counts: Counts | None = None
) -> Message:
    """A site's answer to a request for an evaluation."""
    numbers = {"correct": counts.correct, "total": counts.total} if counts else {}
    content = RecordDict(
        {
            COUNTS: MetricRecord(dict(numbers)),
            STATUS: ConfigRecord({ROUND: round_number, STATUS: status.value}),
        }
    )
    return Message(content, reply_to=request)


def write_secure(
    request: Message, round_number: int, status: Status, message: bytes | None = None
) -> Message:
    """A site's answer to a step of secure aggregation."""
    content = RecordDict(
        {
            SECURE: ConfigRecord({} if message is None else {MESSAGE: message}),
            STATUS: ConfigRecord({ROUND: round_number, STATUS: status.value}),
        }
    )
    return Message(content, reply_to=request)


def read_counts(record: MetricRecord | None) -> Counts:
    """Takes released counts, and nothing else.

    Raises:
        MessageError: other keys, or numbers that are not finite.
    """
    found = dict(record or {})
    correct, total = found.get("correct"), found.get("total")
    if len(found) != 2 or not isinstance(correct, float) or not isinstance(total, float):
        raise MessageError(
            COUNTS, sorted(found), "'correct' and 'total', two numbers",
            "The message is malformed and was ignored.",
        )  # fmt: skip
    if not (math.isfinite(correct) and math.isfinite(total)):
        raise MessageError(
            COUNTS, f"{correct}, {total}", "finite numbers", "The message was ignored."
        )
    return Counts(correct, total)


def read_status(reply: Message) -> Status:
    """The status of a reply; anything unreadable counts as failed."""
    if not reply.has_content():
        return Status.FAILED
    config = reply.content.config_records.get(STATUS)
    try:
        return Status(str(config[STATUS])) if config is not None else Status.FAILED
    except (KeyError, ValueError):
        return Status.FAILED
