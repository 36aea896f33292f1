"""What a malicious server tries: messages that a site must refuse, and the word it must answer.

A server owns everything but the site: it chooses the plan, the adapter, the order of messages and,
if it is also the operator, the signature. PEFTLeak (2025) plants a backbone or an initial adapter
that copies records into gradients; a clipping norm, a noise or a batch of its own choosing would do
as well. Each attempt below is one such message, sent through the production daemon.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedgraft_common.messages import (
    ADAPTER,
    EVALUATE,
    FINAL,
    PLAN,
    RANGE,
    ROUND,
    SIGNATURE,
    Status,
    Tensors,
    to_record,
)
from fedgraft_common.packing import PACKAGE, STYPE
from fedgraft_common.plan import Plan
from fedgraft_common.signing import sign_plan

TRAIN = "train"
BIG = 2**22  # float32 values, 16 MiB: far beyond any of the plan's tensors


@dataclass(frozen=True, slots=True)
class Attempt:
    """One message.

    Attributes:
        group: what is altered; a line of the report.
        title: what exactly.
        expected: the words a site may answer.
        content: of the message.
        kind: Flower's message type.
        run: Flower's number of the run.
        spends: reservations it may cost.
    """

    group: str
    title: str
    expected: tuple[Status, ...]
    content: RecordDict
    kind: str = TRAIN
    run: int = 1
    spends: int = 0


@dataclass(frozen=True)
class HostileServer:
    """Writes the messages.

    Attributes:
        plan: what the site takes part in; honest.
        operator: signs it.
        initial: the adapter that its seed gives.
        altered_backbone: the same model in a directory of its own, with one weight changed.
        altered_sha256: of that weights file.
    """

    plan: Plan
    operator: Ed25519PrivateKey
    initial: Tensors
    altered_backbone: str
    altered_sha256: str
    stranger: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    def message(
        self,
        number: object = 1,
        adapter: Tensors | ArrayRecord | None = None,
        plan: Plan | str | None = None,
        signature: str | None = None,
    ) -> RecordDict:
        """A round's request; everything not given is honest."""
        asked = self.plan if plan is None else plan
        text = asked if isinstance(asked, str) else asked.canonical
        signed = sign_plan(text, self.operator) if signature is None else signature
        tensors = self.initial if adapter is None else adapter
        arrays = tensors if isinstance(tensors, ArrayRecord) else to_record(tensors)
        config: Any = {PLAN: text, ROUND: number, SIGNATURE: signed}
        return RecordDict({ADAPTER: arrays, PLAN: ConfigRecord(config)})

    def honest(self, number: int) -> Attempt:
        """A round as an honest server asks for it: the control."""
        adapter = self.initial if number == 1 else self.moved()
        content = self.message(number, adapter)
        return Attempt("an honest round", f"round {number}", (Status.OK,), content, spends=1)

    def moved(self, by: float = 0.01) -> Tensors:
        """An adapter as a few rounds of training leave it."""
        return {name: tensor + by for name, tensor in self.initial.items()}

    def before(self) -> list[Attempt]:
        """What it tries before the first round; nothing may be spent at all."""
        return [*self._starts(), *self._plans(), *self._backbones()]

    def between(self) -> list[Attempt]:
        """What it tries after the first round."""
        return [*self._ranges(), *self._malformed(), *self._oversized(), *self._order()]

    def _starts(self) -> list[Attempt]:
        group, refused = "an altered initial adapter", (Status.MESSAGE,)
        nudged = {name: tensor.clone() for name, tensor in self.initial.items()}
        next(iter(nudged.values())).view(-1)[0] += 1e-6
        other = {
            name: torch.randn(t.shape, generator=torch.Generator().manual_seed(1))
            for name, t in self.initial.items()
        }
        return [
            Attempt(group, "one value moved by a millionth", refused, self.message(1, nudged)),
            Attempt(group, "another seed's", refused, self.message(1, other)),
        ]

    def _plans(self) -> list[Attempt]:
        group = "an altered plan"
        honest = sign_plan(self.plan.canonical, self.operator)
        weaker = {
            "a tenth of the noise": {"privacy.epsilon": 40 * self.plan.privacy.epsilon},
            "a clipping norm of 1000": {"privacy.clipping_norm": 1000.0},
            "every record in every batch": {"training.sample_rate": 1.0},
            "a larger delta": {"privacy.delta": 10 * self.plan.privacy.delta},
        }
        attempts = [
            Attempt(
                group, f"{what}, under the signature of the honest plan", (Status.PLAN,),
                self.message(plan=self.plan.replace(changes), signature=honest),
            )
            for what, changes in weaker.items()
        ]  # fmt: skip
        stranger = sign_plan(self.plan.canonical, self.stranger)
        without = self.plan.replace({"privacy.mechanism": "none"})
        poorer = self.plan.replace({"privacy.epsilon": 40 * self.plan.privacy.epsilon})
        spread = self.plan.canonical.replace(":", ": ")
        return [
            *attempts,
            Attempt(group, "no signature", (Status.PLAN,), self.message(signature="")),
            Attempt(group, "a stranger's signature", (Status.PLAN,),
                    self.message(signature=stranger)),
            Attempt(group, "no DP, signed by the operator", (Status.PLAN, Status.POLICY),
                    self.message(plan=without), run=2),
            Attempt(group, "more epsilon than the policy allows, signed by the operator",
                    (Status.POLICY,), self.message(plan=poorer), run=3),
            Attempt(group, "the honest plan in other words", (Status.MESSAGE, Status.PLAN),
                    self.message(plan=spread)),
            Attempt(group, "a plan with an unknown key", (Status.PLAN,),
                    self.message(plan=self.plan.canonical[:-1] + ',"zzz":1}')),
        ]  # fmt: skip

    def _backbones(self) -> list[Attempt]:
        group = "an altered backbone"
        swapped = self.plan.replace({"backbone.source": f"dir:{self.altered_backbone}"})
        renamed = swapped.replace({"backbone.sha256": self.altered_sha256})
        nameless = swapped.replace({"backbone.sha256": None})
        return [
            Attempt(group, "other weights under the right hash", (Status.PLAN,),
                    self.message(plan=swapped), run=4),
            Attempt(group, "other weights under their own hash", (Status.POLICY,),
                    self.message(plan=renamed), run=5),
            Attempt(group, "other weights under no hash", (Status.POLICY,),
                    self.message(plan=nameless), run=6),
        ]  # fmt: skip

    def _ranges(self) -> list[Attempt]:
        group, refused = "an adapter out of range", (Status.MESSAGE,)
        name = next(iter(self.initial))

        def spoilt(value: float) -> Tensors:
            tensors = self.moved()
            tensors[name].view(-1)[0] = value
            return tensors

        huge = {n: torch.full_like(t, 1e18) for n, t in self.initial.items()}
        edge = self.moved(1.001 * RANGE)
        return [
            Attempt(group, "not a number", refused, self.message(2, spoilt(float("nan")))),
            Attempt(group, "infinity", refused, self.message(2, spoilt(float("inf")))),
            Attempt(group, "one huge value", refused, self.message(2, spoilt(1e30))),
            Attempt(group, "huge values that overflow", refused, self.message(2, huge)),
            Attempt(group, "just beyond the range", refused, self.message(2, edge)),
        ]

    def _malformed(self) -> list[Attempt]:
        group, refused = "a malformed message", (Status.MESSAGE,)
        moved = self.moved()
        name = sorted(moved)[0]
        shape = tuple(moved[name].shape)

        def put(array: Array | None, at: str = name) -> ArrayRecord:
            record = to_record(moved)
            if array is None:
                del record[at]
            else:
                record[at] = array
            return record

        values = moved[name].numpy()
        package = ArrayRecord()
        package[PACKAGE] = Array("uint8", (7,), STYPE, b"garbage")
        strange = self.message(2, moved)
        strange["more"] = ConfigRecord({"code": "import os"})
        return [
            Attempt(group, "a tensor is missing", refused, self.message(2, put(None))),
            Attempt(group, "a tensor too many", refused,
                    self.message(2, put(Array(values), "zzz"))),
            Attempt(group, "another shape", refused,
                    self.message(2, put(Array(np.zeros((*shape, 2), dtype=np.float32))))),
            Attempt(group, "another number format", refused,
                    self.message(2, put(Array(values.astype(np.float64))))),
            Attempt(group, "bytes that are no array", refused,
                    self.message(2, put(Array("float32", shape, "numpy.ndarray", b"no array")))),
            Attempt(group, "a pickle instead of an array", refused,
                    self.message(2, put(Array("float32", shape, "numpy.ndarray",
                                              b"\x80\x04cos\nsystem\n(S'true'\ntR.")))),
            Attempt(group, "a damaged package", refused, self.message(2, package)),
            Attempt(group, "nothing at all", refused, RecordDict()),
            Attempt(group, "a record too many", refused, strange),
            Attempt(group, "a round that is a word", refused, self.message("two", moved)),
            Attempt(group, "round 0", refused, self.message(0, moved)),
            Attempt(group, "a plan that is no JSON", refused, self.message(2, moved, "{")),
        ]  # fmt: skip

    def _oversized(self) -> list[Attempt]:
        group, refused = "an oversized message", (Status.MESSAGE, Status.PLAN)
        name = sorted(self.initial)[0]
        big, many = to_record(self.moved()), to_record(self.moved())
        big[name] = Array(np.zeros(BIG, dtype=np.float32))
        for number in range(5000):
            many[f"tensor-{number}"] = Array(np.zeros(1, dtype=np.float32))
        long = self.plan.canonical[:-1] + ',"zzz":"' + "x" * BIG + '"}'
        deep = "[" * 100_000 + "]" * 100_000
        return [
            Attempt(group, "a tensor of 16 MiB", refused, self.message(2, big)),
            Attempt(group, "5000 tensors", refused, self.message(2, many)),
            Attempt(group, "a plan of 4 MiB", refused, self.message(2, plan=long)),
            Attempt(group, "a plan nested 100,000 deep", (*refused, Status.FAILED),
                    self.message(2, plan=deep)),
        ]  # fmt: skip

    def _order(self) -> list[Attempt]:
        group = "messages out of order"
        later = self.plan.rounds.count + 1
        cheap = {"seed": self.plan.seed + 1, "privacy.epsilon": self.plan.privacy.epsilon / 4}
        swapped = self.plan.replace(cheap)
        return [
            Attempt(group, "a round after the last", (Status.MESSAGE,),
                    self.message(later, self.moved())),
            Attempt(group, "the running plan exchanged for another signed one", (Status.PLAN,),
                    self.message(2, self.moved(), swapped)),
            Attempt(group, "an evaluation that the plan does not have",
                    (Status.MESSAGE, Status.POLICY), self.message(1, self.moved()), EVALUATE),
            Attempt(group, "a final adapter out of range", (Status.MESSAGE,),
                    self.message(self.plan.rounds.count, self.moved(2 * RANGE)), FINAL),
        ]  # fmt: skip

    def again(self) -> list[Attempt]:
        """The first round asked for again, to see the same records through another adapter."""
        group = "the same round asked again"
        return [
            Attempt(group, "as it was", (Status.OK,), self.message(1)),
            Attempt(group, "through another adapter", (Status.OK,),
                    self.message(1, self.moved(1.0))),
        ]  # fmt: skip

    def greedy(self) -> list[Attempt]:
        """A second run, honest in itself, that the lifetime's budget does not pay."""
        second = self.plan.replace({"name": "greedy"})
        return [
            Attempt("a run beyond the budget", "a second run with all of epsilon",
                    (Status.BUDGET,), self.message(1, plan=second), run=7)
        ]  # fmt: skip

    def afterwards(self) -> list[Attempt]:
        """A round after the site has refitted its head."""
        return [
            Attempt("a run that is sealed", "another round after the refit", (Status.SEALED,),
                    self.message(3, self.moved()))
        ]  # fmt: skip


def as_message(attempt: Attempt, number: int, node: int) -> Message:
    """An attempt as Flower hands it to a site."""
    message = Message(attempt.content, dst_node_id=node, message_type=attempt.kind)
    message.metadata.__dict__["_message_id"] = f"message-{number}"
    message.metadata.__dict__["_run_id"] = attempt.run
    return message
