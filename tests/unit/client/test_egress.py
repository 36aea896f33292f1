"""Everything but the accounted adapter is stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedgraft_client.egress import guard, guard_package
from fedgraft_common.errors import EgressError, MessageError
from fedgraft_common.messages import Status, TensorSpec, digest, to_record, write_reply
from fedgraft_common.packing import pack

SCHEMA = (TensorSpec("a.lora_B.weight", (3, 2)), TensorSpec("b.weight", (4,)))
ADAPTER = {"a.lora_B.weight": torch.randn(3, 2), "b.weight": torch.randn(4)}


def request() -> Message:
    TaskIdentity.run_id = TaskIdentity.task_id = 1
    TaskIdentity.node_id = 0
    message = Message(RecordDict(), dst_node_id=7, message_type="train")
    message.metadata.__dict__["_message_id"] = "request"
    return message


def reply(status: Status = Status.OK, number: int = 3) -> Message:
    adapter = to_record(ADAPTER) if status is Status.OK else None
    return write_reply(request(), number, status, adapter)


COMMITTED = digest(to_record(ADAPTER))


def test_the_accounted_adapter_passes() -> None:
    made = reply()
    assert guard(made, request(), 3, SCHEMA, COMMITTED) is made


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.OK])
def test_a_status_without_tensors_passes(status: Status) -> None:
    made = reply(status)
    assert guard(made, request(), 3) is made
    assert guard(made, request(), 3, SCHEMA, COMMITTED) is made


def arrays(made: Message) -> ArrayRecord:
    return made.content.array_records["adapter"]


def config(made: Message) -> Any:
    return made.content.config_records["status"]


def array(values: Any, dtype: Any = np.float32) -> Array:
    return Array(np.asarray(values, dtype=dtype))


def put(where: Callable[[Message], Any], key: str, value: object) -> Callable[[Message], None]:
    def change(made: Message) -> None:
        where(made)[key] = value

    return change


def rename(old: str, new: str) -> Callable[[Message], None]:
    def change(made: Message) -> None:
        record = arrays(made)
        record[new] = record[old]
        del record[old]

    return change


def flip(made: Message) -> None:
    values = arrays(made)["b.weight"].numpy().copy()
    values[0] = np.nextafter(values[0], np.float32(9))
    arrays(made)["b.weight"] = Array(values)


def smuggle_behind(made: Message) -> None:
    plain = arrays(made)["b.weight"]
    arrays(made)["b.weight"] = Array(plain.dtype, plain.shape, plain.stype, plain.data + b"4711")


def huge_header(made: Message) -> None:
    plain = arrays(made)["b.weight"]
    data = plain.data.replace(b"'shape': (4,)", b"'shape': (4,), 'x': 1")
    arrays(made)["b.weight"] = Array(plain.dtype, plain.shape, plain.stype, data)


def drop(key: str) -> Callable[[Message], None]:
    def change(made: Message) -> None:
        del made.content[key]

    return change


def replace_adapter(made: Message) -> None:
    del made.content["adapter"]
    made.content["adapter"] = MetricRecord({"loss": 1.0})


ATTACKS: dict[str, tuple[Callable[[Message], object], str]] = {
    "a head tensor": (put(arrays, "head.linear.weight", array([1, 2])), "head.linear.weight"),
    "a renamed head": (rename("b.weight", "head.linear.bias"), "head.linear.bias"),
    "a head under an adapter's name": (put(arrays, "b.weight", array([9, 9, 9, 9])), "SHA-256"),
    "one bit of another adapter": (flip, "SHA-256"),
    "a missing tensor": (lambda made: arrays(made).pop("b.weight"), "missing"),
    "another shape": (put(arrays, "b.weight", array([[1, 2], [3, 4]])), "float32(2, 2)"),
    "another dtype": (put(arrays, "b.weight", array([1, 2, 3, 4], np.float64)), "float64"),
    "NaN": (put(arrays, "b.weight", array([1, 2, 3, np.nan])), "NaN"),
    "infinity": (put(arrays, "b.weight", array([1, 2, 3, np.inf])), "NaN or infinity"),
    "bytes behind the values": (smuggle_behind, "another kind"),
    "bytes in numpy's header": (huge_header, "another kind"),
    "a metric": (
        put(lambda m: m.content, "metrics", MetricRecord({"loss": 0.25})), "metrics",
    ),
    "an extra record": (
        put(lambda m: m.content, "more", ConfigRecord({"num-examples": 12})), "more",
    ),
    "a missing status": (drop("status"), "adapter"),
    "a missing adapter": (drop("adapter"), "status"),
    "an extra key": (put(config, "accuracy", 0.93), "accuracy"),
    "a float for the round": (put(config, "round", 3.14159), "3.14159"),
    "bytes for the round": (put(config, "round", b"4711"), "4711"),
    "a truth value for the round": (put(config, "round", True), "True"),
    "another round": (put(config, "round", 4711), "4711"),
    "a status in other words": (put(config, "status", "failed: patient 4711"), "patient 4711"),
    "a float for the status": (put(config, "status", 0.93), "0.93"),
    "metrics in the adapter's place": (replace_adapter, "another kind"),
}  # fmt: skip


@pytest.mark.parametrize(("attack", "words"), ATTACKS.values(), ids=ATTACKS.keys())
def test_everything_else_is_stopped(attack: Callable[[Message], object], words: str) -> None:
    made = reply()
    attack(made)
    with pytest.raises(EgressError) as caught:
        guard(made, request(), 3, SCHEMA, COMMITTED)
    assert words in str(caught.value)
    assert "Nothing left the site" in str(caught.value)


def test_what_the_ledger_does_not_know_is_stopped() -> None:
    with pytest.raises(EgressError, match="one that the ledger committed"):
        guard(reply(), request(), 3, SCHEMA, None)
    with pytest.raises(EgressError, match="the ledger's"):
        guard(reply(), request(), 3, SCHEMA, "0" * 64)


def test_tensors_without_a_plan_are_stopped() -> None:
    with pytest.raises(EgressError, match="0 tensors"):
        guard(reply(), request(), 3, (), COMMITTED)


def test_tensors_beside_a_refusal_are_stopped() -> None:
    made = write_reply(request(), 3, Status.POLICY, to_record(ADAPTER))
    with pytest.raises(EgressError, match="none with status refused-policy"):
        guard(made, request(), 3, SCHEMA, COMMITTED)


def test_an_answer_to_another_round_is_stopped() -> None:
    with pytest.raises(EgressError, match="allowed: 4"):
        guard(reply(number=3), request(), 4, SCHEMA, COMMITTED)


def test_an_adapter_that_is_too_large_is_stopped() -> None:
    with pytest.raises(EgressError, match="bytes together"):
        guard(reply(), request(), 3, (TensorSpec("x", (2**30,)),), COMMITTED)


def test_flowers_error_reply_is_stopped() -> None:
    """Flower puts an exception's text into it."""
    made = Message(Error(0, "patient 4711"), reply_to=request())
    with pytest.raises(EgressError, match="an error or nothing"):
        guard(made, request(), 0)


