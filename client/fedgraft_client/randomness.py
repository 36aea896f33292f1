"""The only source of DP noise and of sampling randomness.

The bits are a ChaCha20 key stream (RFC 8439; `randomgen.ChaCha`, tested against the
`cryptography` package), the key comes from the operating system, and numpy turns the bits into
uniforms and normals. Nothing else in Fedgraft draws randomness that privacy depends on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Sequence
from typing import Final, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from randomgen import ChaCha

from fedgraft_common.discrete_gaussian import DiscreteGaussian
from fedgraft_common.errors import PrivacyError

_CHUNK = 1 << 16  # 512 KiB of float64, which stays in the processor's cache.

_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class NoiseSource:
    """Gaussian noise, discrete or not, and Poisson samples from one private ChaCha20 stream.

    Make one with `from_operating_system` (real data) or `for_simulation` (reproducible). A
    source made from the operating system never repeats a stream: a forked child draws a new key
    at its first use, and a source can be neither copied nor pickled. Copies that the process
    cannot see, such as a virtual machine restored from a snapshot, are not detected.

    Attributes:
        simulated: True if anyone who knows the key can repeat the noise. Reports say so, and a
            site daemon refuses such a source.
        untouched: True until anything is drawn, a batch of records above all.
    """

    def __init__(self, simulation_key: int | None = None) -> None:
        self.simulated: Final = simulation_key is not None
        self.untouched = True
        self._rekey(secrets.randbits(256) if simulation_key is None else simulation_key)

    @classmethod
    def from_operating_system(cls) -> NoiseSource:
        """A source whose 256-bit key comes from the operating system's generator."""
        return cls()

    @classmethod
    def for_simulation(cls, *key: int | str) -> NoiseSource:
        """A reproducible source: equal keys give equal streams, different keys independent ones.

        The ChaCha20 key is the SHA-256 of the parts as JSON, so (1, 2), (12,) and ("1", "2") are
        three different keys. Give every purpose its own, for example
        `for_simulation(plan.seed, site, "noise", round)`. No privacy against who knows the key.
        """
        digest = hashlib.sha256(json.dumps(key).encode()).digest()
        return cls(int.from_bytes(digest, "little"))

    def gaussian(self, shape: Sequence[int], std: float) -> torch.Tensor:
        """Independent N(0, std^2) noise, float64 on the CPU, of the given shape.

        Guarantee: with std = sigma * C, added to a sum in which one unit's contribution has
        L2 norm at most C, this is the Gaussian mechanism that `SamplingEvent` accounts, under
        adding or removing one unit. Add it in float64, before rounding to anything shorter.

        Each value is the sum of four independent normals, halved. One draw cannot take every
        float64 value, and the gaps reveal which true value lies under it (Mironov 2012; Jin et
        al. 2022 for Gaussian samplers). An attacker on four draws of 52 random bits has to guess
        three of them, 2^156 trials (Holohan and Braghin 2021, "Secure random sampling in
        differential privacy", section 5.1; Opacus' secure_mode takes the same four). That is
        a computational defence, not a proof about exact arithmetic.

        Edge cases: std 0 gives zeros and draws nothing; an empty shape dimension gives an empty
        tensor.

        Raises:
            PrivacyError: std is negative, infinite or not a number; or this is a forked copy of a
                simulated source, which would repeat its parent's randomness.
        """
        if not 0 <= std < math.inf:
            raise PrivacyError(
                field="std",
                value=std,
                allowed="a finite number of at least 0",
                action="Give noise_multiplier * clipping_norm, in the unit of the clipped sum.",
            )
        total = np.zeros(math.prod(shape))
        if std > 0:
            generator = self._fresh_generator()
            buffer = np.empty(min(_CHUNK, total.size))
            for start in range(0, total.size, _CHUNK):
                chunk = total[start : start + _CHUNK]
                for _ in range(4):
                    chunk += generator.standard_normal(out=buffer[: chunk.size])
            total *= std / 2
        return torch.from_numpy(total).reshape(tuple(shape))

    def discrete_gaussian(self, size: int, sampler: DiscreteGaussian) -> NDArray[np.int64]:
        """Independent samples of N_Z(0, sampler.std^2): (size,) int64.

        Guarantee: added to integers, this is what `fedgraft_common.discrete_gaussian` proves of
        it, from independent uniform words of this stream. Integer arithmetic only: there are no
        gaps between floating-point numbers to read anything from.

        Raises:
            PrivacyError: this is a forked copy of a simulated source.
        """
        bits: ChaCha = self._fresh_generator().bit_generator
        return sampler.sample(size, bits.random_raw)

    def poisson_sample(self, size: int, rate: float) -> NDArray[np.int64]:
        """Sorted indices of a Poisson sample: each of `size` units is in with probability `rate`.

        Guarantee: all inclusions are independent, as amplification under adding or removing one
        unit requires; the probability is exact to 2^-53. The length is random and private.

        Edge cases: an empty sample is normal (add noise and account the step all the same);
        rate 0 gives none, rate 1 gives every index.

        Raises:
            PrivacyError: rate is not a probability or size is negative; or this is a forked copy
                of a simulated source.
        """
        if not 0 <= rate <= 1:
            raise PrivacyError(
                field="rate",
                value=rate,
                allowed="a probability, 0 <= q <= 1",
                action="Set it to the expected batch size divided by the declared number of units.",
            )
        if size < 0:
            raise PrivacyError(
                field="size",
                value=size,
                allowed="a whole number of at least 0",
                action="Give the number of units to sample from.",
            )
        return np.flatnonzero(self._fresh_generator().random(size) < rate)

    def choose(self, groups: NDArray[np.int64], most: int) -> NDArray[np.int64]:
        """Sorted positions of at most `most` members of each group, chosen uniformly.

        Guarantee: within a group of n > `most` members every subset of `most` is equally likely
        (without replacement, by sorting random keys of 53 bits; a tie goes to the earlier
        position), and groups are independent of each other. A group of at most `most` members is
        taken whole.

        Args:
            groups: (n,) the group that each position belongs to.
            most: members to take from a group.

        Raises:
            PrivacyError: most is below 1; or this is a forked copy of a simulated source.
        """
        if most < 1:
            raise PrivacyError(
                field="most",
                value=most,
                allowed="a whole number of at least 1",
                action="Set privacy.records_per_unit to the records a unit may use in one step.",
            )
        order = np.lexsort((self._fresh_generator().random(len(groups)), groups))
        ordered = groups[order]
        first = np.searchsorted(ordered, ordered)  # where each one's group begins
        return np.sort(order[np.arange(len(groups)) - first < most])

    def __reduce__(self) -> NoReturn:
        raise TypeError("a NoiseSource must not be copied or pickled: both would draw equal noise")

    def _rekey(self, key: int) -> None:
        self._generator = np.random.Generator(ChaCha(key=key, rounds=20))
        self._forks = _forks

    def _fresh_generator(self) -> np.random.Generator:
        """The generator, after making sure that no other process continues the same stream."""
        self.untouched = False
        if self._forks != _forks:
            if self.simulated:
                raise PrivacyError(
                    field="noise source",
                    value="a simulated source in a forked process",
                    allowed="one process per simulated source",
                    action="Make it inside the new process, with a key of its own.",
                )
            self._rekey(secrets.randbits(256))
        return self._generator
