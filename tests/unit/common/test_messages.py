from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedgraft_common.errors import MessageError
from fedgraft_common.messages import (
    ADAPTER,
    PLAN,
    RANGE,
    ROUND,
    STATUS,
    Status,
    Tensors,
    TensorSpec,
    check_range,
    clamp,
    from_record,
    read_request,
    read_status,
    to_record,
    write_reply,
)


@pytest.fixture(autouse=True)
def _run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower builds messages inside a run only."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


SCHEMA = (TensorSpec("a", (2, 3)), TensorSpec("b", ()))


def tensors() -> Tensors:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(-1.5)}


def npy(array: NDArray[np.generic]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def forged(data: bytes, stype: str = "numpy.ndarray") -> ArrayRecord:
    """The schema's record, with other bytes behind tensor `a` than its label says."""
    record = to_record(tensors())
    record["a"] = Array(dtype="float32", shape=(2, 3), stype=stype, data=data)
    return record


def request(content: RecordDict | None) -> Message:
    message = Message(content or RecordDict(), 7, "train")
    message.metadata.__dict__["_message_id"] = "1"  # the carrier's work
    return message


# --- tensors


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.lists(st.integers(0, 4), max_size=4),
        min_size=1,
        max_size=5,
    ),
)
def test_round_trip(shapes: dict[str, list[int]]) -> None:
    sent = {name: torch.randn(shape) for name, shape in shapes.items()}
    schema = tuple(TensorSpec(name, tuple(shape)) for name, shape in shapes.items())
    found = from_record(to_record(sent), schema)
    assert found.keys() == sent.keys()
    assert all(torch.equal(found[name], value) for name, value in sent.items())


def test_equal_tensors_give_equal_bytes() -> None:
    one, other = to_record(tensors()), to_record(dict(reversed(tensors().items())))
    assert list(one) == list(other) == ["a", "b"]
    assert [x.data for x in one.values()] == [x.data for x in other.values()]


def test_a_trained_parameter_travels_without_its_graph() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    found = from_record(to_record({"a": weight * 2, "b": torch.tensor(0.0)}), SCHEMA)
    assert not found["a"].requires_grad


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t | {"c": torch.zeros(1)}, "adapter tensor c: found 'present'"),
        (lambda t: {"a": t["a"]}, "adapter tensor b: found 'missing'"),
        (lambda t: t | {"a": t["a"].T.contiguous()}, r"tensor a: found 'float32\(3, 2\)'"),
        (lambda t: t | {"a": t["a"].flatten()}, r"tensor a: found 'float32\(6,\)'"),
        (lambda t: t | {"a": t["a"].double()}, r"tensor a: found 'float64\(2, 3\)'"),
        (lambda t: t | {"a": t["a"].long()}, r"tensor a: found 'int64\(2, 3\)'"),
        (lambda t: t | {"b": torch.tensor(float("nan"))}, "tensor b: found 'NaN or infinity'"),
        (lambda t: t | {"b": torch.tensor(float("inf"))}, "tensor b: found 'NaN or infinity'"),
        (lambda t: t | {"b": torch.tensor(-float("inf"))}, "tensor b: found 'NaN or infinity'"),
        (lambda t: {}, "adapter tensor a: found 'missing'"),
    ],
)
def test_exactly_the_schema_is_accepted(change: Callable[[Tensors], Tensors], text: str) -> None:
    with pytest.raises(MessageError, match=text):
        from_record(to_record(change(tensors())), SCHEMA)


def archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros((2, 3), np.float32))
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"rubbish",
        npy(np.zeros((2, 3), np.float32))[:-4],
        npy(np.zeros((2, 3), np.float64)),
        npy(np.zeros((2, 3), ">f4")),
        npy(np.zeros((3, 2), np.float32)),
        npy(np.zeros((2, 3), np.float32)).replace(b"'<f4'", b"'<f4("),
        npy(np.zeros((2, 3), np.float32)).replace(b"(2, 3), }", b"(2, 3, } "),
        archive(),
        b"PK\x03\x04rubbish",
    ],
    ids=[
        "nothing",
        "rubbish",
        "short",
        "float64",
        "endian",
        "shape",
        "type",
        "header",
        "npz",
        "zip",
    ],
)
def test_bytes_that_are_not_what_the_label_says(data: bytes) -> None:
    with pytest.raises(MessageError, match="adapter tensor a"):
        from_record(forged(data), SCHEMA)


def test_a_header_that_promises_terabytes() -> None:
    """One site must not be able to exhaust the server's memory with a hundred bytes."""
    honest = npy(np.zeros((2, 3), np.float32))
    huge = honest.replace(b"(2, 3), }" + b" " * 12, b"(3000000000000,), }  ")
    assert len(huge) == len(honest)
    with pytest.raises(MessageError, match="adapter tensor a"):
        from_record(forged(huge), SCHEMA)