def test_a_package_holds_what_passed() -> None:
    plain = to_record(ADAPTER)
    package = pack(plain)
    assert guard_package(package, plain) is package
    empty = ArrayRecord()
    assert guard_package(pack(empty), empty) == empty
    whole = package["package"]
    longer = Array(whole.dtype, whole.shape, whole.stype, whole.data + b"4711")
    for other in (
        ArrayRecord({"package": longer}),
        ArrayRecord({"package": whole, "more": whole}),
        pack(to_record({**ADAPTER, "b.weight": torch.zeros(4)})),
        plain,
        empty,
    ):
        with pytest.raises((EgressError, MessageError), match="packed adapter"):
            guard_package(other, plain)
    with pytest.raises(EgressError, match="packed adapter"):
        guard_package(package, empty)


METADATA: dict[str, object] = {
    "_group_id": "secret-loss-0.31",
    "_run_id": 4711,
    "_src_node_id": 4711,
    "_dst_node_id": 4711,
    "_reply_to_message_id": "patient 4711",
    "_message_type": "train.patient4711",
    "_message_id": "4711",
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_says_nothing_of_its_own(name: str) -> None:
    made = reply()
    made.metadata.__dict__[name] = METADATA[name]
    with pytest.raises(EgressError, match=f"metadata.{name[1:]}"):
        guard(made, request(), 3, SCHEMA, COMMITTED)


def test_no_clock_of_the_site_leaves() -> None:
    asked, made = request(), reply()
    asked.metadata.__dict__["_created_at"] = asked.metadata.created_at - 100.0
    made.metadata.ttl = 3.25
    passed = guard(made, asked, 3, SCHEMA, COMMITTED)
    assert passed.metadata.created_at == asked.metadata.created_at
    assert passed.metadata.ttl == asked.metadata.ttl


def test_the_order_of_tensors_says_nothing() -> None:
    made = reply()
    record = ArrayRecord()
    for name in reversed(list(arrays(made))):
        record[name] = arrays(made)[name]
    made.content["adapter"] = record
    with pytest.raises(EgressError, match="another order"):
        guard(made, request(), 3, SCHEMA, COMMITTED)
