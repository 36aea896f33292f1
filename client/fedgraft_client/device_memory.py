"""A device's memory: how much of it this process may use, and what happens when it is full.

Work on N records is done in parts. A part that does not fit is done again in smaller ones, down to
one record, and the size that fitted is kept for what follows. Which records are worked on, and what
is computed from each, does not change.

On a CPU it is the process that grows. Every batch has another size; the C library keeps what was
freed in pieces that the next batch does not fit in. A text encoder's simulation took 7 GB, of which
0.2 GB were tensors.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from fedgraft_common.errors import DeviceError, PolicyError

log = logging.getLogger(__name__)
GIB = 2**30
T = TypeVar("T")


def return_freed() -> None:
    """Gives memory that was freed back to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def limit_memory(device: torch.device, gibibytes: float | None) -> float:
    """Lets this process allocate no more than that on a device; more is out of memory.

    The limit is on tensors. What CUDA keeps for itself, about half a GiB per process, is on top.

    Args:
        device: a CPU has no limit.
        gibibytes: `policy.gpu_memory`; None for all.

    Returns:
        The fraction of the device's memory that is allowed, in (0, 1].

    Raises:
        PolicyError: the limit is more than the device has.
    """
    if device.type != "cuda":
        return 1.0
    total = torch.cuda.get_device_properties(device).total_memory
    fraction = memory_fraction(total, gibibytes, str(device))
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    return fraction


def memory_fraction(total: int, gibibytes: float | None, device: str) -> float:
    """The part of `total` bytes that a limit in GiB allows.

    Raises:
        PolicyError: the limit is more than there is.
    """
    if gibibytes is None:
        return 1.0
    fraction = gibibytes * GIB / total
    if fraction > 1:
        raise PolicyError(
            "policy.gpu_memory", gibibytes, f"at most {total / GIB:.1f} GiB, all that {device} has",
            "Lower it, or leave it out to allow everything.",
        )  # fmt: skip
    return fraction


def smaller(size: int, records: int) -> int:
    """The next size to try when `records` records, at most `size` at once, did not fit.

    It is logged. Memory that is cached for tensors which are gone goes back to the device, where
    other sizes can have it.

    Raises:
        DeviceError: not even one record fits.
    """
    at_once = min(size, records)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if at_once <= 1:
        raise DeviceError(
            "device memory", "out of memory with one record", "room for the model and one record",
            "Free the device, raise policy.gpu_memory, or choose another device.",
        )  # fmt: skip
    half = at_once // 2
    log.warning(
        "out of memory; going on with fewer records at once", extra={"action": "memory"}
    )  # how many there were is a count of private records
    return half


def in_chunks(work: Callable[[slice], T], records: int, size: int) -> tuple[list[T], int]:
    """Does work on slices of records, smaller ones when the device is full.

    Args:
        work: on one slice; may raise `torch.OutOfMemoryError`, and is then asked for less.
        records: N.
        size: records at once.

    Returns:
        The results in order, and the size that fitted.

    Raises:
        DeviceError: not even one record fits.
    """
    parts: list[T] = []
    start = 0
    while start < records:
        part = slice(start, min(start + size, records))
        try:
            parts.append(work(part))
        except torch.OutOfMemoryError:
            fits = False
        else:
            fits = True
        if fits:
            start = part.stop
        else:  # outside the handler: the exception held on to the tensors that did not fit
            size = smaller(size, part.stop - start)
    return parts, size