def test_pickled_objects_are_never_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    class Speaks:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
            return print, ("the pickle was opened",)

    file = io.BytesIO()
    np.save(file, np.array([[Speaks()] * 3] * 2, object), allow_pickle=True)
    with pytest.raises(MessageError, match="adapter tensor a"):
        from_record(forged(file.getvalue()), SCHEMA)
    assert capsys.readouterr().out == ""


def test_another_serialisation() -> None:
    with pytest.raises(MessageError, match=r"found 'torch\.tensor float32'"):
        from_record(forged(b"", stype="torch.tensor"), SCHEMA)


# --- requests


def good_request() -> RecordDict:
    return RecordDict({ADAPTER: to_record(tensors()), PLAN: ConfigRecord({PLAN: "{}", ROUND: 3})})


def test_request() -> None:
    found = read_request(request(good_request()))
    assert (found.plan, found.round) == ("{}", 3)
    assert list(found.adapter) == ["a", "b"]


@pytest.mark.parametrize("missing", [ADAPTER, PLAN])
def test_request_without_a_record(missing: str) -> None:
    content = good_request()
    del content[missing]
    with pytest.raises(MessageError, match="allowed: records 'adapter' and 'plan'"):
        read_request(request(content))


def test_request_with_more_than_it_should_have() -> None:
    content = good_request()
    content["metrics"] = MetricRecord({"loss": 1.0})
    with pytest.raises(MessageError, match="metrics"):
        read_request(request(content))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {PLAN: "{}"},
        {ROUND: 1},
        {PLAN: b"{}", ROUND: 1},
        {PLAN: "{}", ROUND: "1"},
        {PLAN: "{}", ROUND: 1.0},
        {PLAN: "{}", ROUND: True},
        {PLAN: "{}", ROUND: 0},
        {PLAN: "{}", ROUND: -1},
    ],
)
def test_request_with_wrong_types(config: dict[str, str | int | float | bool | bytes]) -> None:
    content = good_request()
    content[PLAN] = ConfigRecord(config)  # type: ignore[arg-type]
    with pytest.raises(MessageError, match="a number from 1"):
        read_request(request(content))


def test_request_that_is_an_error() -> None:
    message = request(good_request())
    error = Message(Error(0, "lost"), reply_to=message)
    with pytest.raises(MessageError):
        read_request(error)


# --- replies


@pytest.mark.parametrize("status", list(Status))
def test_status_round_trip(status: Status) -> None:
    reply = write_reply(request(good_request()), 3, status)
    assert read_status(reply) is status
    assert reply.metadata.reply_to_message_id == "1"


def test_reply_holds_adapter_round_and_status_and_nothing_else() -> None:
    reply = write_reply(request(good_request()), 3, Status.OK, to_record(tensors()))
    assert sorted(reply.content) == [ADAPTER, STATUS]
    assert dict(reply.content.config_records[STATUS]) == {ROUND: 3, STATUS: "ok"}
    assert list(reply.content.array_records[ADAPTER]) == ["a", "b"]
    assert not write_reply(request(None), 3, Status.FAILED).content.array_records[ADAPTER]


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({STATUS: ConfigRecord()}),
        RecordDict({STATUS: ConfigRecord({STATUS: "fine"})}),
        RecordDict({STATUS: ConfigRecord({STATUS: 1})}),
        RecordDict({STATUS: ConfigRecord({STATUS: b"ok"})}),
        RecordDict({STATUS: MetricRecord({STATUS: 1})}),
    ],
)
def test_unreadable_status_counts_as_failed(content: RecordDict) -> None:
    assert read_status(Message(content, reply_to=request(None))) is Status.FAILED


def test_error_reply_counts_as_failed() -> None:
    assert read_status(Message(Error(0, "lost"), reply_to=request(None))) is Status.FAILED


def test_an_adapter_far_from_its_start_is_refused() -> None:
    initial = {"a": torch.tensor([20.0, -3.0])}
    check_range({"a": initial["a"] + RANGE}, initial)
    check_range({"a": initial["a"] - RANGE}, initial)
    for wrong in (initial["a"] + 17, initial["a"] * 1e6, torch.tensor([float("nan"), 0.0])):
        with pytest.raises(MessageError, match=r"adapter tensor a: found '.* away"):
            check_range({"a": wrong}, initial)


def test_clamping_stays_in_range_and_leaves_the_rest_alone() -> None:
    initial = {"a": torch.tensor([20.0, -3.0, 0.0])}
    found = clamp({"a": torch.tensor([21.0, 900.0, -900.0])}, initial)
    assert found["a"].tolist() == [21.0, 13.0, -16.0]
    check_range(found, initial)
