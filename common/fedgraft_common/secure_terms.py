"""What site and server each derive from the plan before they aggregate securely.

The server names a session and the first round of a set-up; everything else comes from the plan, so
that a site agrees to nothing it has not read there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fedgraft_common.messages import Tensors, TensorSpec, digest
from fedgraft_common.plan import Plan
from fedgraft_common.secure_messages import Terms

BLOCK: Final = 512
"""Rounds of one set-up at most: its messages grow with rounds times sites."""


def secure_terms(plan: Plan, length: int, bits: int, session: bytes, first_round: int) -> Terms:
    """The terms of one set-up.

    Args:
        plan: the run.
        length: values in the adapter.
        bits: 32 or 64: sums are modulo 2^bits.
        session: 16 bytes, drawn by the server for this set-up.
        first_round: the first round it is for.

    Raises:
        PlanError: the plan's numbers of sites, dropouts and colluders do not go together.
    """
    return Terms(
        run=bytes.fromhex(plan.hash),
        session=session,
        first_round=first_round,
        rounds=min(BLOCK, plan.rounds.count - first_round + 1),
        length=length,
        bits=bits,
        sites=plan.noise_shares
        + plan.privacy.tolerated_dropouts
        + plan.privacy.tolerated_colluders,
        dropouts=plan.privacy.tolerated_dropouts,
        colluders=plan.privacy.tolerated_colluders,
    )


def context_of(plan: Plan, number: int, adapter: ArrayRecord) -> bytes:
    """32 bytes that name what a round computes on; sites that were sent different adapters differ.

    Args:
        plan: the run.
        number: of the round.
        adapter: where the round starts, unpacked.
    """
    return hashlib.sha256(f"{plan.hash} {number} {digest(adapter)}".encode()).digest()


def masked_schema(schema: Sequence[TensorSpec], bits: int) -> tuple[TensorSpec, ...]:
    """The tensors of a masked input: those of the adapter, as unsigned integers."""
    return tuple(TensorSpec(spec.name, spec.shape, f"uint{bits}") for spec in schema)


def to_vector(tensors: Tensors, schema: Sequence[TensorSpec]) -> NDArray[Any]:
    """Tensors one after the other, in the schema's order."""
    return np.concatenate([tensors[spec.name].numpy().reshape(-1) for spec in schema])


def to_tensors(vector: NDArray[Any], schema: Sequence[TensorSpec]) -> Tensors:
    """What `to_vector` joined."""
    parts = np.split(vector, np.cumsum([int(np.prod(spec.shape)) for spec in schema])[:-1])
    return {
        spec.name: torch.from_numpy(part.reshape(spec.shape).copy())
        for spec, part in zip(schema, parts, strict=True)
    }
