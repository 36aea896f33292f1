"""One array instead of many, for the way over a network.

Flower moves every array of a message as two content-addressed objects, each with its own request,
and a round asks for each of them four times. An adapter has a hundred tensors: packed into one
array (safetensors bytes), its round takes a tenth of the time. What is in the package is checked
after unpacking like everything else that arrives; a package is never more than bytes with names,
shapes and dtypes.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedgraft_common.errors import MessageError
from fedgraft_common.messages import to_array

PACKAGE: Final = "package"
STYPE: Final = "safetensors"


def pack(record: ArrayRecord) -> ArrayRecord:
    """A record with one array that holds all arrays of `record`; an empty record stays empty."""
    if not record:
        return record
    return package(save({name: array.numpy() for name, array in record.items()}))


def package(content: bytes) -> ArrayRecord:
    """The record that carries these bytes, which `pack` made."""
    packed = ArrayRecord()  # its constructor would copy the Array
    packed[PACKAGE] = Array("uint8", (len(content),), STYPE, content)
    return packed


def is_packed(record: ArrayRecord) -> bool:
    """Whether `pack` made this record."""
    return list(record) == [PACKAGE] and record[PACKAGE].stype == STYPE


def unpack(record: ArrayRecord) -> ArrayRecord:
    """What was packed, in name order, in the bytes that `messages.to_record` gives.

    Raises:
        MessageError: the package is damaged, or holds a dtype without a numpy counterpart.
    """
    try:
        arrays = load(record[PACKAGE].data)
        plain = ArrayRecord()
        for name in sorted(arrays):
            values: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = arrays[name]
            plain[name] = to_array(torch.from_numpy(values))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise MessageError(
            "packed adapter", str(error), "tensors in safetensors' format",
            "The message is malformed and was ignored.",
        ) from None  # fmt: skip
    return plain
