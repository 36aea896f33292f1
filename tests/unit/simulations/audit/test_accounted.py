"""A byte that plan and request do not explain is found, wherever it hides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto

from fedgraft_client.egress import digest_counts, guard, guard_counts, guard_secure
from fedgraft_common.errors import FedgraftError
from fedgraft_common.messages import (
    ADAPTER,
    COUNTS,
    STATUS,
    Counts,
    SecureStep,
    Status,
    TensorSpec,
    digest,
    to_record,
    write_counts,
    write_reply,
    write_secure,
)
from fedgraft_common.secure_messages import Sharing
from fedgraft_simulations.audit.accounted import SECURE_STEPS, account_for, why_not
from fedgraft_simulations.audit.rehearsal import Exchange
from fedgraft_simulations.local_grid import LocalGrid

SCHEMA = (TensorSpec("a", (3,)), TensorSpec("b", (2, 2)))
TENSORS = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.eye(2)}


@pytest.fixture(autouse=True)
def _in_a_run() -> None:
    """Flower's messages belong to a run."""
    LocalGrid(ClientApp(), 1)


def request(kind: str = "train") -> Message:
    asked = Message(RecordDict(), dst_node_id=3, message_type=kind)
    asked.metadata.__dict__["_message_id"] = "message-7"
    return asked


def as_sent(asked: Message, reply: Message, kind: str = "train") -> Exchange:
    return Exchange(2, 5, kind, asked, message_to_proto(reply).SerializeToString())


def ok(asked: Message) -> Message:
    record = to_record(TENSORS)
    reply = write_reply(asked, 5, Status.OK, record)
    return guard(reply, asked, 5, SCHEMA, digest(record))


def test_an_update_is_explained_to_the_last_byte() -> None:
    asked = request()
    exchange = as_sent(asked, ok(asked))
    found = account_for(exchange, SCHEMA)
    assert found.total == len(exchange.sent) == found.values + found.form + found.envelope
    assert found.values == 4 * (3 + 4)
    assert found.status is Status.OK
    assert found.digest == digest(to_record(TENSORS))


@pytest.mark.parametrize("status", [Status.FAILED, Status.KEPT, Status.BUDGET])
def test_a_word_is_explained(status: Status) -> None:
    asked = request()
    reply = guard(write_reply(asked, 5, status), asked, 5)
    found = account_for(as_sent(asked, reply), SCHEMA)
    assert (found.values, found.form, found.digest) == (0, 0, "")
    assert found.status is status


def test_counts_are_explained() -> None:
    asked = request("evaluate")
    counts = Counts(12.5, 40.25)
    reply = write_counts(asked, 5, Status.OK, counts)
    reply = guard_counts(reply, asked, 5, digest_counts(counts))
    found = account_for(as_sent(asked, reply, "evaluate"), SCHEMA)
    assert found.values == 16
    assert found.digest == digest_counts(counts)


def extra_record(reply: Message) -> None:
    reply.content["note"] = ConfigRecord({"name": "Anna"})


def extra_key(reply: Message) -> None:
    reply.content.config_records[STATUS]["loss"] = 0.25


def extra_tensor(reply: Message) -> None:
    reply.content.array_records[ADAPTER]["c"] = to_record({"c": torch.ones(1)})["c"]


def extra_metrics(reply: Message) -> None:
    reply.content[COUNTS] = MetricRecord({"correct": 1.0})


def other_round(reply: Message) -> None:
    reply.content.config_records[STATUS]["round"] = 6


def own_clock(reply: Message) -> None:
    reply.metadata.__dict__["_created_at"] = 1e9


def own_ttl(reply: Message) -> None:
    reply.metadata.ttl = 12.0


def double_precision(reply: Message) -> None:
    reply.content.array_records[ADAPTER]["a"] = to_record({"a": torch.ones(3).double()})["a"]


@pytest.mark.parametrize(
    "leak",
    [extra_record, extra_key, extra_tensor, extra_metrics, other_round, own_clock, own_ttl,
     double_precision],
)  # fmt: skip
def test_anything_else_is_found(leak: Callable[[Message], None]) -> None:
    asked = request()
    reply = ok(asked)
    leak(reply)
    exchange = as_sent(asked, reply)
    with pytest.raises(FedgraftError):
        account_for(exchange, SCHEMA)
    assert why_not(exchange, SCHEMA)


def test_bytes_after_the_message_and_bytes_that_are_none_are_found() -> None:
    asked = request()
    exchange = as_sent(asked, ok(asked))
    unknown_field = b"\xfa\x3e\x06secret"  # field 1007, which Flower does not have
    hidden = Exchange(2, 5, "train", asked, exchange.sent + unknown_field)
    assert "bytes" in (why_not(hidden, SCHEMA) or "")
    assert why_not(Exchange(2, 5, "train", asked, b"\xff\xff"), SCHEMA)


def test_an_error_text_instead_of_a_reply_is_found() -> None:
    asked = request()
    reply = Message(Error(0, "no file /data/Anna.npz"), reply_to=asked)
    assert why_not(as_sent(asked, reply), SCHEMA)


@pytest.mark.parametrize(
    ("message", "explained"),
    [
        (Sharing("a", b"r" * 32, (b"", b"c" * 82, b"c" * 82), b"s" * 64).to_bytes(), True),
        (Sharing("a", b"r" * 32, (b"", b"c" * 82, b"c" * 99), b"s" * 64).to_bytes(), False),
        (Sharing("a", b"r" * 32, (b"", b"c" * 82), b"s" * 64).to_bytes() + b"more", False),
        (b"age 47, diabetic", False),
    ],
)
def test_a_message_of_secure_aggregation_is_its_fields_and_no_more(
    message: bytes, explained: bool
) -> None:
    asked = request("query.share")
    reply = guard_secure(write_secure(asked, 5, Status.OK, message), asked, 5, lambda _: True)
    exchange = as_sent(asked, reply, "query.share")
    assert (why_not(exchange, SCHEMA) is None) is explained


def test_every_step_of_secure_aggregation_has_a_form() -> None:
    assert set(SECURE_STEPS) == {step.message_type for step in SecureStep}
